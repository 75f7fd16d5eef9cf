"""Which findings come first, and which are no longer true of the model that a run leaves."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from tests.report.made import make_run

from prefopt.report.card import model_card
from prefopt.report.figures import Change, changes
from prefopt.report.findings import RANKS, by_rank, passed
from prefopt.report.page import report_html
from prefopt.report.record import read_run
from prefopt.report.state import RunState
from prefopt.report.verdict import Verdict, verdict
from prefopt.training.watching.rules import RULES


def finding(rule: str, step: int = 40, severity: str = "warning", **values: float) -> dict[str, Any]:
    """A line of the watch; what to do names the rule."""
    return {"rule": rule, "step": step, "severity": severity, "what": f"It is {rule}.", "do": f"Mend {rule}.", "values": values}


def run_with(folder: Path, *findings: dict[str, Any], after: Mapping[str, float] = {}, **summary: Any) -> Path:
    """A finished run of 120 steps with these findings, and other figures at its end."""
    run = make_run(folder, findings=findings)
    found = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**found, **summary, "after": {**found["after"], **after}}))
    return run


def verdict_of(run: Path, state: str = "finished") -> Verdict:
    return verdict(read_run(run), RunState(state, 120, 120))  # type: ignore[arg-type]


def test_every_rule_has_a_rank():
    assert sorted(RANKS) == sorted(rule.name for rule in RULES)


def test_broken_answers_come_before_all_else_whenever_they_were_found(tmp_path: Path):
    order = ["learning_rate", "unheard_of", "displacement", "kl", "lengths", "entropy", "endings"]
    record = read_run(run_with(tmp_path / "run", *(finding(rule, step) for step, rule in enumerate(order))))
    expected = ["endings", "entropy", "kl", "displacement", "lengths", "learning_rate", "unheard_of"]
    assert [found.rule for found in by_rank(record.findings)] == expected


@pytest.mark.parametrize("rule", ["endings", "repetition", "entropy"])
def test_a_page_about_broken_answers_is_not_headed_by_what_was_learned(tmp_path: Path, rule: str):
    found = verdict_of(run_with(tmp_path / "run", finding("displacement", 20), finding("kl", 20), finding(rule, 30)))
    assert (found.headline, found.tone) == ("Its own answers suffered from training, with 3 warnings", "bad")
    assert found.advice == f"Do not rely on it (the watch: `{rule}`): mend {rule}."
    going = verdict_of(run_with(tmp_path / "going", finding(rule, 30)), "running")
    assert going.headline == "Still training: step 120 of 120"


CASES: list[tuple[str, dict[str, float], dict[str, Change], dict[str, Change]]] = [
    ("lengths", {"before": 73, "now": 24, "limit": 25}, {"samples/length": Change("", 73, 47.7)}, {"samples/length": Change("", 73, 25)}),
    ("lengths", {"before": 20, "now": 80, "limit": 58}, {"samples/length": Change("", 20, 57)}, {"samples/length": Change("", 20, 59)}),
    ("endings", {"before": 1, "now": 0, "limit": 0.1}, {"samples/ended": Change("", 1, 0.25)}, {"samples/ended": Change("", 1, 0)}),
    (
        "repetition",
        {"before": 0.1, "now": 0.9, "limit": 0.5},
        {"samples/repetition": Change("", 0.1, 0.4)},
        {"samples/repetition": Change("", 0.1, 0.6)},
    ),
    ("entropy", {"before": 1, "now": 0.1, "limit": 0.5}, {"samples/entropy": Change("", 1, 0.8)}, {"samples/entropy": Change("", 1, 0.4)}),
    ("entropy", {"before": 1, "now": 5, "limit": 3}, {"samples/entropy": Change("", 1, 2)}, {"samples/entropy": Change("", 1, 4)}),
    ("kl", {"kl": 46, "budget": 20}, {"kl": Change("", 0, 46), "samples/kl": Change("", 0, 0.01)}, {"kl": Change("", 0, 21)}),
    ("displacement", {"chosen": -9, "limit": -4}, {"logps/chosen": Change("", -50, -53)}, {"logps/chosen": Change("", -50, -55)}),
    ("overfitting", {"best": 0.5, "now": 0.6, "limit": 0.51}, {"loss": Change("", 0.69, 0.505)}, {"loss": Change("", 0.69, 0.52)}),
    ("overfitting", {"best": 1, "now": 0.5, "limit": 0.9}, {"rewards/margin": Change("", 0, 0.95)}, {"rewards/margin": Change("", 0, 0.8)}),
]
"""A rule, what it noted, figures at the end that it would not speak of, and some that it would."""


@pytest.mark.parametrize(("rule", "values", "well", "ill"), CASES)
def test_what_is_no_longer_so_at_the_end_has_passed(
    tmp_path: Path, rule: str, values: dict[str, float], well: dict[str, Change], ill: dict[str, Change]
):
    record = read_run(run_with(tmp_path / "run", finding(rule, **values)))
    (found,) = record.findings
    assert passed(found, record, well) == "At the last evaluation this was no longer so."
    assert passed(found, record, ill) == passed(found, record, {}) == ""


def test_what_cannot_be_looked_at_again_holds(tmp_path: Path):
    run = run_with(tmp_path / "run", finding("diverged", first=0.7, now=2.0), finding("lengths", before=70.0, now=20.0))
    record = read_run(run)
    assert [passed(found, record, changes(record)) for found in record.findings] == ["", ""], "the second is of an older version"


def test_what_came_after_the_saved_model_is_not_held_against_it(tmp_path: Path):
    record = read_run(run_with(tmp_path / "run", finding("diverged", 90), finding("kl", 80, kl=30.0, budget=1.0), model_step=80))
    assert [passed(found, record, changes(record)) for found in record.findings] == [
        "The model is that of step 80, from before this.",
        "",
    ]


def test_what_has_passed_is_said_on_the_page_and_left_out_of_the_verdict(tmp_path: Path):
    recovered = finding("lengths", 18, before=73.0, now=24.0, limit=25.0)
    run = run_with(tmp_path / "run", recovered, after={"samples/length": 47.7})
    found = verdict_of(run)
    assert (found.headline, found.tone) == ("It learned what it was shown", "good")
    assert found.advice.startswith("What the watch warned of on the way has passed; read the answers below")
    assert "what the watch warned of has passed" in verdict_of(run, "running").advice
    page = report_html(run, now=datetime.now(UTC))
    assert page.count("At the last evaluation this was no longer so.") == 1
    assert "It is lengths. At the last evaluation this was no longer so. *Mend lengths.*" in model_card(run)
    still = verdict_of(run_with(tmp_path / "still", recovered, finding("kl"), after={"samples/length": 47.7}))
    assert still.headline == "It learned what it was shown, with 1 warning"
    assert still.advice == "Before you rely on it, see to what the watch warns of: mend kl."
