"""Pages of runs that did run: the files that training writes are those that the report reads."""

import re
from collections.abc import Callable
from datetime import UTC, datetime
from html import unescape
from pathlib import Path

import pytest
from tests.training.runs import pair_rows, run, write_rows

from prefopt.errors import RunError
from prefopt.report.page import report_html
from prefopt.report.record import read_run
from prefopt.report.state import process_is_alive, run_state


def text_of(folder: Path) -> str:
    """What the page says, without elements and style."""
    raw = re.sub(r"<style>.*?</style>|<svg.*?</svg>", " ", report_html(folder, now=datetime.now(UTC)), flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", raw)).replace("\u00a0", " ").split())


def test_a_run_on_pairs(tmp_path: Path, model_folder: Callable[..., Path]):
    data = write_rows(tmp_path / "pairs.jsonl", pair_rows(24))
    folder = run("dpo", model_folder(), data, tmp_path / "run", eval_fraction=0.3, eval_every_steps=2, samples=2, sample_tokens=8).folder
    record = read_run(folder)
    assert run_state(record, now=datetime.now(UTC), is_alive=process_is_alive).name == "finished"
    assert len(record.held_out) == record.num_held_out > 1
    assert record.held_out_step == record.metrics.last_step == record.model_step
    margins = [example.after["rewards/margin"] for example in record.held_out]
    assert sum(margins) / len(margins) == pytest.approx(record.held_out_figures(before=False)["rewards/margin"])
    assert {answer.step for answer in record.answers} >= {0, 2, record.metrics.last_step}
    text = text_of(folder)
    assert f"Of {record.num_held_out} held-out pairs the chosen answer now has the higher reward in" in text
    assert "Learned best: largest margin" in text
    assert "Before training: the reference" in text
    assert "Is number" in text
    assert "rows read 24" in text
    assert "could not be read" not in text


def test_a_run_on_demonstrations_with_nothing_held_out(tmp_path: Path, model_folder: Callable[..., Path]):
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pair_rows()]
    data = write_rows(tmp_path / "demonstrations.jsonl", rows)
    folder = run("sft", model_folder(), data, tmp_path / "run", samples=1, sample_tokens=4).folder
    text = text_of(folder)
    assert re.match(r"SFT: llama-\S+ on demonstrations.jsonl", text)  # the folder that holds the model's
    assert "Nothing was held out, so these figures cannot say" in text
    assert "prompts of the training data (nothing was held out)" in text


def test_a_run_that_failed(tmp_path: Path, model_folder: Callable[..., Path]):
    data = write_rows(tmp_path / "pairs.jsonl", pair_rows())
    with pytest.raises(RunError):
        run("dpo", model_folder(), data, tmp_path / "run", learning_rate=1e18, max_grad_norm=1e30, warmup_ratio=0.0)
    text = text_of(tmp_path / "run")
    assert "Failed after step" in text
    assert "How it ended" in text
    assert "nan" in text
    assert re.search(r"The examples of the step that failed \(4 examples\) pairs.jsonl:\d+ loss nan", text)
    assert "--resume" in text
