"""The rules of advice on made-up facts: each holds where it should, gives its figures, and what comes of it can be run."""

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
from prefopt.pipeline.advise.decide import Decision, Verdict, decide
from prefopt.pipeline.advise.facts import Beside, Content, Count, Facts, Lengths, Model, Spread, Thumbs, Way, counted, percent
from prefopt.pipeline.advise.noise import Agreement, of_most
from prefopt.pipeline.advise.page import commands, page, yaml_of
from prefopt.pipeline.advise.rules import RULES, Rule
from prefopt.pipeline.advise.settings import AdviseSettings


def facts(kind: str = "pair", num: int = 5000, **changes: Any) -> Facts:
    """Made-up facts about which no rule but the most general says anything."""
    spread = Spread(20, 30, 40)
    none = Count(0, num)
    up_down = {"thumbs": (num // 2, num - num // 2)}.get(kind, (0, 0))
    base = Facts(
        kind=kind,  # type: ignore[arg-type]
        sources=(SourceSummary("data.jsonl", "made", "made up", "it is", num, ()),),
        num_rows=num,
        num_examples=num,
        num_per_epoch=num,
        faults={},
        passed={},
        sampled=num,
        thumbs=Thumbs(*map(float, up_down)),
        counts=Counts(*up_down, branches=Counter({1 if kind in ("thumbs", "demonstration") else 2: num})),
        lengths=Lengths("characters", spread, spread, spread, 0.5, longer_chosen=Count(num // 2, num)),
        content=Content({"English": 1.0}, none, none, none, none, none, none, none, none, none),
    )
    return replace(base, **changes)


def model(**changes: Any) -> Model:
    ways = (Way("full", True, "2.0 GB", {}), Way("LoRA 16", True, "1.0 GB", {"lora_rank": 16}))
    base = Model("m", 2_000_000_000, False, True, 4096, ways, "full", "8.0 GB (as given)", 1.5, 32)
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
    "has-unread-verdicts": (
        facts("demonstration", unread=("id", "rating")),
        f"not read: rating; {signs.WHAT_IS_READ}",
        {"method": "sft"},
    ),
    "is-contrary": (facts(contrary=Count(60, 5000)), "in 60 of 5,000 rows (1.2 %) a worse answer has the higher score", {"method": "dpo"}),
    "is-one-opening": (
        facts(one_opening=True),
        "all 5,000 examples open with the same",
        {"eval_fraction": None, "eval_every_steps": None},
    ),
    "is-nothing-fitting": (
        facts(model=model(ways=NOTHING, chosen="")),
        "full takes 40.0 GB, LoRA 16 takes 9.0 GB; 8.0 GB (as given)",
        {},
    ),
    "are-too-few": (
        facts(num=12),
        "12 examples only",
        {"method": "ipo", "eval_fraction": None, "eval_every_steps": None, "early_stop": None},
    ),
    "is-untuned": (
        facts(content=CHATS, model=model(has_template=False)),
        "its tokenizer brings no chat template, and all 5,000 examples are chats",
        {"stages": ["sft", "dpo"], "sft": {"learning_rate": 2e-5}, "dpo": {"beta": 0.1, "learning_rate": 5e-7}},
    ),
    "is-untuned-for-pairs": (facts(content=CHATS, model=model(has_template=False)), "5,000 pairs", {"stages": ["sft", "dpo"]}),
    "is-model-unknown": (facts(), "no model was given", {"method": "dpo"}),
    "are-beside": (
        facts(data=("pairs.jsonl",), beside=Beside(("good.jsonl",), 100_000, 100_000)),
        "100,000 good answers in good.jsonl, beside 5,000 pairs",
        {
            "stages": ["sft", "dpo"],
            "data": ["data.jsonl"],
            "epochs": 1.0,
            "eval_every_steps": 7,
            "sft": {"eval_every_steps": 155},
            "dpo": {"data": ["pairs.jsonl"], "beta": 0.1},
        },
    ),
    "has-strays": (facts(strays={"demonstration": 40, "thumbs": 2}), "40 demonstrations and 2 thumbs are left out", {"method": "dpo"}),
    "has-copies": (
        facts(content=content(repeated=Count(100, 5000), near=Count(0, 4900))),
        "100 of 5,000 examples (2 %) repeat an earlier one",
        {"method": "dpo"},
    ),
    "is-judged-already": (facts(have=("no-judge",)), "there are 5,000 pairs", {"method": "dpo"}),
    "may-be-verdicts": (
        facts(content=content(repeated=Count(100, 5000)), agreement=Agreement(0, 60, 4900, 60, if_verdicts=0.2)),
        "100 of 5,000 examples (2 %) equal an earlier one, and 60 of 4,900 pairs of answers (1.2 %) have verdicts both ways",
        {"method": "dpo", "label_smoothing": 0.1},
    ),
    "is-chance": (
        facts(agreement=Agreement(52, 100, 100, 48)),
        "verdicts on the same answers agree in 52 of 100 couples (52 %); coins would in half of them",
        {"method": "dpo"},
    ),
    "is-weightless": (facts(weight=0.0), "the weights of all 5,000 examples are 0", {}),
    "needs-shaping": (facts("demonstration", have=("shaped-rewards",)), "rewards are shaped, as you say", {"method": "sft"}),
    "needs-shaping-of-pairs": (facts(have=("shaped-rewards",)), "5,000 pairs", {"method": "reward"}),
    "needs-shaping-of-thumbs": (facts("thumbs", have=("shaped-rewards",)), "2,500 thumbs up, 2,500 down", {}),
    "has-reward-model": (facts(have=("reward-model",)), "there is a strong reward model, as you say", {"method": "dpo"}),
    "can-be-checked": (
        facts("demonstration", content=content(numeric=Count(4900, 5000))),
        "4,900 of 5,000 good answers (98 %) end in a final answer that could be checked",
        {"method": "sft"},
    ),
    "has-no-judge": (facts("demonstration", have=("no-judge",)), "nothing can judge answers, as you say", {"method": "sft"}),
    "is-prompts": (facts("prompts", 300), "300 prompts, and no answers", {}),
    "is-all-down": (facts("thumbs", counts=Counts(0, 7)), "7 thumbs down, none up", {}),
    "is-all-up": (facts("thumbs", counts=Counts(7, 0)), "7 thumbs up, none down", {"method": "sft"}),
    "is-graded": (
        facts("thumbs", thumbs=Thumbs(2500, 2500, Count(700, 1300), 950)),
        "700 of 1,300 prompts (54 %) have a good and a bad answer, which gives 950 pairs",
        {"method": "kto"},
    ),
    "is-thumbs": (facts("thumbs", counts=Counts(2600, 2400)), "2,600 thumbs up, 2,400 down", {"method": "kto", "beta": 0.1}),
    "is-demonstrations": (
        facts("demonstration"),
        "5,000 single answers, and nothing that says better or worse",
        {"method": "sft", "epochs": 1.0},
    ),
    "is-ranked": (
        facts("ranked", counts=Counts(branches=Counter({4: 3000, 2: 2000}))),
        "3,000 of 5,000 prompts (60 %) have three ranked answers or more",
        {"method": "dpo", "plackett_luce": True},
    ),
    "is-edited": (
        facts(content=content(alike=Count(2000, 5000))),
        "in 2,000 of 5,000 pairs (40 %) the two answers share most of their wording",
        {"method": "dpop", "penalty": 5.0},
    ),
    "is-noise-known": (
        facts(agreement=NOISY),
        "verdicts on the same answers agree in 164 of 200 couples (82 %), so about 10 % of the verdicts are wrong",
        {"method": "robust", "label_smoothing": 0.1},
    ),
    "is-noise-seen": (
        facts(num=204, agreement=Agreement(0, 4, 200, 4)),
        "4 of 200 pairs of answers (2 %) have verdicts both ways",
        {"method": "dpo", "label_smoothing": 0.1},
    ),
    "are-few-pairs": (facts(num=400), "400 pairs, fewer than 1,000", {"method": "ipo", "epochs": 3.0, "batch_size": 32}),
    "is-longer-better": (
        facts(lengths=longer(3500, 5000)),
        "the chosen answer is the longer one in 3,500 of 5,000 pairs of different length (70 %)",
        {"method": "dpo", "beta": 0.1, "length_weight": None},
    ),
    "is-pairs": (facts(), "5,000 pairs", {"method": "dpo", "beta": 0.1, "epochs": 1.0, "eval_fraction": 0.05}),
    "is-adapter": (
        facts(model=model(is_adapter=True, chosen="adapter", ways=(Way("adapter", True, "1.0 GB", {"max_tokens": 2048}),))),
        "m is an adapter; adapter fits",
        {"learning_rate": 5e-6, "max_tokens": 2048},
    ),
    "is-full-too-large": (
        facts(model=model(ways=NO_FULL, chosen="LoRA 16")),
        "all weights take 40.0 GB, LoRA 16 6.0 GB; 8.0 GB (as given)",
        {"lora_rank": 16, "max_tokens": 2048, "learning_rate": 5e-6},
    ),
    "is-full-fitting": (
        facts(model=model(num_parameters=50_000_000)),
        "it takes 2.0 GB; 8.0 GB (as given)",
        {"method": "dpo", "learning_rate": 1e-5, "lora_rank": None},
    ),
    "is-few": (facts("thumbs", 100), "100 examples, fewer than 1,000", {"epochs": 3.0, "early_stop": 2, "eval_fraction": 0.1}),
    "is-short": (facts(num=1500), "1,500 examples in batches of 64: 23 steps", {"batch_size": 32, "eval_every_steps": 4}),
    "is-unbalanced": (
        facts("thumbs", counts=Counts(1000, 4000), thumbs=Thumbs(1000, 8000.5)),
        "1,000 up weigh 1,000, 4,000 down 8,000.5: up weighs 0.12 times what down weighs",
        {"method": "kto", "balance": True},
    ),
    "is-faulty": (
        facts(faults={"prompts_differ": 6, "blank_answer": 4}),
        "10 of 5,000 rows (0.2 %) cannot be used",
        {"on_bad_row": "drop"},
    ),
    "is-raw-for-chats": (
        facts(content=content(raw=Count(5000, 5000)), model=model()),
        "all 5,000 examples are plain text, and the model has a chat template",
        {"text_as": "chat"},
    ),
    "is-too-long": (
        facts(
            lengths=replace(facts().lengths, unit="tokens", too_long=Count(100, 5000), uncut=3000, limit=2048), model=model(context=32768)
        ),
        "100 of 5,000 examples (2 %) have more than 2,048 tokens, and one in a hundred about 3,000 or more",
        {"max_length": 4096},
    ),
}
"""Rule -> facts under which it holds, the figures that it gives, and part of the settings that come of all rules then."""


def decided(found: Facts, **given: Any) -> Decision:
    name = None if found.model is None else found.model.name
    return decide(AdviseSettings(data=["data.jsonl"], **({} if name is None else {"model": name}), **given), found)


def name_of(rule: Rule) -> str:
    return rule.sign.__name__.replace("_", "-")


def holding(decision: Decision) -> list[Verdict]:
    return [*decision.better, decision.method, *decision.also, *decision.warnings, *decision.first, *decision.settings]


EVERY = [(topic, rule) for topic, rules in RULES.items() for rule in rules]
every_rule = pytest.mark.parametrize(("topic", "rule"), EVERY, ids=[name_of(rule) for _, rule in EVERY])


def test_every_rule_has_a_case():
    assert [name_of(rule) for _, rule in EVERY] == list(CASES)


@every_rule
def test_a_rule_holds_and_gives_its_figures_and_settings(topic: str, rule: Rule):
    found, because, expected = CASES[name_of(rule)]
    assert rule.sign(found) == because
    decision = decided(found)
    assert rule in [verdict.rule for verdict in holding(decision)]
    if topic == "method":
        assert rule in [verdict.rule for verdict in (*decision.better[:1], decision.method)]
    assert {name: decision.config.get(name) for name in expected} == expected
    assert bool(decision.config) is bool(expected)


@every_rule
def test_a_rule_has_words_a_reason_and_a_source(topic: str, rule: Rule):
    for words in (rule.when, rule.advice, rule.why, rule.said_by):
        assert words
        assert "{" not in words
    assert not rule.methods or topic == "method"


def test_conditions_are_told_with_their_thresholds():
    told = {name_of(rule): rule.when for _, rule in EVERY}
    assert told["are-few-pairs"] == "Fewer than 1,000 pairs, or rankings"
    assert told["is-unbalanced"] == "Thumbs up weigh less than 1 or more than 1.5 times what thumbs down weigh"
    assert told["is-longer-better"].startswith("The longer answer wins in 60 % or more")


def test_a_method_that_is_not_there_is_said_and_the_next_row_decides():
    names = {row.name for row in METHODS}
    decision = decided(facts("thumbs", counts=Counts(2500, 2500), have=("checker",)))
    (best,) = decision.better
    assert not names & set(best.rule.methods or ())
    assert best.rule.advice == "PPO or GRPO with a checker as the reward (not in prefopt yet)"
    assert decision.method.rule.method == "kto"


def test_rows_below_the_one_that_decides_are_named():
    decision = decided(facts(num=400, lengths=longer(300, 400)))
    assert [verdict.rule.method for verdict in (decision.method, *decision.also)] == ["ipo", "dpo", "dpo"]


def test_settings_that_were_given_win():
    found = facts(num=400, faults={"tie": 1}, model=model(), content=content(raw=Count(400, 400)))
    decision = decided(replace(found, eval_fraction=0.2), text_as="raw", eval_fraction=0.2)
    assert decision.config["text_as"] == "raw"
    assert decision.config["eval_fraction"] == 0.2
    assert "text_as" not in decision.reasons


def test_held_out_data_that_is_given_is_used_and_nothing_is_held_out_beside_it():
    config = decided(facts(has_eval=True), eval_data=["held.jsonl"]).config
    assert config["eval_data"] == ["held.jsonl"]
    assert "eval_fraction" not in config


@pytest.mark.parametrize(("fraction", "steps", "every"), [(None, 75, 7), (0.5, 40, 4), (0.0, 79, None)])
def test_a_share_to_hold_out_that_was_given_is_what_all_is_computed_from(fraction: float | None, steps: int, every: int | None):
    found = facts(eval_fraction=fraction)
    config = decided(found).config
    assert choices.num_steps(found) == steps
    assert config.get("eval_fraction") == (0.05 if fraction is None else fraction or None)
    assert config.get("eval_every_steps") == every


def test_nothing_is_held_out_of_few_where_that_was_asked_for():
    config = decided(facts("thumbs", 100, eval_fraction=0.0)).config
    assert config["epochs"] == 3.0
    assert {"eval_fraction", "eval_every_steps", "early_stop"}.isdisjoint(config)
    assert decided(facts("thumbs", 100)).config["early_stop"] == 2


def test_held_out_data_that_is_given_leaves_no_share_to_hold_out():
    found = facts(has_eval=True, eval_fraction=0.5)
    assert choices.trained_on(found) == 5000
    assert "eval_fraction" not in decided(found, eval_data=["held.jsonl"]).config


def test_examples_count_as_often_as_an_epoch_takes_them():
    light = facts(num=100_000, num_per_epoch=1000)
    assert choices.trained_on(light) == 950
    assert signs.is_short(light) == "1,000 examples an epoch in batches of 64: 15 steps"
    assert signs.is_few(light) == ""
    lighter = facts(num=100_000, num_per_epoch=999)
    assert signs.is_few(lighter) == "999 examples an epoch, fewer than 1,000"
    assert signs.are_few_pairs(lighter) == "999 pairs an epoch, fewer than 1,000"
    assert choices.epochs(lighter) == 3.0
    heavy = facts(num=400, num_per_epoch=4000)
    assert signs.is_few(heavy) == signs.are_few_pairs(heavy) == ""
    assert choices.num_steps(heavy) == 57  # a tenth of the 400 is held out, and with them a tenth of the 4,000
    assert any("400 pairs; an epoch takes 4,000" in line for line in page(heavy, decided(heavy)))


def test_where_and_how_training_runs_is_as_it_was_said(tmp_path: Path):
    found = facts(model=model())
    config = decided(found, device="cpu", cache_dir=tmp_path, data_workers=2).config
    assert (config["device"], config["cache_dir"], config["data_workers"]) == ("cpu", str(tmp_path), 2)
    assert from_yaml(yaml_of(decided(found, cache_dir=tmp_path)))["cache_dir"] == str(tmp_path)
    assert {"device", "cache_dir", "data_workers"}.isdisjoint(decided(found).config)


def test_the_limit_that_examples_are_longer_than_is_the_one_that_was_given():
    lengths = replace(facts().lengths, unit="tokens", too_long=Count(100, 5000), uncut=9000, limit=4096)
    found = facts(lengths=lengths, model=model(context=32768))
    assert signs.is_too_long(found).startswith("100 of 5,000 examples (2 %) have more than 4,096 tokens")
    assert decided(found, max_length=4096).config["max_length"] == 4096  # what was given wins
    assert choices.max_length(found) == 16384
    assert signs.is_too_long(facts(lengths=lengths, model=model(context=4096))) == ""


def test_where_a_run_takes_several_gpus_the_command_starts_them():
    shared = Way("full", True, "30.0 GB", {"parallel": "fsdp"}, gpus=4)
    decision = decided(facts(model=model(ways=(shared,), chosen="full")))
    assert decision.config["parallel"] == "fsdp"
    assert "  torchrun --nproc-per-node 4 -m prefopt train --config a.yaml" in commands(
        decision, Path("a.yaml"), written=True, has_model=True
    )
    assert decision.sweep == ""


def test_where_nothing_is_trained_nothing_is_set():
    decision = decided(facts("prompts", 30, content=content(raw=Count(30, 30), repeated=Count(1, 30)), model=model(ways=(), chosen="")))
    assert decision.config == {}
    assert [name_of(verdict.rule) for verdict in decision.first] == ["are-too-few", "has-copies"]
    assert decision.settings == ()


def test_the_sweep_stays_within_what_is_usual():
    assert decided(facts()).sweep == "prefopt sweep beta=0.033,0.1,0.3"
    assert decided(facts(num=400)).sweep == "prefopt sweep beta=0.033,0.1,0.3"
    assert decided(facts("demonstration")).sweep == ""


@pytest.mark.parametrize(
    ("num", "batch", "steps", "every"),
    [
        (50, 8, 17, 1),
        (20, 8, 8, 1),
        (400, 32, 34, 3),
        (999, 64, 43, 4),
        (1000, 16, 60, 6),
        (2100, 64, 32, 3),
        (5000, 64, 75, 7),
        (100_000, 64, 1485, 148),
    ],
)
def test_a_batch_leaves_enough_steps(num: int, batch: int, steps: int, every: int):
    found = facts(num=num)
    assert (choices.batch_size(found), choices.num_steps(found), choices.eval_every(found)) == (batch, steps, every)


def test_thumbs_are_unbalanced_outside_of_what_kto_says():
    low, high = STILL_BALANCED
    for ratio, holds in ((low, False), (high, False), (high * 1.01, True), (low * 0.99, True)):
        down = 10_000
        assert bool(signs.is_unbalanced(facts("thumbs", thumbs=Thumbs(ratio * down, down)))) is holds
    assert not signs.is_unbalanced(facts("thumbs", thumbs=Thumbs(0.0, 3.0)))
    alike = facts("thumbs", counts=Counts(1000, 4000), thumbs=Thumbs(1000, 4000))
    assert signs.is_unbalanced(alike) == "1,000 up and 4,000 down: up weighs 0.25 times what down weighs"


def test_demonstrations_beside_what_is_judged_set_the_pace_of_sft_alone():
    found = facts(num=400, data=("pairs.jsonl",), beside=Beside(("good.jsonl",), 5000, 5000))
    config = decided(found).config
    assert (config["epochs"], config["batch_size"], config["eval_every_steps"], config["eval_fraction"]) == (3.0, 32, 3, 0.1)
    assert config["sft"] == {"epochs": 1.0, "batch_size": 64, "eval_every_steps": 7}
    assert config["ipo"] == {"data": ["pairs.jsonl"], "beta": 0.1}
    assert signs.is_model_unknown(found) == ""


@pytest.mark.parametrize(("up", "down"), [(400, 0), (0, 400)])
def test_thumbs_of_one_kind_beside_demonstrations_leave_sft_on_the_good_answers(up: int, down: int):
    thumbs = facts("thumbs", 400, counts=Counts(up, down), thumbs=Thumbs(up, down), data=("thumbs.jsonl",))
    found = replace(thumbs, beside=Beside(("good.jsonl",), 4600 if up else 5000, 4600 if up else 5000))
    config = decided(found).config
    assert (config["method"], config["data"], config["epochs"]) == ("sft", ["data.jsonl"], 1.0)
    assert choices.num_steps(choices.all_good(found)) == 71  # of 5,000 without the tenth that the 400 have held out
    assert bool(signs.are_beside(found)) is bool(down)


def test_without_a_judge_prompts_need_answers_and_are_not_trained_on():
    decision = decided(facts("prompts", 300, have=("no-judge",)))
    assert decision.method.because == "nothing can judge answers, as you say"
    assert decision.config == {}
    assert signs.has_no_judge(facts(have=("no-judge",))) == ""


def test_the_rate_of_wrong_verdicts_follows_from_agreement():
    for error in (0.0, 0.05, 0.2, 0.5):
        agree = round(10**6 * ((1 - error) ** 2 + error**2))
        assert Agreement(agree, 10**6, 1, 1).error == pytest.approx(error, abs=1e-3)
    assert of_most(0.2, 1) == pytest.approx(0.2)
    assert of_most(0.2, 3) == pytest.approx(3 * 0.2**2 * 0.8 + 0.2**3)
    assert of_most(0.2, 2) == pytest.approx(0.2**2 + 0.2 * 0.8)  # a draw is half wrong
    assert Agreement(40, 100, 1, 1).error == 0.5


def test_numbers_in_words():
    assert (counted(1, "pairs"), counted(2000, "pairs"), counted(0, "rows")) == ("1 pair", "2,000 pairs", "0 rows")
    said = {0.0: "0 %", 0.0004: "below 0.1 %", 0.042: "4.2 %", 0.05: "5 %", 0.0999: "10 %", 0.5: "50 %", 0.993: "99.3 %", 1.0: "100 %"}
    assert {share: percent(share) for share in said} == said
    assert f"{Count(0, 5):rows}, {Count(5, 5):rows}, {Count(1, 4):rows}" == "none of 5 rows, all 5 rows, 1 of 4 rows (25 %)"


@pytest.mark.parametrize("name", CASES)
def test_the_file_says_what_was_decided(name: str):
    decision = decided(CASES[name][0])
    if decision.config:
        assert from_yaml(yaml_of(decision)) == decision.config


@pytest.mark.parametrize("width", [60, 100])
def test_a_page_of_every_case_is_no_wider_than_it_may_be_and_short(width: int):
    for name, (found, because, _) in CASES.items():
        decision = decided(found)
        lines = page(found, decision, width)
        assert max(map(len, lines)) <= width
        assert len(lines) <= (30 if width == 100 else 45), name
        if any(name_of(verdict.rule) == name for verdict in (*decision.better, decision.method)):
            assert because.lower() in " ".join(" ".join(lines).split()).lower()


def test_the_page_says_what_the_file_holds_and_why():
    decision = decided(facts(num=400, model=model()))
    lines = page(facts(num=400, model=model()), decision)
    assert "advice: ipo" in lines
    rows = [line.split() for line in lines[lines.index("settings") + 1 :] if line[2] != " "]
    shown = {name: value for name, value, *_ in rows}
    assert {"beta": "0.1", "learning_rate": "5e-07", "epochs": "3", "early_stop": "2", "batch_size": "32"}.items() <= shown.items()
    assert shown["lora_rank"] == "-"
