"""A run's folder, read: of any age, in any state, with files that are missing, broken or half written."""

import json
from pathlib import Path

import pytest
from tests.report.made import make_run

from prefopt.errors import ConfigError
from prefopt.report.metrics import read_metrics
from prefopt.report.record import read_run


def folder_with(path: Path, metrics: str) -> Path:
    path.mkdir()
    (path / "metrics.jsonl").write_text(metrics)
    return path


def test_metrics_are_columns_and_the_newest_row(tmp_path: Path):
    rows = [{"step": 1, "loss": 0.7}, {"step": 2, "loss": 0.6, "eval/loss": 0.65}, {"step": 3, "loss": 0.5}]
    metrics = read_metrics(folder_with(tmp_path / "run", "".join(json.dumps(row) + "\n" for row in rows)) / "metrics.jsonl")
    assert list(metrics.curve("loss").steps) == [1, 2, 3]
    assert list(metrics.curve("loss").values) == [0.7, 0.6, 0.5]
    assert list(metrics.curve("eval/loss").steps) == [2]
    assert (metrics.last_step, metrics.num_rows, metrics.num_unread) == (3, 3, 0)
    assert metrics.newest("eval/loss") == 0.65
    assert metrics.newest("kl") is None
    assert len(metrics.curve("kl")) == 0


def test_a_line_that_is_being_written_is_passed_over_and_a_broken_one_counted(tmp_path: Path):
    text = '{"step": 1, "loss": 0.7}\n{"step": 2, "lo\n[1]\n\n{"step": 3, "loss": 0.5}\n{"step": 4, "lo'
    metrics = read_metrics(folder_with(tmp_path / "run", text) / "metrics.jsonl")
    assert list(metrics.curve("loss").steps) == [1, 3]
    assert metrics.num_unread == 2


def test_figures_that_are_not_finite_are_gaps(tmp_path: Path):
    text = '{"step": 1, "loss": NaN, "kl": 1.0}\n{"step": 2, "loss": null, "kl": Infinity}\n{"step": 3, "loss": 0.5, "kl": "x"}\n'
    metrics = read_metrics(folder_with(tmp_path / "run", text) / "metrics.jsonl")
    assert list(metrics.curve("loss").steps) == [3]
    assert list(metrics.curve("kl").steps) == [1]
    assert metrics.num_rows == 3


def test_a_folder_of_an_old_version_is_a_run(tmp_path: Path):
    run = make_run(tmp_path / "run")
    for name in ("manifest.json", "status.json", "held_out.jsonl", "samples.jsonl"):
        (run / name).unlink()
    record = read_run(run)
    assert (record.method, record.model_name, record.num_held_out) == ("dpo", "/home/somebody/models/qwen-small", 60)
    assert record.settings["beta"] == 0.1
    assert record.held_out == ()
    assert record.held_out_figures(before=True)["rewards/accuracy"] == 0.5


@pytest.mark.parametrize("broken", ["", "{", "[]", "null", '{"data": 3, "settings": [], "model": "x", "environment": null, "resolved": 1}'])
def test_files_that_hold_something_else_are_as_if_they_were_not_there(tmp_path: Path, broken: str):
    run = make_run(tmp_path / "run")
    for name in ("manifest.json", "status.json", "summary.json", "held_out.jsonl", "samples.jsonl", "watch.jsonl", "metrics.jsonl"):
        (run / name).write_text(broken)
    (run / "config.yaml").write_text("- [")
    record = read_run(run)
    assert dict(record.settings) == {}
    assert record.metrics.last_step == 0 or broken.startswith('{"data')
    assert record.num_held_out == len(record.held_out)


def test_lines_with_other_types_are_read_as_far_as_they_go(tmp_path: Path):
    run = make_run(tmp_path / "run", num_held_out=3)
    line = {
        "row": 7,
        "prompt": None,
        "completions": "x",
        "lengths": [1, None],
        "weight": "w",
        "before": [],
        "after": {"kl": "a", "loss": 1},
    }
    (run / "held_out.jsonl").write_text(json.dumps(line) + "\n")
    (run / "samples.jsonl").write_text('{"step": "x", "ended": 1, "num_tokens": NaN}\n')
    (run / "watch.jsonl").write_text('{"severity": 3, "step": null}\n')
    record = read_run(run)
    example = record.held_out[0]
    assert (example.row, example.completions, example.lengths, example.weight) == ("7", (), (1.0, 0.0), 1.0)
    assert example.after == {"loss": 1.0}
    assert (record.answers[0].step, record.answers[0].ended, record.answers[0].num_tokens) == (0, None, None)
    assert (record.findings[0].is_warning, record.findings[0].step) == (False, 0)


def test_the_evaluation_before_training_is_no_evaluation_after_it(tmp_path: Path):
    run = make_run(tmp_path / "run", state="running", done=5)
    lines = [json.loads(line) for line in (run / "held_out.jsonl").read_text().splitlines()]
    # As the run writes them before its first step: both sides hold the same.
    (run / "held_out.jsonl").write_text("".join(json.dumps({**line, "step": 0, "after": line["before"]}) + "\n" for line in lines))
    record = read_run(run)
    assert record.held_out_step is None
    assert record.held_out_figures(before=True)["rewards/accuracy"] == 0.5
    assert "rewards/accuracy" not in record.held_out_figures(before=False)


def test_the_newest_figures_are_those_of_the_saved_model(tmp_path: Path):
    run = make_run(tmp_path / "run")
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"model_step": 40, "after": {"eval/loss": 0.61}}))
    record = read_run(run)
    assert record.model_step == 40
    assert record.held_out_figures(before=False)["loss"] == 0.61


def test_figures_before_training_come_from_the_checkpoint_while_the_run_goes(tmp_path: Path):
    run = make_run(tmp_path / "run", state="stopped", done=50)
    opening = {"opening": {"before": {"eval/loss": 0.6931}}}
    (run / "checkpoints" / "step-000050" / "state.json").write_text(json.dumps(opening))
    assert read_run(run).held_out_figures(before=True)["loss"] == 0.6931


def test_means_over_held_out_examples_go_by_weight(tmp_path: Path):
    run = make_run(tmp_path / "run", state="running", done=20, num_held_out=2)
    lines = [
        {"row": "a", "step": 20, "weight": 3.0, "before": {"kl": 0.0}, "after": {"kl": 1.0}},
        {"row": "b", "step": 20, "weight": 1.0, "before": {"kl": 0.4}, "after": {"kl": 5.0}},
    ]
    (run / "held_out.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_run(run).held_out_figures(before=True)["kl"] == pytest.approx(0.1)


def test_a_path_that_is_no_run_says_what_to_give(tmp_path: Path):
    run = make_run(tmp_path / "runs" / "first")
    make_run(tmp_path / "runs" / "second")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("x")
    give = "Give the folder that a run was given as out."
    for path, says in (
        (tmp_path / "none", f"there is no folder {tmp_path / 'none'}. {give}"),
        (tmp_path / "file.txt", f"{tmp_path / 'file.txt'} is a file. {give}"),
        (run / "summary.json", f"{run / 'summary.json'} is part of the run {run}. Give that."),
        (run / "model", f"{run / 'model'} is part of the run {run}. Give that."),
        (tmp_path / "runs", f"{tmp_path / 'runs'} holds no run itself, but runs: first, second. Give one of them, as {run}."),
        (tmp_path / "empty", f"{tmp_path / 'empty'} holds no run: there is no config.yaml, manifest.json or metrics.jsonl in it. {give}"),
        (tmp_path / ("x" * 5000), "File name too long"),
    ):
        with pytest.raises(ConfigError) as error:
            read_run(path)
        assert says in str(error.value)
