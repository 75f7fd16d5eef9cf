"""A loss or a gradient that is not finite stops the run before the weights change, and names the rows."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.training.crash_server import Server, flags
from tests.training.runs import Asks, losses, pair_rows, rows, run

from prefopt.errors import RunError
from prefopt.methods.dpo import DPO, DPOSettings
from prefopt.methods.method import LossOutput, Method, Term
from prefopt.training.loop import Asked, Best, Course
from prefopt.training.not_finite import NotFinite
from prefopt.training.order import DataOrder
from prefopt.training.record.checkpoint import Checkpoints
from prefopt.training.record.folder import RunFolder
from prefopt.training.run import train
from prefopt.training.settings import RunSettings
from prefopt.training.terminal.narrator import Quiet

SMALL: dict[str, Any] = {"batch_size": 4, "epochs": 2, "learning_rate": 1e-3, "max_length": 128, "device": "cpu", "precision": "float32"}
SMALL |= {"samples": 0, "report": False, "memory_check": False, "save_every_steps": 2, "keep_checkpoints": 9}


class Poisoned(Method):
    """DPO whose loss of one row, from its third step on, is what the test says; its gradient may be what is broken."""

    name = "poisoned"
    settings_class = DPOSettings
    needs, units, rates = DPO.needs, DPO.units, DPO.rates
    row, step, value, in_gradient = "pairs.jsonl:5", 3, math.nan, False

    def __init__(self, settings: DPOSettings) -> None:
        super().__init__(settings)
        self.dpo = DPO(settings)

    def initial_state(self):
        return {"steps": 0.0}

    def next_state(self, state, sums):
        return {"steps": state["steps"] + 1}

    def loss(self, policy, reference, batch, *, statistics, state):
        output = self.dpo.loss(policy, reference, batch, statistics=statistics, state=state)
        hit_B = torch.tensor([float(tree.row_id == self.row) for tree in batch.trees])
        if state["steps"] < self.step or not hit_B.any():
            return output
        [term] = output.terms
        if self.in_gradient:  # √0 is 0, and its slope is not finite
            broken_B = term.values_B + hit_B * (term.values_B - term.values_B.detach()).abs().sqrt()
        else:
            broken_B = term.values_B + torch.where(hit_B > 0, self.value, 0.0)
        return LossOutput((Term(broken_B, term.unit),), output.metrics)


class InGradient(Poisoned):
    in_gradient = True


class Infinite(Poisoned):
    value = math.inf


def settings_of(model: Path, data: str, out: Path, **more: Any) -> RunSettings:
    return RunSettings(model=str(model), data=[data], out=out, cache_dir=out.parent / "cache", **SMALL | more)


def weights_of(checkpoint: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in checkpoint.glob("*.safetensors")}


@pytest.mark.parametrize("lora_rank", [0, 2])
@pytest.mark.parametrize(("kind", "what"), [(Poisoned, "loss"), (Infinite, "loss"), (InGradient, "gradient")])
def test_the_weights_are_those_before_the_step(
    model_folder: Callable[..., Path], pairs: str, tmp_path: Path, kind: type[Poisoned], what: str, lora_rank: int
):
    """The checkpoint that is written then is the one that the same run without the trouble writes at that step."""
    out = tmp_path / "run"
    narrator = Asks(lambda done: None)
    with pytest.raises(NotFinite) as caught:
        train(kind(DPOSettings()), settings_of(model_folder(), pairs, out, lora_rank=lora_rank), narrator=narrator)
    steps = [int(path.name[5:]) for path in Checkpoints(out / "checkpoints", keep=1).all()]
    stopped_after = steps[-1]
    assert stopped_after >= 3
    healthy = tmp_path / "healthy"
    run("dpo", model_folder(), pairs, healthy, save_every_steps=1, keep_checkpoints=9, lora_rank=lora_rank)
    assert losses(out) == losses(healthy)[:stopped_after]
    expected = weights_of(healthy / "checkpoints" / f"step-{stopped_after:06d}")
    assert weights_of(out / "checkpoints" / f"step-{stopped_after:06d}") == expected
    message = str(caught.value)
    value = {Poisoned: "nan", Infinite: "inf", InGradient: "(nan|inf)"}[kind]
    assert re.match(rf"the {what} of step {stopped_after + 1} is {value}; the weights were not changed\. ", message)
    status = json.loads((out / "status.json").read_text())
    assert (status["state"], status["step"], status["message"]) == ("failed", stopped_after, message)
    assert not (out / "model").exists()
    assert not (out / "summary.json").exists()


@pytest.mark.parametrize(("kind", "names_it"), [(Poisoned, True), (InGradient, False)])
def test_the_rows_are_there_with_texts_and_figures(
    model_folder: Callable[..., Path], pairs: str, tmp_path: Path, kind: type[Poisoned], names_it: bool
):
    out = tmp_path / "run"
    with pytest.raises(NotFinite) as caught:
        train(kind(DPOSettings()), settings_of(model_folder(), pairs, out), narrator=Quiet())
    batch = [json.loads(line) for line in (out / "bad_batch.jsonl").read_text().splitlines()]
    assert len(batch) == 4
    step = len(losses(out)) + 1
    taken = DataOrder(12, 4, 0, 2.0, None).examples(step - 1)
    assert [line["row"] for line in batch] == [f"pairs.jsonl:{index + 1}" for index in taken]
    data = pair_rows()
    for line, index in zip(batch, taken, strict=True):
        assert line["step"] == step
        assert line["prompt"] == data[index]["prompt"]
        assert line["completions"] == [data[index]["chosen"].strip(), data[index]["rejected"].strip()]
        assert line["lengths"] == [len(ids) for ids in line["ids"]]
        assert len(line["prompt_ids"]) > 0
        is_guilty = names_it and line["row"] == Poisoned.row
        assert (line["figures"]["loss"] == "nan") == is_guilty
        assert math.isfinite(float(line["figures"]["rewards/margin"]))
    if names_it:
        assert f"Examples whose own loss is not finite: {Poisoned.row}. " in str(caught.value)
    else:
        rows_named = ", ".join(line["row"] for line in batch)
        assert f"Each example's own loss is finite; the step's examples: {rows_named}. " in str(caught.value)


def test_it_can_be_gone_on_with_once_the_trouble_is_gone(model_folder: Callable[..., Path], pairs: str, tmp_path: Path):
    """A GPU's hiccup, say. The batch's file goes: it tells of a step that is being taken again."""
    out = tmp_path / "run"
    settings = settings_of(model_folder(), pairs, out)
    with pytest.raises(NotFinite):
        train(Poisoned(DPOSettings()), settings, narrator=Quiet())
    again = settings.model_copy(update={"resume": True})
    with pytest.raises(NotFinite):  # it is still there
        train(Poisoned(DPOSettings()), again, narrator=Quiet())
    assert (out / "bad_batch.jsonl").is_file()

    class Mended(Poisoned):
        step = 1000

    train(Mended(DPOSettings()), again, narrator=Quiet())
    assert not (out / "bad_batch.jsonl").exists()
    run("dpo", model_folder(), pairs, tmp_path / "healthy")
    assert losses(out) == losses(tmp_path / "healthy")


def test_in_the_first_step_there_is_nothing_to_save(model_folder: Callable[..., Path], pairs: str, tmp_path: Path):
    class AtOnce(Poisoned):
        step, row = 0, f"pairs.jsonl:{DataOrder(12, 4, 0, 2.0, None).examples(0)[1] + 1}"

    out = tmp_path / "run"
    with pytest.raises(NotFinite, match=rf"the loss of step 1 is nan; .*not finite: {AtOnce.row}\."):
        train(AtOnce(DPOSettings()), settings_of(model_folder(), pairs, out), narrator=Quiet())
    assert not (out / "checkpoints").exists()
    assert (out / "bad_batch.jsonl").is_file()


def test_on_the_command_line(server: Server, model_folder: Callable[..., Path], pairs: str, tmp_path: Path):
    """A learning rate of 1e30: one sentence, exit code 2, and a checkpoint whose numbers are finite."""
    out = tmp_path / "run"
    words = flags("dpo", model_folder(), pairs, out, learning_rate=1e30, warmup_ratio=0.0, max_grad_norm=1e30)
    said = server.run(words, code=2)
    assert "Traceback" not in said
    last = said.splitlines()[-1]
    assert last.startswith(
        "prefopt: the loss of step 2 is nan; the weights were not changed. Examples whose own loss is not finite: pairs.jsonl:"
    )
    assert "A learning rate that is far too high is the usual cause" in last
    [path] = Checkpoints(out / "checkpoints", keep=1).all()
    assert path.name == "step-000001"
    assert all(torch.isfinite(tensor).all() for tensor in load_file(path / "policy.safetensors").values())
    assert all(math.isfinite(row["loss"]) for row in rows(out))


@pytest.mark.parametrize("what", [(RunFolder, "write_lines"), (Checkpoints, "save")], ids=["the batch", "the checkpoint"])
def test_trouble_with_the_notes_does_not_hide_it(
    model_folder: Callable[..., Path], pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: tuple[type, str]
):
    def refuse(*arguments: Any, **settings: Any) -> None:
        raise RunError("cannot write it")

    monkeypatch.setattr(*what, refuse)
    narrator = Asks(lambda done: None)
    with pytest.raises(NotFinite, match="is nan"):
        train(Poisoned(DPOSettings()), settings_of(model_folder(), pairs, tmp_path / "run", save_every_steps=None), narrator=narrator)
    assert "note: cannot write it" in narrator.said


def test_a_held_out_loss_that_is_not_finite_is_never_the_best():
    course = Course(
        order=DataOrder(12, 4, 0, 2.0, None),
        step=2,
        state={},
        evaluate_every=1,
        save_every=None,
        save_best=True,
        compares=True,
        patience=2,
        evaluate=None,
        save=lambda course: None,
        record=lambda row: None,
        asked=Asked,
    )
    assert not course.compare({"eval/loss": math.nan})
    assert course.best is None
    course.step = 3
    assert course.compare({"eval/loss": 0.5})
    course.step = 4
    assert not course.compare({"eval/loss": math.nan})
    assert course.best == Best(3, 0.5, since=1)
    assert course.compare({"eval/loss": 0.4})
    assert course.best == Best(4, 0.4)


def test_losses_against_references_of_different_steps_have_no_best():
    course = Course(
        order=DataOrder(12, 4, 0, 2.0, None),
        step=2,
        state={},
        evaluate_every=1,
        save_every=None,
        save_best=True,
        compares=False,
        patience=None,
        evaluate=None,
        save=lambda course: None,
        record=lambda row: None,
        asked=Asked,
    )
    assert not course.compare({"eval/loss": 0.5})
    assert course.best is None


def test_figures_that_are_not_finite_are_null_in_the_files(model_folder: Callable[..., Path], pairs: str, tmp_path: Path):
    """JSON has no NaN: whoever reads the file with another language than Python would stop there."""

    class Figure(Poisoned):
        def loss(self, policy, reference, batch, *, statistics, state):
            output = self.dpo.loss(policy, reference, batch, statistics=statistics, state=state)
            return LossOutput(output.terms, {**output.metrics, "odd": torch.full_like(output.terms[0].values_B.detach(), math.inf)})

    out = tmp_path / "run"
    train(Figure(DPOSettings()), settings_of(model_folder(), pairs, out, eval_fraction=0.3, eval_every_steps=1), narrator=Quiet())
    assert all(row["odd"] is None and row["eval/odd"] is None for row in rows(out))
    assert not any(word in (out / "metrics.jsonl").read_text() for word in ("NaN", "Infinity"))
