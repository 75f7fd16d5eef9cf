"""The watch's rules on made-up figures: each on both sides of its thresholds, alone, in words that hold."""

import json
import math
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prefopt.methods.dpo import DPO, DPOSettings
from prefopt.methods.table import METHODS
from prefopt.training.assemble import settings_for
from prefopt.training.references import SAME_FUNCTION
from prefopt.training.watching.rules import RULES, rules_table
from prefopt.training.watching.start import SAME_START
from prefopt.training.watching.watch import Watch
from prefopt.training.watching.watched import Finding, WatchedRun

ROOT = Path(__file__).parents[3]
Row = dict[str, float]
Case = tuple[WatchedRun, list[Row]]

DPO_SETTINGS = {"batch_size": 16, "epochs": 1.0, "beta": 0.1, "label_smoothing": 0.0, "max_grad_norm": 1.0, "warmup_ratio": 0.1}
SAMPLED = {"samples/length": 40.0, "samples/ended": 1.0, "samples/repetition": 0.05, "samples/entropy": 1.5}
BEFORE = {"eval/loss": 0.6931, "eval/rewards/margin": 0.0, "eval/rewards/accuracy": 0.5, "eval/kl": 0.0} | {
    "eval/logps/chosen": -50.0,
    "eval/logps/rejected": -55.0,
}
LENGTHS = {"mean_chosen": 40.0, "mean_rejected": 36.0}
HELD_OUT = {"num_held_out": 400, "summary": LENGTHS | {"mean_answer": 38.0}, "held_out_lengths": LENGTHS}


def dpo(*, num_steps: int = 100, more: Mapping[str, Any] = {}, **changes: Any) -> WatchedRun:
    """A run of DPO in which nothing is wrong, but for what is changed; answers have 40 tokens."""
    facts: dict[str, Any] = {
        "method": "dpo",
        "settings": DPO_SETTINGS | more,
        "learning_rate": 5e-6,
        "usual_learning_rate": 5e-6,
        "adapter": True,
        "num_train": num_steps * 16,
        "num_samples": int(more.get("samples", 0)),
        "num_steps": num_steps,
        "begins_at_reference": True,
        "start_difference": 0.0,
        "before": {},
        "data": {"num_held_out": 0, "summary": HELD_OUT["summary"]},
        "first_length": 40.0,
        "usual": {"beta": (0.01, 0.5)},
    }
    return WatchedRun(**facts | changes)


def sft(*, num_steps: int = 100, more: Mapping[str, Any] = {}, **changes: Any) -> WatchedRun:
    """The same of SFT."""
    settings = {name: value for name, value in DPO_SETTINGS.items() if name not in ("beta", "label_smoothing")} | more
    facts: dict[str, Any] = {"method": "sft", "settings": settings, "start_difference": None, "usual": {}}
    facts["num_samples"] = int(settings.get("samples", 0))
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


def other(difference: float, **changes: Any) -> Case:
    """A run whose reference is not the model that it starts from."""
    return dpo(start_difference=difference, begins_at_reference=False, **changes), []


def looked(value: float, name: str, **more: Any) -> Case:
    """A run of DPO with an evaluation after step 30, at which one figure has that value."""
    return held_out(more=more), evaluated(steps(30), **{name: value})


def unended(share: float) -> Case:
    """A run of SFT after whose step 30 that share of four samples ends."""
    rows = demonstrations(30)
    return sft(before=SAMPLED, more={"samples": 4}), [*rows[:-1], rows[-1] | SAMPLED | {"samples/ended": share}]


def fewer_ended(mean: float) -> Case:
    """A run after whose step 30 one in four of 16 samples is cut at 128 tokens: the others have 4/3·(mean − 32)."""
    rows = evaluated(steps(30), samples_length=mean, samples_ended=0.75)
    return held_out(), rows


def never_ending(limit: float) -> Case:
    """A run before which none of four answers ended within that many tokens."""
    return dpo(before=SAMPLED | {"samples/ended": 0.0}, more={"samples": 4, "sample_tokens": limit}), []


def stepping(num: int, place: int, name: str) -> Callable[[float], Case]:
    """Runs of DPO in which a figure has a value of its own at one step."""
    return lambda value: (dpo(), steps(num, **{name: lambda step: value if step == place else 1.0}))


def twice(*looks: tuple[int, float], accuracy: float = 0.6) -> Case:
    """The run of two epochs with a held-out loss after some steps."""
    return TWICE, losses_of(second_epoch(80), *looks, eval_rewards_accuracy=accuracy)


def sft_twice(*looks: tuple[int, float]) -> Case:
    return sft(num_train=800, before={"eval/loss": 2.5}), losses_of(demonstrations(80), *looks)


CASES: list[tuple[str, Callable[[float], Case], float, float]] = [
    ("learning_rate", lambda rate: (dpo(learning_rate=rate), []), 5e-5, 5.1e-5),
    ("learning_rate", lambda rate: (dpo(learning_rate=rate), []), 5.1e-7, 5e-7),
    ("learning_rate", lambda rate: (sft(learning_rate=rate), []), 5e-5, 2e-4),
    ("beta", lambda beta: (dpo(more={"beta": beta}), []), 0.5, 0.51),
    ("beta", lambda beta: (dpo(more={"beta": beta}), []), 0.01, 0.009),
    ("start_difference", lambda difference: other(difference, more={"reference": "another"}), 0.03, 0.031),
    ("start_difference", other, 0.03, 0.031),
    ("untrained_reference", lambda logps: (held_out(before=BEFORE | {"eval/logps/chosen": logps}), []), -199.0, -200.0),
    ("untrained_reference", lambda logps: (dpo(), steps(1, logps_chosen=logps)), -199.0, -200.0),
    ("untrained_reference", never_ending, 119, 120),
    ("few_steps", lambda num: (dpo(num_steps=int(num)), []), 10, 9),
    ("diverged", lambda loss: (dpo(), steps(40, loss=lambda step: 0.6 if step == 1 else loss)), 0.65, 0.67),
    ("diverged", lambda rise: (sft(), demonstrations(40, loss=lambda step: 2.0 + rise * (step > 5))), 0.4, 0.6),
    ("loss_spike", lambda num: (sft(), demonstrations(50, loss=lambda step: 1.0 + 0.3 * (40 <= step < 40 + num))), 2, 3),
    ("loss_spike", lambda rise: (sft(), demonstrations(50, loss=lambda step: 1.0 + rise * (40 <= step < 43))), 0.19, 0.21),
    ("gradient_spike", stepping(60, 40, "grad_norm"), 10.0, 10.1),
    ("no_progress", lambda kl: (dpo(), steps(60, kl=kl, rewards_margin=0.001)), 0.011, 0.009),
    ("no_progress", lambda margin: (dpo(), steps(60, kl=0.009, rewards_margin=margin)), 0.016, -0.014),
    ("no_progress", lambda fall: (sft(), demonstrations(60, loss=lambda step: 2.0 - fall * (step > 30))), 0.03, 0.01),
    ("no_progress", lambda loss: (sft(before={"eval/loss": 2.0}), losses_of(demonstrations(60), (60, loss))), 1.97, 1.99),
    ("accuracy_near_half", lambda accuracy: (dpo(), steps(56, rewards_accuracy=accuracy)), 0.51, 0.5),
    ("wrong_way", lambda accuracy: (dpo(), steps(56, rewards_accuracy=accuracy)), 0.6, 0.35),
    ("too_easy", lambda accuracy: (dpo(), steps(20, rewards_accuracy=accuracy)), 0.97, 0.985),
    ("by_heart", lambda again: (dpo(num_train=800), steps(90, rewards_accuracy=lambda step: 0.65 if step <= 50 else again)), 0.83, 0.9),
    ("displacement", lambda reward: (dpo(), steps(30, rewards_chosen=reward)), -0.39, -0.41),
    ("displacement", lambda logps: looked(logps, "eval_logps_chosen"), -53.9, -54.1),
    ("kl", lambda kl: (dpo(), steps(30, kl=kl)), 19.9, 20.1),
    ("kl", lambda kl: (dpo(more={"kl_budget": 5.0}), steps(30, kl=kl)), 4.9, 5.1),
    ("kl", lambda kl: looked(kl, "eval_kl"), 19.9, 20.1),
    ("kl", lambda kl: looked(kl, "samples_kl"), 19.9, 20.1),
    ("overfitting", lambda loss: twice((40, 0.6), (60, 0.62), (70, loss), (80, 0.62)), 0.609, 0.611),
    ("overfitting", lambda loss: twice((40, 0.6), (80, loss)), 0.649, 0.651),
    ("overfitting", lambda accuracy: twice((40, 0.6), (80, 0.7), accuracy=accuracy), 0.8, 0.75),
    ("overfitting", lambda loss: sft_twice((40, 1.8), (70, 1.83), (80, loss)), 1.81, 1.82),
    ("overfitting", lambda margin: (TWICE, margins_of(second_epoch(80), (40, 1.0), (60, 0.8), (70, margin), (80, 0.85))), 0.91, 0.89),
    ("lengths", lambda length: looked(length, "samples_length", samples=16), 67.0, 69.0),
    ("lengths", lambda length: looked(length, "samples_length", samples=16), 24.0, 23.0),
    ("lengths", lambda length: looked(length, "samples_length", samples=4), 115.0, 116.0),
    ("lengths", fewer_ended, 83.0, 88.0),
    ("endings", lambda share: looked(share, "samples_ended", samples=16), 0.69, 0.65),
    ("endings", unended, 0.25, 0.0),
    ("repetition", lambda share: looked(share, "samples_repetition", samples=16), 0.23, 0.24),
    ("repetition", lambda share: looked(share, "samples_repetition", samples=100), 0.19, 0.21),
    ("entropy", lambda entropy: looked(entropy, "samples_entropy"), 0.76, 0.74),
    ("entropy", lambda entropy: looked(entropy, "samples_entropy"), 4.4, 4.6),
    ("entropy", lambda entropy: looked(entropy, "samples_entropy", samples=2), 0.62, 0.6),
]
"""A rule, runs with a figure to choose, a value at which no rule speaks, and one at which this rule does, alone."""

NAMES_OF_CASES = [f"{rule}-{place}" for place, (rule, *_) in enumerate(CASES)]


@pytest.mark.parametrize(("rule", "make", "silent", "speaking"), CASES, ids=NAMES_OF_CASES)
def test_a_rule_speaks_beyond_its_threshold_and_alone(rule: str, make: Callable[[float], Case], silent: float, speaking: float):
    assert replay(*make(silent)) == []
    assert [finding.rule for finding in replay(*make(speaking))] == [rule]


@pytest.mark.parametrize(("rule", "make", "silent", "speaking"), CASES, ids=NAMES_OF_CASES)
def test_where_the_reference_moves_steps_are_not_compared(rule: str, make: Callable[[float], Case], silent: float, speaking: float):
    """A move of the reference changes loss, margin and accuracy at once, and rewards no longer begin at 0."""
    run, rows = make(speaking)
    moving = replace(run, settings={**run.settings, "sync_reference_every_steps": 8})
    over_steps = next(found.over_steps for found in RULES if found.name == rule)
    by_rewards = rule == "displacement" and not run.before
    assert [finding.rule for finding in replay(moving, rows)] == ([] if over_steps or by_rewards else [rule])


def test_every_rule_has_a_case():
    assert {rule.name for rule in RULES} == {name for name, *_ in CASES}


@pytest.mark.parametrize(("rule", "make", "silent", "speaking"), CASES, ids=NAMES_OF_CASES)
def test_findings_are_two_sentences_that_name_settings_of_the_run(rule: str, make: Callable[[float], Case], silent: float, speaking: float):
    run, rows = make(speaking)
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
    assert rules_table() in page, "docs/watch.md is stale: put the output of prefopt.training.watching.rules.rules_table() into it"
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


def test_the_wrong_way_has_the_remedy_of_its_loss():
    rows = steps(60, rewards_accuracy=0.2)
    [found] = replay(dpo(), rows)
    assert (found.rule, "--learning-rate" in found.do, "--beta" in found.do) == ("wrong_way", True, False)
    [found] = replay(dpo(method="discopop"), rows)
    assert (found.rule, "higher --beta (now 0.1)" in found.do) == ("wrong_way", True)
    [found] = replay(dpo(begins_at_reference=False), rows)
    assert found.rule == "accuracy_near_half", "it may have begun there"


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
    long = dpo(data={"num_held_out": 0, "summary": {"mean_chosen": 1000.0}}, first_length=1000.0)
    assert replay(long, steps(30, kl=99.0, logps_chosen=-1000.0)) == []
    assert [finding.values["budget"] for finding in replay(long, steps(30, kl=101.0, logps_chosen=-1000.0))] == [100.0]


def test_severity_follows_the_fall():
    (note,) = replay(dpo(), steps(30, rewards_chosen=-0.5))
    (warning,) = replay(dpo(), steps(30, rewards_chosen=-1.3))
    assert (note.severity, warning.severity) == ("note", "warning")
    assert warning.values == pytest.approx({"chosen": -13.0, "rejected": -1.0, "per_token": -13 / 40, "limit": -4.0})


def test_distance_from_another_reference_is_no_drift():
    run = dpo(start_difference=0.0, begins_at_reference=False, more={"reference": "other"})
    assert replay(run, steps(30, rewards_chosen=-20.0, kl=300.0)) == []
    assert [finding.rule for finding in replay(dpo(more={"kl_budget": 10.0}, begins_at_reference=False), steps(30, kl=300.0))] == ["kl"]


def test_bounds_are_those_that_they_speak_of():
    assert max(SAME_FUNCTION.values()) == SAME_START
    low, high = DPO.usual["beta"]
    assert f"{low:g}-" in str(DPOSettings.model_fields["beta"].description)
    assert f"above {high:g}" in str(DPOSettings.model_fields["beta"].description)
    assert low <= DPOSettings().beta <= high


SHARES = ("accuracy", "ended", "repetition")
EXTREMES = [0.0, 1.0, -1.0, 1e300, -1e300, 1e-300, -1e-300, 5e-324, math.inf, -math.inf, math.nan]


def any_row(draws: random.Random) -> Row:
    """Some of the figures, each a likely one or an extreme one."""
    names = [name for name in sorted(steps(1)[0] | BEFORE | SAMPLED) if name != "step" and draws.random() < 0.7]
    return {
        name: draws.choice([0.0, draws.random(), 1.0]) if name.endswith(SHARES) else draws.choice([draws.gauss(0, 1), *EXTREMES])
        for name in names
    }


@pytest.mark.parametrize("make", [dpo, sft, held_out])
def test_whatever_the_figures_the_run_goes_on(make: Callable[..., WatchedRun]):
    """A watch that raises would end a run of days. Figures may be missing, huge, or not finite."""
    for seed in range(100):
        draws = random.Random(seed)
        run = make(num_steps=draws.randint(1, 40), before=any_row(draws), num_train=draws.randint(1, 1000))
        for finding in replay(run, [{"step": step} | any_row(draws) for step in range(1, draws.randint(1, 60))]):
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
