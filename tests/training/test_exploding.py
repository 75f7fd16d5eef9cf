"""A learning rate that makes weights overflow: nothing of that is saved, and what was good before stays."""

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.training.crash_server import Server, flags
from tests.training.group_server import Server as Groups
from tests.training.runs import losses, rows, run

from prefopt.training.group.processes import ALONE
from prefopt.training.group.sharding import not_finite
from prefopt.training.loop import Trainer
from prefopt.training.not_finite import NotFinite
from prefopt.training.record.checkpoint import Checkpoints

EXPLODES: dict[str, Any] = {"learning_rate": 1e38, "warmup_ratio": 0.0}


def checkpoints(out: Path) -> list[str]:
    return [path.name for path in Checkpoints(out / "checkpoints", keep=1).all()]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_each_single_number_is_looked_at(value: float, dtype: torch.dtype):
    for place in (0, 1234, 4999):
        tensors = {"good": torch.full((50, 100), torch.finfo(dtype).max, dtype=dtype), "empty": torch.empty(0, 7, dtype=dtype)}
        tensors["bad"] = tensors["good"].clone()
        tensors["bad"].view(-1)[place] = value
        assert not_finite(tensors, ALONE) == ["bad"]
        assert not_finite({"turned": tensors["bad"].t()}, ALONE) == ["turned"]
    assert not_finite({}, ALONE) == []


@pytest.mark.parametrize(
    ("method", "settings", "what"),
    [
        ("dpo", {}, "after step 1 the weights of "),
        ("dpo", {"eval_fraction": 0.3}, "the held-out loss after step 1 is nan: the weights of "),
        ("dpo", {"lora_rank": 2}, "after step 1 the weights of "),
        ("sft", {}, "after step 1 the weights of "),
    ],
    ids=["dpo", "held out", "lora", "sft"],
)
def test_the_last_update_is_looked_at(
    model_folder: Callable[..., Path], pairs: str, demonstrations: str, tmp_path: Path, method: str, settings: dict[str, Any], what: str
):
    """No step comes after it whose loss would show it."""
    out = tmp_path / "run"
    data = demonstrations if method == "sft" else pairs
    with pytest.raises(NotFinite) as caught:
        run(method, model_folder(), data, out, max_steps=1, **EXPLODES | settings)
    message = str(caught.value)
    assert message.startswith(what)
    assert " are not finite" in message
    assert message.endswith("No checkpoint was saved: when the cause is mended, start anew with --overwrite.")
    status = json.loads((out / "status.json").read_text())
    assert (status["state"], status["step"], status["message"]) == ("failed", 1, message)
    assert not (out / "model").exists()
    assert not (out / "summary.json").exists()
    assert checkpoints(out) == []
    assert len(rows(out)) == 1


def test_the_last_good_checkpoint_stays(model_folder: Callable[..., Path], pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Three good steps, then one that breaks the weights; as many checkpoints as one are kept."""
    out = tmp_path / "run"
    step = Trainer.step

    def then_explode(self: Trainer, trees: Any, number: int, state: Any) -> Any:
        found = step(self, trees, number, state)
        if number == 3:
            next(self.policy.parameters()).data.view(-1)[5] = math.nan
        return found

    monkeypatch.setattr(Trainer, "step", then_explode)
    with pytest.raises(NotFinite) as caught:
        run("dpo", model_folder(), pairs, out, save_every_steps=1, keep_checkpoints=1)
    assert re.match(r"after step 4 the weights of \S+ are not finite; they are not saved\. ", str(caught.value))
    assert f"The newest checkpoint, step-000003 in {out}/checkpoints, is finite; " in str(caught.value)
    assert checkpoints(out) == ["step-000003"]
    monkeypatch.undo()
    run("dpo", model_folder(), pairs, out, save_every_steps=1, keep_checkpoints=1, resume=True)
    run("dpo", model_folder(), pairs, tmp_path / "healthy")
    assert losses(out) == losses(tmp_path / "healthy")


def test_a_step_after_the_weights_are_broken_says_so(
    model_folder: Callable[..., Path], pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Nothing is saved between: the next loss shows it, and the rows of that step are not to blame."""
    out = tmp_path / "run"
    with pytest.raises(NotFinite) as caught:
        run("dpo", model_folder(), pairs, out, **EXPLODES)
    message = str(caught.value)
    assert message.startswith("the loss of step 2 is nan; since the update of step 1 the weights of ")
    assert "pairs.jsonl:" not in message
    assert "were not changed" not in message
    assert checkpoints(out) == []
    assert len((out / "bad_batch.jsonl").read_text().splitlines()) == 4


def test_an_optimizer_that_has_overflowed_is_not_saved(
    model_folder: Callable[..., Path], pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Squares of gradients overflow long before gradients do: from then on such a weight never moves again."""
    step = Trainer.step

    def then_overflow(self: Trainer, trees: Any, number: int, state: Any) -> Any:
        found = step(self, trees, number, state)
        name, weight = next((name, weight) for name, weight in self.policy.named_parameters() if weight.requires_grad)
        self.optimizer.state[weight]["exp_avg_sq"].view(-1)[0] = math.inf
        seen.append(name)
        return found

    seen: list[str] = []
    monkeypatch.setattr(Trainer, "step", then_overflow)
    with pytest.raises(NotFinite, match="the optimizer's averages for") as caught:
        run("dpo", model_folder(), pairs, tmp_path / "run", save_every_steps=2)
    assert str(caught.value).startswith(f"after step 2 the optimizer's averages for {seen[0]} are not finite; they are not saved.")
    assert checkpoints(tmp_path / "run") == []


def test_a_checkpoint_of_a_step_in_trouble_pushes_none_out(
    model_folder: Callable[..., Path], pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its weights are finite and may be far away already. What came before stays, until a run that is resumed has saved again."""
    out = tmp_path / "run"
    step = Trainer.step
    settings: dict[str, Any] = {"save_every_steps": 2, "keep_checkpoints": 1}

    def bad_third(self: Trainer, trees: Any, number: int, state: Any) -> Any:
        if number == 3:
            weight = next(weight for weight in self.policy.parameters() if weight.requires_grad)
            before = weight.data.clone()
            weight.data.fill_(math.inf)
            try:
                return step(self, trees, number, state)
            except NotFinite as error:  # as if the loss had overflowed on weights that had not
                weight.data.copy_(before)
                error.is_fit = True
                raise
        return step(self, trees, number, state)

    monkeypatch.setattr(Trainer, "step", bad_third)
    for resume in (False, True):
        with pytest.raises(NotFinite) as caught:
            run("dpo", model_folder(), pairs, out, resume=resume, **settings)
        assert checkpoints(out) == ["step-000002", "step-000003"]
        assert "delete its folder, and --resume goes on from step-000002" in str(caught.value)
    shutil.rmtree(out / "checkpoints" / "step-000003")  # as the sentence says
    monkeypatch.undo()
    run("dpo", model_folder(), pairs, out, resume=True, **settings)
    assert checkpoints(out) == ["step-000006"]
    run("dpo", model_folder(), pairs, tmp_path / "healthy")
    assert losses(out) == losses(tmp_path / "healthy")


def test_a_held_out_loss_that_is_not_finite_ends_the_run(
    model_folder: Callable[..., Path], pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The weights are finite: the rows are named, and the step that was done is noted."""
    out = tmp_path / "run"
    evaluate = Trainer.evaluate
    calls: list[int] = []

    def poisoned(self: Trainer, trees: Any, state: Any) -> Any:
        found = evaluate(self, trees, state)
        calls.append(len(trees))
        if len(calls) == 3:
            found.figures["loss"] = found.examples["loss"][1] = math.nan
        return found

    monkeypatch.setattr(Trainer, "evaluate", poisoned)
    with pytest.raises(NotFinite) as caught:
        run("dpo", model_folder(), pairs, out, eval_fraction=0.3, eval_every_steps=2, save_every_steps=1, early_stop=2)
    held_out = [json.loads(line) for line in (out / "held_out.jsonl").read_text().splitlines()]
    start = "the held-out loss after step 4 is nan, and the weights are finite. Held-out examples whose own loss is not finite: "
    assert str(caught.value).startswith(f"{start}{held_out[1]['row']}. ")
    assert held_out[1]["after"]["loss"] is None
    assert len(rows(out)) == 4
    assert checkpoints(out)[-1] == "step-000003"
    assert not (out / "bad_batch.jsonl").exists()


def test_before_training_too(model_folder: Callable[..., Path], pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    evaluate = Trainer.evaluate

    def poisoned(self: Trainer, trees: Any, state: Any) -> Any:
        found = evaluate(self, trees, state)
        found.figures["loss"] = math.inf
        return found

    monkeypatch.setattr(Trainer, "evaluate", poisoned)
    with pytest.raises(
        NotFinite, match=r"the held-out loss before training is inf, and the weights are finite. Each example's own loss is"
    ):
        run("dpo", model_folder(), pairs, tmp_path / "run", eval_fraction=0.3)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_command_says_it_in_a_sentence(server: Server, model_folder: Callable[..., Path], pairs: str, tmp_path: Path):
    out = tmp_path / "run"
    words = flags("dpo", model_folder(), pairs, out, save_every_steps=1, keep_checkpoints=1, **EXPLODES)
    said = server.run(words, code=2)
    assert "Traceback" not in said
    assert said.splitlines()[-1].startswith("prefopt: after step 1 the weights of ")
    for path in Checkpoints(out / "checkpoints", keep=1).all():
        assert all(torch.isfinite(tensor).all() for tensor in load_file(path / "policy.safetensors").values())


def test_looking_costs_no_step_anything(model_folder: Callable[..., Path], pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Weights are looked at where a checkpoint is written, and once before the model is."""
    looked: list[int] = []
    check = Trainer.check_finite
    monkeypatch.setattr(Trainer, "check_finite", lambda self, step: (looked.append(step), check(self, step))[1])
    run("dpo", model_folder(), pairs, tmp_path / "run", save_every_steps=4)
    assert looked == [4, 6, 6]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"max_steps": 1}, "after step 1 the weights of "),
        ({"max_steps": 1, "eval_fraction": 0.3}, "the held-out loss after step 1 is nan: the weights of "),
        ({}, "the loss of step 2 is nan; since the update of step 1 the weights of "),
    ],
    ids=["at the end", "held out", "in the next step"],
)
def test_several_processes_find_the_same(
    groups: Groups, model_folder: Callable[..., Path], pairs: str, tmp_path: Path, parallel: str, settings: dict[str, Any], what: str
):
    out = tmp_path / "run"
    same = {"method": "dpo", "model": model_folder(), "data": pairs, "out": out, "cache_dir": tmp_path / "cache", "parallel": parallel}
    outcome = groups.run("train", codes=[2, 2], **same, **EXPLODES, **settings)
    assert f"prefopt: {what}" in outcome.said[0]
    assert not any("Traceback" in said for said in outcome.said)
    assert checkpoints(out) == []
    assert json.loads((out / "status.json").read_text())["state"] == "failed"
