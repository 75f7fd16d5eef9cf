"""Held-out figures before and after, and how sure they are."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from tests.report.made import make_run

from prefopt.report.figures import METRICS, Change, changes, standard_error
from prefopt.report.record import read_run


def run_with(path: Path, lines: list[dict[str, Any]], **summary: Any) -> Path:
    run = make_run(path, num_held_out=len(lines))
    (run / "held_out.jsonl").write_text("".join(json.dumps({"step": 120, "weight": 1.0, **line}) + "\n" for line in lines))
    known = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(known | summary))
    return run


def test_the_error_of_a_mean_is_the_deviation_over_the_root_of_the_number():
    # 1, 2, 3, 4: variance 5/3 with n - 1, so the error is √(5/12).
    assert standard_error([(value, 1.0) for value in (1.0, 2.0, 3.0, 4.0)]) == pytest.approx(math.sqrt(5 / 12))


def test_weights_are_only_relative_and_unequal_ones_make_the_error_larger():
    values = (1.0, 2.0, 3.0, 4.0)
    assert standard_error([(value, 7.0) for value in values]) == pytest.approx(math.sqrt(5 / 12))
    # Effective number (1+1+1+9)²/(1+1+1+81) = 12/7; mean 3.5, weighted variance 11/12; √(11/12 / (12/7 − 1)).
    assert standard_error(list(zip(values, (1.0, 1.0, 1.0, 9.0), strict=True))) == pytest.approx(math.sqrt(11 / 12 / (12 / 7 - 1)))


def test_the_error_is_unknown_below_two_examples_and_zero_where_all_are_the_same():
    assert standard_error([]) is None
    assert standard_error([(1.0, 1.0)]) is None
    assert standard_error([(1.0, 1.0), (2.0, 0.001)]) is None
    assert standard_error([(0.1 + 0.2, 1.0), (0.3, 1.0), (0.3, 1.0)]) == 0.0


def test_changes_are_paired_by_example(tmp_path: Path):
    lines = [{"row": str(place), "before": {"kl": 10.0 * place}, "after": {"kl": 10.0 * place + 1.0 + 0.1 * place}} for place in range(4)]
    change = changes(read_run(run_with(tmp_path / "run", lines, after={"eval/kl": 16.15}, before={"eval/kl": 15.0})))["kl"]
    # After: 1, 11.1, 21.2, 31.3, so 10.1 times 0 to 3, with an error of √(5/12) of these; the differences are 1 to 1.3.
    assert change.error == pytest.approx(10.1 * math.sqrt(5 / 12))
    assert change.change_error == pytest.approx(0.1 * math.sqrt(5 / 12))
    assert change.errors_away == pytest.approx(1.15 / (0.1 * math.sqrt(5 / 12)))


def test_an_accuracy_without_its_examples_has_the_error_of_a_share(tmp_path: Path):
    run = make_run(tmp_path / "run", num_held_out=100)
    (run / "held_out.jsonl").unlink()
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"after": {"eval/rewards/accuracy": 0.8, "eval/rewards/margin": 0.5}}))
    found = changes(read_run(run))
    assert found["rewards/accuracy"].error == pytest.approx(0.04)  # √(0.8 · 0.2 / 100)
    assert found["rewards/accuracy"].errors_away == pytest.approx(0.3 / 0.04)
    assert found["rewards/margin"].error is None
    assert found["rewards/margin"].errors_away is None
    assert found["loss"].after is None


def test_a_perfect_accuracy_is_not_certain(tmp_path: Path):
    lines = [{"row": str(place), "before": {"rewards/accuracy": 0.5}, "after": {"rewards/accuracy": 1.0}} for place in range(8)]
    run = run_with(tmp_path / "run", lines, after={"eval/rewards/accuracy": 1.0})
    change = changes(read_run(run))["rewards/accuracy"]
    assert change.error == pytest.approx(math.sqrt(0.9 * 0.1 / 8))  # of 9 in 10
    assert change.errors_away == pytest.approx(0.5 / change.error)


def test_examples_of_another_step_than_the_models_say_nothing_of_its_error(tmp_path: Path):
    run = make_run(tmp_path / "run")
    assert changes(read_run(run))["rewards/margin"].error is not None
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"model_step": 40}))
    assert changes(read_run(run))["rewards/margin"].error is None


def test_figures_come_in_the_order_of_the_table_and_unknown_ones_after_them(tmp_path: Path):
    run = make_run(tmp_path / "run")
    rows = (run / "metrics.jsonl").read_text().splitlines()
    rows[-1] = json.dumps(json.loads(rows[-1]) | {"eval/zeal": 1.0})
    (run / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    (run / "summary.json").unlink()
    names = list(changes(read_run(run)))
    assert names == [name for name in METRICS if name in names] + ["zeal"]


def test_figures_show_with_their_unit_and_a_dash_where_there_is_none():
    change = Change("rewards/accuracy", None, 0.587, 0.037)
    assert (change.shown_before(), change.shown_after(), change.shown_error()) == ("–", "58.7\u00a0%", "3.7\u00a0%")
    assert change.difference is None
    assert change.errors_away is None
    assert Change("kl", 0.0, 1.23456, 0.004).shown_error() == "0.00"
    assert Change("zeal", 0.0, 1.0).metric.label == "zeal"
    assert Change("kl", 0.0, 1.0, 0.0, 0.0).errors_away == math.inf
