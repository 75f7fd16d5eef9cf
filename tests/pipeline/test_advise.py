"""The rules of advice on made-up facts: each holds where it should, gives its figures, and what comes of it can be run."""

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prefopt.config import from_yaml
from prefopt.data.counts import Counts
from prefopt.data.summary import SourceSummary
from prefopt.methods.kto import STILL_BALANCED
from prefopt.methods.table import METHODS
from prefopt.pipeline.advise import choices, signs
from prefopt.pipeline.advise.decide import Decision, decide
from prefopt.pipeline.advise.facts import Content, Copies, Count, Facts, Lengths, Model, Said, Spread, Way, percent
from prefopt.pipeline.advise.noise import Agreement, of_most
from prefopt.pipeline.advise.page import commands, yaml_of
from prefopt.pipeline.advise.rules import RULES, Rule, good_for
from prefopt.pipeline.advise.settings import AdviseSettings


def facts(kind: str = "pair", num: int = 5000, **changes: Any) -> Facts:
    """Made-up facts about which no rule but the most general says anything."""
    spread = Spread(10, 20, 30, 40, 50)
    none = Count(0, num)
    up_down = {"thumbs": (num // 2, num - num // 2)}.get(kind, (0, 0))
    base = Facts(
        kind=kind,  # type: ignore[arg-type]
        sources=(SourceSummary("data.jsonl", "made", "made up", "it is", num, ()),),
        num_rows=num,
        serves={kind: num},  # type: ignore[dict-item]
        num_examples=num,
        faults={},
        passed={},
        sampled=num,
        counts=Counts(*up_down, branches=Counter({1 if kind in ("thumbs", "demonstration") else 2: num})),
        lengths=Lengths("characters", spread, spread, spread, 0.5, longer_chosen=Count(num // 2, num)),
        copies=Copies(none, none, num, none, Count(0, 100), "the 5 % that seed 0 draws"),
        content=Content({"Latin": 1.0}, none, none, none, none, none, none, none),
    )
    return replace(base, **changes)


def model(**changes: Any) -> Model:
    ways = (Way("full", True, "2.0 GB", {}), Way("LoRA 16", True, "1.0 GB", {"lora_rank": 16}))
    base = Model("m", 2_000_000_000, False, True, 4096, ways, "full", "8.0 GB (as given)", Said(64, 1.5, 1.4, 1.7, Count(40, 64)))
    return replace(base, **changes)


def longer(num: int, of: int) -> Lengths:
    return replace(facts().lengths, longer_chosen=Count(num, of))


def content(**changes: Any) -> Content:
    return replace(facts().content, **changes)


NO_FULL = (Way("full", False, "40.0 GB", {}), Way("LoRA 16", True, "6.0 GB", {"lora_rank": 16, "max_tokens": 2048}))
NOTHING = (Way("full", False, "40.0 GB", {}), Way("LoRA 16", False, "9.0 GB", {}))
CHATS = content(raw=Count(0, 5000))
NOISY = Agreement(164, 200, 150, 30)

CASES: Mapping[str, tuple[Facts, str, dict[str, Any]]] = {
    "method-needs-shaping-ppo": (facts(have=("shaped-rewards",)), "rewards are shaped, as you say", {"method": "dpo"}),
    "method-has-reward-model-ppo": (
        facts(have=("reward-model",)),
        "there is a strong reward model and time to sample, as you say",
        {"method": "dpo"},
    ),
    "method-can-be-checked-grpo": (
        facts("demonstration", content=content(numeric=Count(4900, 5000))),
        "4,900 of 5,000 good answers (98 %) end in a final answer that could be checked",
        {"method": "sft"},
    ),
    "method-prompts": (facts("prompts", 300), "300 prompts, and no answers", {}),
    "method-all-down": (facts("thumbs", counts=Counts(0, 7)), "7 thumbs down, none up", {}),
    "method-all-up-sft": (facts("thumbs", counts=Counts(7, 0)), "7 thumbs up, none down", {"method": "sft"}),
    "method-thumbs-kto": (facts("thumbs", counts=Counts(2600, 2400)), "2,600 thumbs up, 2,400 down", {"method": "kto", "beta": 0.1}),
    "method-demonstrations-sft": (
        facts("demonstration"),
        "5,000 single answers, and nothing that says better or worse",
        {"method": "sft", "epochs": 1.0},
    ),
    "method-ranked-dpo": (
        facts("ranked", counts=Counts(branches=Counter({4: 3000, 2: 2000}))),
        "3,000 of 5,000 prompts (60 %) have three ranked answers or more",
        {"method": "dpo", "plackett_luce": True},
    ),
    "method-edited-dpop": (
        facts(alike=Count(2000, 5000)),
        "in 2,000 of 5,000 pairs (40 %) the two answers share most of their wording",
        {"method": "dpop"},
    ),
    "method-noise-known-robust": (
        facts(agreement=NOISY),
        "verdicts on the same answers agree in 164 of 200 couples (82 %), so about 10 % of the verdicts are wrong",
        {"method": "robust", "label_smoothing": 0.1},
    ),
    "method-noise-seen-dpo": (
        facts(num=200, sampled=200, agreement=Agreement(0, 4, 4, 4)),
        "4 of 200 pairs (2 %) stand against another with the same answers",
        {"method": "dpo", "label_smoothing": 0.1},
    ),
    "method-are-few-pairs-ipo": (facts(num=400), "400 examples, fewer than 1,000", {"method": "ipo", "epochs": 3.0, "batch_size": 32}),
    "method-own-and-longer-simpo": (
        facts(num=20_000, lengths=longer(14_000, 20_000), model=model(said=Said(64, 1.45, 1.4))),
        (
            "the chosen answer is the longer one in 14,000 of 20,000 pairs of different length (70 %); "
            "a token of theirs costs the model 1.45 nats, and one of its own 1.40; 20,000 pairs"
        ),
        {"method": "simpo", "beta": 2.5},
    ),
    "method-longer-better-rdpo": (
        facts(lengths=longer(3500, 5000)),
        "the chosen answer is the longer one in 3,500 of 5,000 pairs of different length (70 %)",
        {"method": "rdpo", "beta": 0.1},
    ),
    "method-uneven-ln-dpo": (
        facts(lengths=replace(facts().lengths, ratio=3.5)),
        "the longer answer of a pair is 3.5 times as long as the other (median)",
        {"method": "ln-dpo", "beta": 5.0},
    ),
    "method-pairs-dpo": (facts(), "5,000 pairs", {"method": "dpo", "beta": 0.1, "epochs": 1.0, "eval_fraction": 0.05}),
    "before-untuned": (
        facts(content=CHATS, model=model(has_template=False)),
        "its tokenizer brings no chat template, and all 5,000 examples are chats",
        {"stages": ["sft", "dpo"], "sft": {"learning_rate": 2e-5}, "dpo": {"beta": 0.1, "learning_rate": 5e-7}},
    ),
    "before-strange": (
        facts(model=model(said=Said(64, 2.9, 1.1))),
        "a token of the good answers costs the model 2.90 nats, and one of its own 1.10 (64 examples)",
        {"method": "dpo"},
    ),
    "before-model-unknown": (facts(), "no model was given", {"method": "dpo"}),
    "weights-nothing-fitting": (
        facts(model=model(ways=NOTHING, chosen="")),
        "full takes 40.0 GB, LoRA 16 takes 9.0 GB; 8.0 GB (as given)",
        {"method": "dpo"},
    ),
    "weights-adapter": (
        facts(model=model(is_adapter=True, chosen="adapter", ways=(Way("adapter", True, "1.0 GB", {"max_tokens": 2048}),))),
        "m is an adapter; adapter fits",
        {"learning_rate": 5e-6, "max_tokens": 2048},
    ),
    "weights-full-too-large": (
        facts(model=model(ways=NO_FULL, chosen="LoRA 16")),
        "training all weights takes 40.0 GB, LoRA 16 6.0 GB; 8.0 GB (as given)",
        {"lora_rank": 16, "max_tokens": 2048, "learning_rate": 5e-6},
    ),
    "weights-large-for-few": (
        facts(num=400, model=model()),
        "400 examples, fewer than 1,000, for a model of 2.0 billion weights",
        {"method": "ipo", "lora_rank": 16, "learning_rate": 5e-6},
    ),
    "weights-full-fitting": (
        facts(model=model(num_parameters=50_000_000)),
        "training all 50.0 million weights takes 2.0 GB; 8.0 GB (as given)",
        {"method": "dpo", "learning_rate": 1e-5},
    ),
    "settings-few": (facts("thumbs", 100), "100 examples, fewer than 1,000", {"epochs": 3.0, "early_stop": 2, "eval_fraction": 0.1}),
    "settings-short": (facts(num=1500), "1,500 examples make 23 steps of a batch of 64", {"batch_size": 32, "eval_every_steps": 4}),
    "settings-unbalanced": (
        facts("thumbs", counts=Counts(1000, 4000)),
        "1,000 up and 4,000 down: up weighs 0.25 times what down weighs",
        {"method": "kto", "balance": True},
    ),
    "settings-faulty": (
        facts(faults={"blank_answer": 4, "prompts_differ": 6}),
        "10 of 5,000 rows (0.2 %) cannot be used: prompts_differ 6, blank_answer 4",
        {"on_bad_row": "drop"},
    ),
    "settings-raw-for-chats": (
        facts(content=content(raw=Count(5000, 5000)), model=model()),
        "all 5,000 examples are plain text, and the model has a chat template",
        {"text_as": "chat"},
    ),
    "settings-too-long": (
        facts(lengths=replace(facts().lengths, unit="tokens", too_long=Count(100, 5000), uncut=3000), model=model(context=32768)),
        "100 of 5,000 examples (2 %) have more than 2,048 tokens, and one in a hundred about 3,000 or more",
        {"max_length": 4096},
    ),
    "data-chance": (
        facts(agreement=Agreement(52, 100, 100, 48)),
        "verdicts on the same answers agree in 52 of 100 couples (52 %); coins would in half of them",
        {"method": "dpo"},
    ),
    "data-has-copies": (
        facts(copies=replace(facts().copies, repeated=Count(100, 5000), near=Count(0, 4900))),
        "100 of 5,000 examples (2 %) repeat an earlier one, and none of 4,900 different ones are near copies of one",
        {"method": "dpo"},
    ),
    "data-has-leaks": (
        facts(copies=replace(facts().copies, leaks=Count(20, 250))),
        "20 of 250 held-out examples (8 %) (the 5 % that seed 0 draws) open like one that is trained on",
        {"method": "dpo"},
    ),
    "data-broken": (
        facts(content=content(broken=Count(3, 5000))),
        "3 of 5,000 texts (below 0.1 %) have characters that were lost, or UTF-8 that was read as something else",
        {"method": "dpo"},
    ),
}
"""Rule -> facts under which it holds, the figures that it gives, and part of the settings that come of all rules then."""


def decided(found: Facts, **given: Any) -> Decision:
    name = None if found.model is None else found.model.name
    return decide(AdviseSettings(data=["data.jsonl"], **({} if name is None else {"model": name}), **given), found)


def test_every_rule_has_a_case():
    assert [rule.name for rule in RULES] == list(CASES)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_rule_holds_and_gives_its_figures_and_settings(rule: Rule):
    found, because, expected = CASES[rule.name]
    assert rule.sign(found) == because
    decision = decided(found)
    held = {verdict.rule.name for verdict in (*decision.better, decision.method, *decision.also, *decision.others)}
    assert rule.name in held
    if rule.topic == "method":
        decides = decision.better[0] if decision.better else decision.method
        assert decides.rule.name == rule.name
    assert {name: decision.config.get(name) for name in expected} == expected
    assert bool(decision.config) is bool(expected)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_rule_has_words_a_reason_and_a_source(rule: Rule):
    assert rule.when
    assert rule.when[0].islower()
    assert rule.advice
    assert "{" not in rule.advice
    assert rule.reason
    assert rule.said_by
    assert (rule.methods is not None) is (rule.topic == "method")


def test_a_method_that_is_not_there_is_said_and_the_next_row_decides():
    names = {row.name for row in METHODS}
    decision = decided(facts("thumbs", counts=Counts(2500, 2500), have=("checker",)))
    (best,) = decision.better
    assert not names & set(best.rule.methods or ())
    assert best.rule.advice == "PPO or GRPO with a checker as the reward (grpo and ppo: not in prefopt yet)"
    assert decision.method.rule.method == "kto"


def test_rows_below_the_one_that_decides_are_named():
    decision = decided(facts(num=400, lengths=longer(300, 400)))
    assert [verdict.rule.method for verdict in (decision.method, *decision.also)] == ["ipo", "rdpo", "dpo"]


def test_reasons_of_methods_are_read_from_their_files():
    assert good_for("ipo") == "few pairs, or pairs whose preference is certain, where DPO overfits; several epochs"
    for row in METHODS:
        assert len(good_for(row.name)) > 5


def test_settings_that_were_given_win():
    found = facts(num=400, faults={"tie": 1}, model=model(), content=content(raw=Count(400, 400)))
    decision = decided(found, text_as="raw", eval_fraction=0.2)
    assert decision.config["text_as"] == "raw"
    assert decision.config["eval_fraction"] == 0.2
    assert decision.reasons["text_as"] == "as given"


def test_held_out_data_that_is_given_is_used_and_nothing_is_held_out_beside_it():
    config = decided(facts(has_eval=True), eval_data=["held.jsonl"]).config
    assert config["eval_data"] == ["held.jsonl"]
    assert "eval_fraction" not in config


def test_where_a_run_takes_several_gpus_the_command_starts_them():
    shared = Way("full", True, "30.0 GB", {"parallel": "fsdp"}, gpus=4)
    decision = decided(facts(model=model(ways=(shared,), chosen="full")))
    assert decision.config["parallel"] == "fsdp"
    assert "  torchrun --nproc-per-node 4 -m prefopt train --config a.yaml" in commands(
        decision, Path("a.yaml"), written=True, has_model=True
    )
    assert decision.sweep == ""


def test_where_nothing_is_trained_nothing_is_set():
    decision = decided(facts("prompts", 30, content=content(raw=Count(30, 30), broken=Count(1, 30)), model=model(ways=(), chosen="")))
    assert decision.config == {}
    assert [verdict.rule.name for verdict in decision.others] == ["data-broken"]


def test_the_sweep_stays_within_what_is_usual():
    assert decided(facts()).sweep == "prefopt sweep beta=0.033,0.1,0.3 --config "
    assert decided(facts(lengths=replace(facts().lengths, ratio=3.5))).sweep == "prefopt sweep beta=2,5,10 --config "
    assert decided(facts("demonstration")).sweep == ""


@pytest.mark.parametrize(
    ("num", "batch", "steps", "every"),
    [(50, 8, 17, 1), (400, 32, 34, 3), (999, 64, 43, 4), (1000, 16, 60, 6), (2100, 64, 32, 3), (5000, 64, 75, 7), (100_000, 64, 1485, 148)],
)
def test_a_batch_leaves_enough_steps(num: int, batch: int, steps: int, every: int):
    found = facts(num=num)
    assert (choices.batch_size(found), choices.num_steps(found), choices.eval_every(found)) == (batch, steps, every)


def test_thumbs_are_unbalanced_outside_of_what_kto_says():
    low, high = STILL_BALANCED
    for ratio, holds in ((low, False), (high, False), (high * 1.01, True), (low * 0.99, True)):
        down = 10_000
        assert bool(signs.is_unbalanced(facts("thumbs", counts=Counts(round(ratio * down), down)))) is holds


def test_the_rate_of_wrong_verdicts_follows_from_agreement():
    for error in (0.0, 0.05, 0.2, 0.5):
        agree = round(10**6 * ((1 - error) ** 2 + error**2))
        assert Agreement(agree, 10**6, 1, 1).error == pytest.approx(error, abs=1e-3)
    assert of_most(0.2, 1) == pytest.approx(0.2)
    assert of_most(0.2, 3) == pytest.approx(3 * 0.2**2 * 0.8 + 0.2**3)
    assert of_most(0.2, 2) == pytest.approx(0.2**2 + 0.2 * 0.8)  # a draw is half wrong
    assert Agreement(40, 100, 1, 1).error == 0.5


def test_shares_in_words():
    said = {0.0: "0 %", 0.0004: "below 0.1 %", 0.042: "4.2 %", 0.05: "5 %", 0.0999: "10 %", 0.5: "50 %", 0.993: "99.3 %", 1.0: "100 %"}
    assert {share: percent(share) for share in said} == said
    assert f"{Count(0, 5):rows}, {Count(5, 5):rows}, {Count(1, 4):rows}" == "none of 5 rows, all 5 rows, 1 of 4 rows (25 %)"


@pytest.mark.parametrize("name", CASES)
def test_the_file_says_what_was_decided(name: str):
    decision = decided(CASES[name][0])
    if decision.config:
        assert from_yaml(yaml_of(decision)) == decision.config


def test_every_figure_is_finite_in_json():
    for found, _, _ in CASES.values():
        text = json.dumps(found.to_dict(), allow_nan=False)
        assert math.isfinite(json.loads(text)["lengths"]["prompt_share"])


def test_a_page_of_every_case_is_no_wider_than_a_terminal():
    from prefopt.pipeline.advise.page import WIDTH, page

    for found, because, _ in CASES.values():
        lines = page(found, decided(found))
        assert max(map(len, lines)) <= WIDTH
        assert because in " ".join(" ".join(lines).split())
