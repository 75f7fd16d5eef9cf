"""The checkpoint of the lowest held-out loss stays, and where a run may end early its model is that one."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tests.training.crash_server import Blow, Server, flags
from tests.training.runs import Asks, figures, pair_rows, rows, run, weights, write_rows

from prefopt.errors import DataError

SETTINGS: dict[str, Any] = {"eval_fraction": 0.33, "eval_every_steps": 1, "learning_rate": 0.1, "epochs": 6}
"""A learning rate at which the held-out loss soon rises; fourteen steps."""


@pytest.fixture(scope="module")
def model(model_folder: Callable[..., Path]) -> Path:
    return model_folder()


@pytest.fixture(scope="module")
def every(model: Path, pairs: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that never ends early and keeps all its checkpoints: what the others are compared with."""
    out = tmp_path_factory.mktemp("every") / "run"
    run("dpo", model, pairs, out, save_every_steps=1, keep_checkpoints=99, **SETTINGS)
    return out


def eval_losses(out: Path) -> list[float]:
    return [row["eval/loss"] for row in rows(out)]


def checkpoints(out: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (out / "checkpoints").iterdir())


def summary_of(out: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return values


def model_is_of_step(out: Path, every: Path, step: int) -> bool:
    """Whether the saved model's weights are those of the checkpoint, bit for bit."""
    then = load_file(every / "checkpoints" / f"step-{step:06d}" / "policy.safetensors")
    saved = load_file(out / "model" / "model.safetensors")
    return len(then) == len(saved) and all(tensor.equal(saved[name.removeprefix("model.")]) for name, tensor in then.items())


def best_step(losses: list[float]) -> int:
    return 1 + losses.index(min(losses))


def end_after(losses: list[float], patience: int) -> int:
    """The step of the evaluation that is the last: so many in a row without a new lowest."""
    best, since = float("inf"), 0
    for step, loss in enumerate(losses, 1):
        best, since = (loss, 0) if loss < best else (best, since + 1)
        if since == patience:
            return step
    return len(losses)


@pytest.mark.parametrize("patience", [1, 2, 3])
def test_it_ends_when_patience_does_and_takes_the_best(model: Path, pairs: str, tmp_path: Path, every: Path, patience: int):
    out = tmp_path / "run"
    narrator = Asks(lambda done: None)
    run("dpo", model, pairs, out, early_stop=patience, keep_checkpoints=1, narrator=narrator, **SETTINGS)
    end = end_after(eval_losses(every), patience)
    best = best_step(eval_losses(every)[:end])
    assert end < 14
    assert figures(out) == figures(every)[:end]
    assert checkpoints(out) == [best, end]  # the best stays beside the one newest that was asked for
    summary = summary_of(out)
    assert (summary["steps"], summary["num_steps"], summary["model_step"]) == (end, 14, best)
    assert summary["best"] == {"step": best, "loss": eval_losses(every)[best - 1], "since": patience}
    assert summary["after"]["eval/loss"] == eval_losses(every)[best - 1]
    assert f"the model is taken from step {best}, where the held-out loss was lowest: {summary['best']['loss']:.4f}" in narrator.said
    assert model_is_of_step(out, every, best)


def test_without_early_stop_the_model_is_the_last_and_the_best_stays(model: Path, pairs: str, tmp_path: Path, every: Path):
    out = tmp_path / "run"
    run("dpo", model, pairs, out, save_every_steps=1, keep_checkpoints=2, **SETTINGS)
    best = best_step(eval_losses(every))
    assert best < 13
    assert checkpoints(out) == [best, 13, 14]
    assert weights(out) == weights(every)
    assert summary_of(out)["model_step"] == 14
    run("dpo", model, pairs, tmp_path / "not", save_every_steps=1, keep_checkpoints=2, keep_best=False, **SETTINGS)
    assert checkpoints(tmp_path / "not") == [13, 14]


def test_resumed_in_the_middle_it_ends_the_same(server: Server, model: Path, pairs: str, tmp_path: Path):
    """Killed in every step between the best and the end: patience goes on where it was, and the best is the same."""
    settings = SETTINGS | {"early_stop": 3, "keep_checkpoints": 1, "save_every_steps": 1}
    run("dpo", model, pairs, tmp_path / "whole", **settings)
    summary = summary_of(tmp_path / "whole")
    assert summary["steps"] - summary["best"]["step"] == 3
    for step in range(summary["best"]["step"] + 1, summary["steps"] + 1):
        out = tmp_path / str(step) / "run"
        out.parent.mkdir()
        words = flags("dpo", model, pairs, out, **settings | {"cache_dir": tmp_path / "cache"})
        assert server.start(words, blow=Blow(r"open run/metrics", step)).wait() == -9
        run("dpo", model, pairs, out, resume=True, **settings)
        assert figures(out) == figures(tmp_path / "whole")
        assert weights(out) == weights(tmp_path / "whole")
        assert checkpoints(out) == checkpoints(tmp_path / "whole")
        assert {name: summary_of(out)[name] for name in ("best", "model_step", "steps")} == {
            name: summary[name] for name in ("best", "model_step", "steps")
        }


def test_after_an_early_end_it_does_not_train_on(model: Path, pairs: str, tmp_path: Path):
    settings = SETTINGS | {"early_stop": 2}
    out = tmp_path / "run"
    run("dpo", model, pairs, out, **settings)
    before = figures(out), weights(out)
    for lost in ("nothing", "model"):  # what is made again is made of the best once more
        if lost == "model":
            shutil.rmtree(out / "model")
        run("dpo", model, pairs, out, resume=True, **settings)
        assert (figures(out), weights(out)) == before


def test_a_damaged_best_is_said_and_the_last_is_taken(model: Path, pairs: str, tmp_path: Path, every: Path):
    settings = SETTINGS | {"early_stop": 2}
    out = tmp_path / "run"
    run("dpo", model, pairs, out, **settings)
    step = summary_of(out)["best"]["step"]
    path = out / "checkpoints" / f"step-{step:06d}" / "policy.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    shutil.rmtree(out / "model")
    narrator = Asks(lambda done: None)
    run("dpo", model, pairs, out, resume=True, narrator=narrator, **settings)
    said = f"note: {path.parent}, the best checkpoint, is damaged (policy.safetensors); the model is that of the last step"
    assert said in narrator.said
    summary = summary_of(out)
    assert summary["model_step"] == summary["steps"]
    assert summary["after"]["eval/loss"] == eval_losses(every)[summary["steps"] - 1]
    assert model_is_of_step(out, every, summary["steps"])


def test_data_that_cannot_be_held_out_is_said_and_does_not_go_with_early_stop(model: Path, one_opening: str, pairs: str, tmp_path: Path):
    narrator = Asks(lambda done: None)
    run("dpo", model, one_opening, tmp_path / "run", narrator=narrator, max_steps=1, eval_fraction=0.1, eval_every_steps=1)
    [note] = [line for line in narrator.said if line.startswith("note: nothing is held out")]
    assert "all 12 examples open with the same text" in note
    assert "no held-out figures, and no best checkpoint" in note
    assert note.endswith("Give eval_data for that")
    with pytest.raises(DataError, match=r"early_stop looks .* can hold nothing out: all 12 examples open .* Give eval_data, or leave"):
        run("dpo", model, one_opening, tmp_path / "other", **SETTINGS, early_stop=2)
    run("dpo", model, one_opening, tmp_path / "given", eval_data=[pairs], eval_every_steps=1, early_stop=2, max_steps=1)
    one = write_rows(tmp_path / "one.jsonl", pair_rows(1))
    run("dpo", model, one, tmp_path / "one", narrator=narrator, max_steps=1, eval_fraction=0.1)
    assert "note: nothing is held out: there is one example. " in " ".join(narrator.said)
