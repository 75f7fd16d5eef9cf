"""Runs on several sources with weights: what an epoch takes, and that a run which goes on takes the same."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.training.runs import Asks, figures, pair_rows, run, weights, write_rows

from prefopt.errors import DataError, RunError
from prefopt.training.order import DataOrder


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    """Eight pairs in one file, and twenty others in another."""
    rows = pair_rows(28)
    return write_rows(tmp_path / "first.jsonl", rows[:8]), write_rows(tmp_path / "second.jsonl", rows[8:])


def test_weights_say_how_often_an_epoch_takes_an_example(
    model_folder: Callable[..., Path], files: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    taken: list[int] = []
    examples = DataOrder.examples
    monkeypatch.setattr(DataOrder, "examples", lambda self, step: (found := examples(self, step), taken.extend(found.tolist()))[0])
    first, second = files
    narrator = Asks(lambda done: None)
    run("dpo", model_folder(), [first, f"{second}:0.2"], tmp_path / "run", narrator=narrator, batch_size=12, epochs=1)  # type: ignore[arg-type]
    assert "first.jsonl: 8 examples to train on, each 1 times in an epoch: 67% of it" in narrator.said
    assert "second.jsonl: 20 examples to train on, each 0.2 times in an epoch: 33% of it" in narrator.said
    assert len(figures(tmp_path / "run")) == 1
    (of_first, of_second) = sorted(taken[-12:])[:8], sorted(taken[-12:])[8:]
    assert of_first == list(range(8))
    assert len(set(of_second)) == 4
    assert min(of_second) >= 8


def test_a_run_that_goes_on_takes_what_it_would_have_taken(model_folder: Callable[..., Path], files: tuple[str, str], tmp_path: Path):
    first, second = files
    model = model_folder()
    given: dict[str, Any] = {"save_every_steps": 1, "batch_size": 4, "epochs": 2}
    data: Any = [{"path": first, "weight": 1.5}, f"{second}:0.3"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"

    def at(done: int) -> None:
        if done == 5:
            shutil.copytree(whole, killed, ignore=shutil.ignore_patterns(".lock"))

    run("dpo", model, data, whole, narrator=Asks(at), **given)
    run("dpo", model, data, killed, resume=True, **given)
    assert figures(killed) == figures(whole)
    assert len(figures(whole)) == 2 * (12 + 6) // 4
    assert weights(killed) == weights(whole)
    again = tmp_path / "again"
    shutil.copytree(killed, again)
    with pytest.raises(RunError, match="data"):
        run("dpo", model, [first, f"{second}:0.3"], again, resume=True, **(given | {"epochs": 2}))  # type: ignore[arg-type]
    manifest = json.loads((whole / "manifest.json").read_text())
    assert manifest["settings"]["data"] == [f"{first}:1.5", f"{second}:0.3"]


def test_held_out_examples_have_no_weights(model_folder: Callable[..., Path], files: tuple[str, str], tmp_path: Path):
    first, second = files
    with pytest.raises(DataError, match=r"eval_data: second.jsonl has a weight"):
        run("dpo", model_folder(), first, tmp_path / "run", eval_data=[f"{second}:0.5"])
