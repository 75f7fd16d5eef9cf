"""The watch's rules on made-up figures: each on both sides of its thresholds, alone, in words that hold."""

import json
import math
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefopt.methods.dpo import DPO, DPOSettings
from prefopt.methods.table import METHODS
from prefopt.training.assemble import settings_for
from prefopt.training.references import SAME_FUNCTION
from prefopt.training.watch import Finding, Watch, WatchedRun
from prefopt.training.watch_rules import RULES, rules_table
from prefopt.training.watch_start import SAME_START

ROOT = Path(__file__).parents[2]
Row = dict[str, float]
Case = tuple[WatchedRun, list[Row]]

DPO_SETTINGS = {"batch_size": 16, "epochs": 1.0, "beta": 0.1, "label_smoothing": 0.0, "max_grad_norm": 1.0, "warmup_ratio": 0.1}
SAMPLED = {"samples/length": 40.0, "samples/ended": 1.0, "samples/repetition": 0.05, "samples/entropy": 1.5}
BEFORE = {"eval/loss": 0.6931, "eval/rewards/margin": 0.0, "eval/rewards/accuracy": 0.5, "eval/kl": 0.0} | {
    "eval/logps/chosen": -50.0,
    "eval/logps/rejected": -55.0,
}
HELD_OUT = {"num_held_out": 400, "summary": {"mean_chosen": 40.0, "mean_rejected": 36.0, "mean_answer": 38.0}}


def dpo(*, num_steps: int = 100, more: Mapping[str, Any] = {}, **changes: Any) -> WatchedRun:
    """A run of DPO in which nothing is wrong, but for what is changed; answers have 40 tokens."""
    facts: dict[str, Any] = {
        "method": "dpo",
        "settings": DPO_SETTINGS | more,
        "learning_rate": 5e-6,
        "usual_learning_rate": 5e-6,
        "adapter": True,
        "num_train": num_steps * 16,
        "num_steps": num_steps,
        "reference_is_start": True,
        "start_difference": 0.0,
        "before": {},
        "data": {"num_held_out": 0, "summary": HELD_OUT["summary"]},
        "usual": {"beta": (0.01, 0.5)},
    }
    return WatchedRun(**facts | changes)


def sft(*, num_steps: int = 100, more: Mapping[str, Any] = {}, **changes: Any) -> WatchedRun:
    """The same of SFT."""
    settings = {name: value for name, value in DPO_SETTINGS.items() if name not in ("beta", "label_smoothing")} | more
    facts: dict[str, Any] = {"method": "sft", "settings": settings, "start_difference": None, "usual": {}}
    return dpo(num_steps=num_steps, **facts | changes)


def held_out(num_steps: int = 100, *, more: Mapping[str, Any] = {}, before: Row = BEFORE, **changes: Any) -> WatchedRun:
    """A run of DPO with 400 held-out pairs and 16 samples at each evaluation."""
    return dpo(num_steps=num_steps, before=before | SAMPLED, data=HELD_OUT, more={"samples": 16, "sample_tokens": 128} | more, **changes)


def steps(num: int, **figures: float | Callable[[int], float]) -> list[Row]:
    """Rows of DPO in which nothing is wrong; a figure is a number, or a function of the step."""
    usual: Row = {"loss": 0.6, "rewards/chosen": 0.05, "rewards/rejected": -0.1, "rewards/margin": 0.15, "rewards/accuracy": 0.7}
    usual |= {"logps/chosen": -50.0, "logps/rejected": -56.0, "kl": 1.0, "grad_norm": 1.0}
    named = {_key(name): figure for name, figure in figures.items()}
    return [
        {"step": step} | usual | {name: figure(step) if callable(figure) else figure for name, figure in named.items()}
        for step in range(1, num + 1)
    ]


def demonstrations(num: int, **figures: float | Callable[[int], float]) -> list[Row]:
    """Rows of SFT in which nothing is wrong."""
    falling: dict[str, Any] = {"loss": lambda step: 2.0 - step / 100} | figures
    return [{name: value for name, value in row.items() if "/" not in name and name != "kl"} for row in steps(num, **falling)]


def evaluated(rows: list[Row], **figures: float) -> list[Row]:
    """The rows, the last of them with held-out figures and samples as they were before training, but for what is changed."""
    return [*rows[:-1], rows[-1] | BEFORE | SAMPLED | {_key(name): value for name, value in figures.items()}]


def _key(name: str) -> str:
    return re.sub(r"^(rewards|logps|samples|eval)_", r"\1/", re.sub(r"^eval_(rewards|logps)_", r"eval/\1/", name))


def replay(run: WatchedRun, rows: Sequence[Row], said: Sequence[str] = ()) -> list[Finding]:
    """What the watch says in the course of the run."""
    watch = Watch(run, said=said)
    return [finding for done in range(len(rows) + 1) for finding in watch.look(rows[:done])]


def losses_of(rows: list[Row], *looks: tuple[int, float], **more: float) -> list[Row]:
    """The rows with a held-out loss after some steps."""
    extra = {"eval/loss": 0.0} | {_key(name): value for name, value in more.items()}
    return [row | (extra | {"eval/loss": dict(looks)[int(row["step"])]} if row["step"] in dict(looks) else {}) for row in rows]


def margins_of(rows: list[Row], *looks: tuple[int, float]) -> list[Row]:
    """The rows with a held-out margin after some steps, at a held-out loss that stays."""
    extra = {"eval/loss": 0.6, "eval/rewards/accuracy": 0.6}
    return [row | (extra | {"eval/rewards/margin": dict(looks)[int(row["step"])]} if row["step"] in dict(looks) else {}) for row in rows]


def second_epoch(num: int, **figures: float | Callable[[int], float]) -> list[Row]:
    """Rows in which the training loss and the accuracy get better all the time."""
    better: dict[str, Any] = {"loss": lambda step: 0.7 - step / 400, "rewards_accuracy": lambda step: min(1.0, 0.5 + step / 200)}
    better |= {"rewards_margin": lambda step: step / 100}
    return steps(num, **better | figures)


TWICE = held_out(100, num_train=800)
"""A run of two epochs, of 50 steps each."""

CASES: list[tuple[str, Case, Case]] = [
    ("learning_rate", (dpo(learning_rate=5e-5), []), (dpo(learning_rate=5.1e-5), [])),
    ("learning_rate", (dpo(learning_rate=5.1e-7), []), (dpo(learning_rate=5e-7), [])),
    ("learning_rate", (sft(learning_rate=5e-5), []), (sft(learning_rate=2e-4), [])),
    ("beta", (dpo(more={"beta": 0.5}), []), (dpo(more={"beta": 0.51}), [])),
    ("beta", (dpo(more={"beta": 0.01}), []), (dpo(more={"beta": 0.009}), [])),
    ("start_difference", (dpo(start_difference=0.03), []), (dpo(start_difference=0.031), [])),
    (
        "start_difference",
        (dpo(start_difference=0.0, reference_is_start=False, more={"reference": "other"}), []),
        (dpo(start_difference=0.2, reference_is_start=False, more={"reference": "other"}), []),
    ),
    ("start_difference", (dpo(reference_is_start=False), []), (dpo(start_difference=0.2, reference_is_start=False), [])),
    (
        "untrained_reference",
        (held_out(before=BEFORE | {"eval/logps/chosen": -199.0}), []),
        (held_out(before=BEFORE | {"eval/logps/chosen": -200.0}), []),
    ),
    ("untrained_reference", (dpo(), steps(1, logps_chosen=-199.0)), (dpo(), steps(1, logps_chosen=-200.0))),
    (
        "untrained_reference",
        (dpo(before=SAMPLED | {"samples/ended": 0.0}, more={"samples": 4, "sample_tokens": 119}), []),
        (dpo(before=SAMPLED | {"samples/ended": 0.0}, more={"samples": 4, "sample_tokens": 120}), []),
    ),
    ("few_steps", (dpo(num_steps=10), []), (dpo(num_steps=9), [])),
    ("diverged", (dpo(), steps(40, loss=lambda s: 0.6 if s == 1 else 0.65)), (dpo(), steps(40, loss=lambda s: 0.6 if s == 1 else 0.67))),
    ("diverged", (sft(), demonstrations(40, loss=lambda s: 2.0 + 0.4 * (s > 5))), (sft(), demonstrations(40, loss=lambda s: 2.0 + 0.6 * (s > 5)))),
    (
        "loss_spike",
        (sft(), demonstrations(60, loss=lambda s: 1.0 + 0.3 * (s in (40, 41)))),
        (sft(), demonstrations(60, loss=lambda s: 1.0 + 0.21 * (s in (40, 41, 42)))),
    ),
    ("gradient_spike", (dpo(), steps(60, grad_norm=lambda s: 10.0 if s == 40 else 1.0)), (dpo(), steps(60, grad_norm=lambda s: 10.1 if s == 40 else 1.0))),
    (
        "no_progress",
        (dpo(), steps(60, kl=0.011, rewards_margin=0.001)),
        (dpo(), steps(60, kl=0.009, rewards_margin=0.001)),
    ),
    ("no_progress", (dpo(), steps(60, kl=0.009, rewards_margin=0.016)), (dpo(), steps(60, kl=0.009, rewards_margin=-0.014))),
    ("no_progress", (sft(), demonstrations(60, loss=lambda s: 2.0 - 0.03 * (s > 30))), (sft(), demonstrations(60, loss=lambda s: 2.0 - 0.01 * (s > 30)))),
    (
        "no_progress",
        (sft(before={"eval/loss": 2.0}), losses_of(demonstrations(60), (60, 1.97))),
        (sft(before={"eval/loss": 2.0}), losses_of(demonstrations(60), (60, 1.99))),
    ),
    ("accuracy_near_half", (dpo(), steps(56, rewards_accuracy=0.51)), (dpo(), steps(56, rewards_accuracy=0.5))),
    ("too_easy", (dpo(), steps(20, rewards_accuracy=0.97)), (dpo(), steps(20, rewards_accuracy=0.985))),
    (
        "by_heart",
        (dpo(num_train=800), steps(90, rewards_accuracy=lambda s: 0.65 if s <= 50 else 0.83)),
        (dpo(num_train=800), steps(90, rewards_accuracy=lambda s: 0.65 if s <= 50 else 0.9)),
    ),
    ("displacement", (dpo(), steps(30, rewards_chosen=-0.39)), (dpo(), steps(30, rewards_chosen=-0.41))),
    ("displacement", (held_out(), evaluated(steps(30), eval_logps_chosen=-53.9)), (held_out(), evaluated(steps(30), eval_logps_chosen=-54.1))),
    ("kl", (dpo(), steps(30, kl=19.9)), (dpo(), steps(30, kl=20.1))),
    ("kl", (dpo(more={"kl_budget": 5.0}), steps(30, kl=4.9)), (dpo(more={"kl_budget": 5.0}), steps(30, kl=5.1))),
    ("kl", (held_out(), evaluated(steps(30), eval_kl=19.9)), (held_out(), evaluated(steps(30), eval_kl=20.1))),
    (
        "overfitting",
        (TWICE, losses_of(second_epoch(80), (40, 0.6), (60, 0.62), (70, 0.605), (80, 0.62), eval_rewards_accuracy=0.6)),
        (TWICE, losses_of(second_epoch(80), (40, 0.6), (60, 0.62), (70, 0.611), (80, 0.611), eval_rewards_accuracy=0.6)),
    ),
    (
        "overfitting",
        (TWICE, losses_of(second_epoch(80), (40, 0.6), (80, 0.649), eval_rewards_accuracy=0.6)),
        (TWICE, losses_of(second_epoch(80), (40, 0.6), (80, 0.651), eval_rewards_accuracy=0.6)),
    ),
    (
        "overfitting",
        (TWICE, losses_of(second_epoch(80), (40, 0.6), (80, 0.7), eval_rewards_accuracy=0.8)),
        (TWICE, losses_of(second_epoch(80), (40, 0.6), (80, 0.7), eval_rewards_accuracy=0.75)),
    ),
    (
        "overfitting",
        (sft(num_train=800, before={"eval/loss": 2.5}), losses_of(demonstrations(80), (40, 1.8), (70, 1.83), (80, 1.81))),
        (sft(num_train=800, before={"eval/loss": 2.5}), losses_of(demonstrations(80), (40, 1.8), (70, 1.83), (80, 1.82))),
    ),
    (
        "overfitting",
        (TWICE, margins_of(second_epoch(80), (40, 1.0), (60, 0.8), (70, 0.91), (80, 0.85))),
        (TWICE, margins_of(second_epoch(80), (40, 1.0), (60, 0.8), (70, 0.89), (80, 0.85))),
    ),
    ("lengths", (held_out(), evaluated(steps(30), samples_length=67.0)), (held_out(), evaluated(steps(30), samples_length=69.0))),
    ("lengths", (held_out(), evaluated(steps(30), samples_length=24.0)), (held_out(), evaluated(steps(30), samples_length=23.0))),
    (
        "lengths",
        (held_out(more={"samples": 4}), evaluated(steps(30), samples_length=115.0)),
        (held_out(more={"samples": 4}), evaluated(steps(30), samples_length=116.0)),
    ),
    ("endings", (held_out(), evaluated(steps(30), samples_ended=0.69)), (held_out(), evaluated(steps(30), samples_ended=0.65))),
    (
        "endings",
        (sft(before=SAMPLED, more={"samples": 4}), [*demonstrations(30)[:-1], demonstrations(30)[-1] | SAMPLED | {"samples/ended": 0.25}]),
        (sft(before=SAMPLED, more={"samples": 4}), [*demonstrations(30)[:-1], demonstrations(30)[-1] | SAMPLED | {"samples/ended": 0.0}]),
    ),
    ("repetition", (held_out(), evaluated(steps(30), samples_repetition=0.23)), (held_out(), evaluated(steps(30), samples_repetition=0.24))),
    ("entropy", (held_out(), evaluated(steps(30), samples_entropy=0.76)), (held_out(), evaluated(steps(30), samples_entropy=0.74))),
    ("entropy", (held_out(), evaluated(steps(30), samples_entropy=4.4)), (held_out(), evaluated(steps(30), samples_entropy=4.6))),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "silent", "speaking"), CASES, ids=[f"{name}-{place}" for place, (name, *_) in enumerate(CASES)])
def test_a_rule_speaks_beyond_its_threshold_and_alone(rule: str, silent: Case, speaking: Case):
    assert replay(*silent) == []
    assert [finding.rule for finding in replay(*speaking)] == [rule]


def test_every_rule_has_a_case():
    assert {rule.name for rule in RULES} == {name for name, *_ in CASES}


@pytest.mark.parametrize(("rule", "silent", "speaking"), CASES, ids=[f"{name}-{place}" for place, (name, *_) in enumerate(CASES)])
def test_findings_are_two_sentences_that_name_settings_of_the_run(rule: str, silent: Case, speaking: Case):
    run, rows = speaking
    known = {
        f"--{name.replace('_', '-')}" for name in settings_for(next(row for row in METHODS if row.name == run.method).load()).model_fields
    }
    for finding in replay(run, rows):
        for sentence in (finding.what, finding.do):
            assert sentence[0].isupper() or sentence[0] == "β"
            assert sentence.endswith(".")
            assert not re.search(r"\. [A-Z]|\n|  |None|nan", sentence), "one sentence, of figures that are there"
            assert len(sentence) < 420
            assert set(re.findall(r"--[a-z][a-z-]*", sentence)) <= known
        assert "--" in finding.do, "what to change is a setting"
        assert re.search(r"\d", finding.what), "with the figures"
        assert finding.values
        assert all(math.isfinite(value) for value in finding.values.values())
        json.dumps(finding.values)


def test_the_remedies_of_the_table_are_settings():
    known = {f"--{name.replace('_', '-')}" for row in METHODS for name in settings_for(row.load()).model_fields}
    named = {flag for rule in RULES for flag in re.findall(r"--[a-z][a-z-]*", rule.remedy + rule.speaks)}
    assert named <= known
    assert all("--" in rule.remedy for rule in RULES)


def test_the_page_has_the_table_of_the_rules():
    page = (ROOT / "docs/watch.md").read_text(encoding="utf-8")
    assert rules_table() in page, "docs/watch.md is stale: put the output of prefopt.training.watch_rules.rules_table() into it"
    assert set(re.findall(r"^### `(\w+)`", page, re.MULTILINE)) <= {rule.name for rule in RULES}


def test_a_healthy_run_hears_nothing():
    rows = losses_of(second_epoch(100), (25, 0.66), (50, 0.62), (75, 0.6), (100, 0.598), eval_rewards_accuracy=0.8)
    assert replay(TWICE, rows) == []
    assert replay(sft(), demonstrations(100)) == []


def test_each_thing_is_said_once_and_not_again_after_a_resume():
    run, rows = dpo(), steps(60, kl=25.0)
    assert [(finding.rule, finding.step) for finding in replay(run, rows)] == [("kl", 5)]
    assert replay(run, rows, said=["kl"]) == []
    resumed = Watch(run)
    assert [finding.rule for finding in resumed.look(rows[:30])] == ["kl"]
    assert resumed.look(rows[:30]) == resumed.look(rows[:31]) == []


def test_a_resumed_watch_knows_the_evaluations_before():
    run, rows = TWICE, losses_of(second_epoch(80), (40, 0.6), (70, 0.62), (80, 0.62), eval_rewards_accuracy=0.6)
    resumed = Watch(run)
    assert resumed.look(rows[:75]) == []
    found = [finding for done in range(76, 81) for finding in resumed.look(rows[:done])]
    assert [(finding.rule, finding.values["best_step"]) for finding in found] == [("overfitting", 40)]


def test_sft_never_hears_what_holds_for_pairs_only():
    """Whatever its figures: a model that learns to answer changes lengths and entropy, and has no reference."""
    broken = {"samples/length": 4.0, "samples/ended": 1.0, "samples/repetition": 0.05, "samples/entropy": 0.01, "eval/loss": 1.0}
    rows = demonstrations(60, kl=500.0)
    rows[-1] |= broken | {"eval/logps/chosen": -500.0}
    run = sft(before=SAMPLED | {"eval/loss": 2.0, "eval/logps/chosen": -400.0}, data=HELD_OUT, more={"samples": 16, "sample_tokens": 128})
    assert replay(run, rows) == []


def test_first_steps_do_not_count():
    """Before half of the run, in the first steps of a window, or with few pairs, some rules cannot know yet."""
    assert replay(dpo(), steps(54, kl=0.0, rewards_margin=0.0)) == []
    assert replay(dpo(), steps(54, rewards_accuracy=0.5)) == []
    assert replay(dpo(more={"batch_size": 2}), steps(100, rewards_accuracy=0.5)) == [], "100 pairs can be half right by chance"
    assert replay(dpo(), steps(4, kl=50.0, rewards_chosen=-50.0)) == []
    assert replay(dpo(), steps(12, rewards_accuracy=1.0)) == [], "192 pairs"


def test_in_the_first_epoch_nothing_is_known_by_heart():
    rows = losses_of(second_epoch(100), (40, 0.6), (60, 0.7), (100, 0.8), eval_rewards_accuracy=0.4)
    assert replay(held_out(100), rows) == []


def test_a_rise_of_both_losses_is_not_overfitting():
    rows = losses_of(second_epoch(80, loss=lambda step: 0.6 + step / 2000), (40, 0.6), (80, 0.7), eval_rewards_accuracy=0.4)
    assert replay(TWICE, rows) == []


def test_spread_out_gradients_are_not_spikes():
    norms = lambda step: 10 ** random.Random(step).gauss(0, 0.5)  # noqa: E731 (a figure of the rows)
    assert replay(dpo(num_steps=1000), steps(1000, grad_norm=norms)) == []
    falling = lambda step: 5.0 if step < 30 else 12.0 if step == 100 else 1.0  # noqa: E731
    assert replay(dpo(num_steps=150), steps(150, grad_norm=falling)) == [], "not beyond the first gradients"


def test_the_budget_grows_with_the_answers():
    long = dpo(data={"num_held_out": 0, "summary": {"mean_chosen": 1000.0}})
    assert replay(long, steps(30, kl=99.0, logps_chosen=-1000.0)) == []
    assert [finding.values["budget"] for finding in replay(long, steps(30, kl=101.0, logps_chosen=-1000.0))] == [100.0]


def test_severity_follows_the_fall():
    (note,) = replay(dpo(), steps(30, rewards_chosen=-0.5))
    (warning,) = replay(dpo(), steps(30, rewards_chosen=-1.3))
    assert (note.severity, warning.severity) == ("note", "warning")
    assert warning.values == pytest.approx({"chosen": -13.0, "rejected": -1.0, "per_token": -13 / 40})


def test_distance_from_another_reference_is_no_drift():
    run = dpo(start_difference=0.0, reference_is_start=False, more={"reference": "other"})
    assert replay(run, steps(30, rewards_chosen=-20.0, kl=300.0)) == []
    assert [finding.rule for finding in replay(dpo(more={"kl_budget": 10.0}, reference_is_start=False), steps(30, kl=300.0))] == ["kl"]


def test_bounds_are_those_that_they_speak_of():
    assert max(SAME_FUNCTION.values()) == SAME_START
    low, high = DPO.usual["beta"]
    assert f"{low:g}-" in str(DPOSettings.model_fields["beta"].description)
    assert f"above {high:g}" in str(DPOSettings.model_fields["beta"].description)
    assert low <= DPOSettings().beta <= high


FIGURE = st.one_of(st.floats(), st.sampled_from([0.0, 1.0, -1.0, 1e300, -1e300, 1e-300]))
NAMES = sorted(set(steps(1)[0]) | BEFORE.keys() | SAMPLED.keys())


@settings(max_examples=100)
@given(
    st.lists(st.dictionaries(st.sampled_from(NAMES), FIGURE), max_size=30),
    st.dictionaries(st.sampled_from(NAMES), FIGURE),
    st.sampled_from([dpo, sft, held_out]),
    st.integers(1, 40),
    st.integers(1, 1000),
)
def test_whatever_the_figures_the_run_goes_on(
    rows: list[Row], before: Row, make: Callable[..., WatchedRun], num_steps: int, num_train: int
):
    """A watch that raises would end a run of days. Figures may be missing, huge, or not finite."""
    for finding in replay(make(num_steps=num_steps, before=before, num_train=num_train), rows):
        assert finding.what
        assert finding.do


class Counting(list[Row]):
    """Counts the rows that are looked at."""

    looked_at = 0

    def __getitem__(self, place: Any) -> Any:
        found = super().__getitem__(place)
        self.looked_at += len(found) if isinstance(place, slice) else 1
        return found

    def __iter__(self) -> Any:
        raise AssertionError("a look must not walk through all rows")


def test_a_look_stays_cheap_however_long_the_run():
    run = held_out(20_000, num_train=100_000)
    rows = Counting(losses_of(second_epoch(10_000, rewards_accuracy=0.7, loss=0.5), *((step, 0.6) for step in range(100, 10_001, 100))))
    watch = Watch(run)
    watch.look(rows)
    seconds = []
    for step in range(10_001, 10_101):
        rows.append(steps(1, loss=0.4)[0] | {"step": step})
        rows.looked_at = 0
        began = time.perf_counter()
        assert watch.look(rows) == []
        seconds.append(time.perf_counter() - began)
        assert rows.looked_at < 1000
    assert min(seconds) < 1e-3
