"""Callbacks are told of everything in order, may stop the run, and can do it no harm."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.training.runs import Asks, figures, losses, rows, run, weights

import prefopt
from prefopt.errors import RunError, RunStopped
from prefopt.training.record.callbacks import Callback, RunStart
from prefopt.training.record.folder import RunFolder
from prefopt.training.record.logbook import Logbook
from prefopt.training.terminal.narrator import Quiet
from prefopt.training.watching.watched import Finding

SETTINGS: dict[str, Any] = {
    "eval_fraction": 0.33,
    "epochs": 2,
    "eval_every_steps": 2,
    "save_every_steps": 1,
    "samples": 1,
    "sample_tokens": 4,
}


class Notes(Callback):
    """Writes down what it is told, and does something at a given call."""

    def __init__(
        self, at: str = "", act: Callable[["Notes"], None] = lambda notes: None, calls: list[str] | None = None, name: str = ""
    ) -> None:
        self.at, self.act, self.name = at, act, name
        self.calls = [] if calls is None else calls
        self.run: RunStart | None = None
        self.given: list[Any] = []

    def note(self, call: str, given: Any) -> None:
        self.calls.append(self.name + call)
        self.given.append(given)
        if call == self.at:
            self.act(self)

    def on_start(self, run: RunStart) -> None:
        self.run = run
        self.note(f"start at {run.step}", run)

    def on_step(self, row: Mapping[str, float]) -> None:
        self.note(f"step {row['step']}", row)

    def on_samples(self, samples: Sequence[Mapping[str, Any]]) -> None:
        self.note(f"samples of {samples[0]['step']}", samples)

    def on_finding(self, finding: Finding) -> None:
        self.note(f"finding {finding.rule}", finding)

    def on_end(self, summary: Mapping[str, Any]) -> None:
        self.note("end", summary)

    def on_failure(self, error: BaseException) -> None:
        self.note("failure", error)


@pytest.fixture(scope="module")
def model(model_folder: Callable[..., Path]) -> Path:
    return model_folder()


@pytest.fixture(scope="module")
def whole(model: Path, pairs: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    run("dpo", model, pairs, out, **SETTINGS)
    return out


def without_findings(calls: list[str]) -> list[str]:
    return [call for call in calls if "finding" not in call]


def test_what_they_are_told_and_when(model: Path, pairs: str, tmp_path: Path):
    out = tmp_path / "run"
    notes = Notes()
    result = run("dpo", model, pairs, out, callbacks=[notes], **SETTINGS)
    order = [
        "start at 0",
        "samples of 0",
        "step 1",
        "samples of 2",
        "step 2",
        "step 3",
        "samples of 4",
        "step 4",
        "samples of 5",
        "step 5",
        "end",
    ]
    assert without_findings(notes.calls) == order
    by_call = dict(zip(notes.calls, notes.given, strict=True))
    assert by_call["start at 0"].folder == out
    assert json.loads(json.dumps(by_call["start at 0"].manifest, default=str)) == json.loads((out / "manifest.json").read_text())
    assert [by_call[f"step {step}"] for step in range(1, 6)] == rows(out)
    assert by_call["end"] == result.summary
    found = [json.loads(line) for line in (out / "watch.jsonl").read_text().splitlines()]
    assert [call for call in notes.calls if "finding" in call] == [f"finding {line['rule']}" for line in found]
    assert notes.calls.index(f"finding {found[0]['rule']}") > notes.calls.index("start at 0")


def test_several_are_called_in_the_order_given(model: Path, pairs: str, tmp_path: Path):
    calls: list[str] = []
    run("dpo", model, pairs, tmp_path / "run", callbacks=[Notes(calls=calls, name="a "), Notes(calls=calls, name="b ")], max_steps=1)
    assert without_findings(calls) == ["a start at 0", "b start at 0", "a step 1", "b step 1", "a end", "b end"]


@pytest.mark.parametrize("at", ["start at 0", "step 2", "samples of 2"])
def test_one_may_stop_the_run_and_it_goes_on_later(model: Path, pairs: str, tmp_path: Path, whole: Path, at: str):
    def stop(notes: Notes) -> None:
        assert notes.run is not None
        notes.run.stop()

    out = tmp_path / "run"
    notes = Notes(at, stop)
    done = 1 if at == "start at 0" else 2
    with pytest.raises(RunStopped, match=rf"stopped after step {done} of 5, as asked; the checkpoint is in {out}/checkpoints"):
        run("dpo", model, pairs, out, callbacks=[notes], **SETTINGS)
    assert without_findings(notes.calls)[-2:] == [f"step {done}", "failure"]
    assert isinstance(notes.given[-1], RunStopped)
    assert json.loads((out / "status.json").read_text())["state"] == "stopped"
    assert len(losses(out)) == done
    later = Notes()
    run("dpo", model, pairs, out, callbacks=[later], resume=True, **SETTINGS)
    assert without_findings(later.calls)[:2] == [f"start at {done}", *([f"samples of {done + 1}"] if done == 1 else [f"step {done + 1}"])]
    assert figures(out) == figures(whole)
    assert weights(out) == weights(whole)
    assert (out / "watch.jsonl").read_bytes() == (whole / "watch.jsonl").read_bytes()


class OfTheirOwn(Exception):
    pass


@pytest.mark.parametrize("at", ["start at 0", "samples of 0", "step 3", "samples of 4", "end"])
def test_what_one_raises_ends_the_run_and_the_last_checkpoint_is_good(model: Path, pairs: str, tmp_path: Path, whole: Path, at: str):
    def fail(notes: Notes) -> None:
        raise OfTheirOwn("no more")

    out = tmp_path / "run"
    broken, other = Notes(at, fail), Notes()
    with pytest.raises(OfTheirOwn, match="no more"):
        run("dpo", model, pairs, out, callbacks=[broken, other], **SETTINGS)
    assert broken.calls[-1] == other.calls[-1] == "failure"
    assert isinstance(other.given[-1], OfTheirOwn)
    status = json.loads((out / "status.json").read_text())
    assert (status["state"], status["message"]) == ("failed", "no more")
    assert not (out / ".lock").exists()
    anew = {"overwrite": True} if at in ("start at 0", "samples of 0") else {"resume": True}
    run("dpo", model, pairs, out, **anew, **SETTINGS)
    assert figures(out) == figures(whole)
    assert weights(out) == weights(whole)
    assert json.loads((out / "status.json").read_text())["state"] == "finished"


def test_one_that_fails_at_the_failure_does_not_hide_it(model: Path, pairs: str, tmp_path: Path):
    def fail(notes: Notes) -> None:
        raise OfTheirOwn("and this")

    narrator = Asks(lambda done: None)
    other = Notes()
    with pytest.raises(RunError, match=r"the loss of step 2 is nan"):
        run(
            "dpo", model, pairs, tmp_path / "run", narrator=narrator, callbacks=[Notes("failure", fail), other],
            learning_rate=1e30, warmup_ratio=0.0, max_grad_norm=1e30,
        )  # fmt: skip
    assert "note: Notes.on_failure failed as well: OfTheirOwn: and this" in narrator.said
    assert other.calls[-1] == "failure"


def test_one_that_is_interrupted(model: Path, pairs: str, tmp_path: Path):
    """A Ctrl-C in code that waits for something."""

    def interrupt(notes: Notes) -> None:
        raise KeyboardInterrupt

    with pytest.raises(RunStopped, match=r"stopped at once; the last checkpoint is as it was\. Go on with the same command and --resume"):
        run("dpo", model, pairs, tmp_path / "run", callbacks=[Notes("step 3", interrupt)], **SETTINGS)


def test_mistakes_before_the_run_are_not_told(model: Path, pairs: str, tmp_path: Path):
    notes = Notes()
    with pytest.raises(RunError, match="max_tokens"):
        run("dpo", model, pairs, tmp_path / "run", callbacks=[notes], max_tokens=16)
    assert notes.calls == []


def test_on_the_main_process_only(tmp_path: Path):
    """The others keep the rows, which the loop reads, and call nobody."""
    notes = Notes()
    book = Logbook(RunFolder(tmp_path), Quiet(), [notes], is_main=False)
    book.begin(RunStart(tmp_path, {}, 0, lambda: None), {}, num_steps=2)
    book.row({"step": 1, "loss": 0.5})
    book.samples([{"step": 1}])
    book.end({})
    book.failed(RunError("x"), stopped=False)
    assert notes.calls == []
    assert book.rows == [{"step": 1, "loss": 0.5}]
    assert list(tmp_path.iterdir()) == []


def test_they_change_nothing(model: Path, pairs: str, tmp_path: Path, whole: Path):
    """Not even where one draws random numbers, or runs something with gradients."""

    class Busy(Callback):
        def on_step(self, row: Mapping[str, float]) -> None:
            torch.rand(3)
            weight = torch.zeros(2, requires_grad=True)
            (weight * 2).sum().backward()

    run("dpo", model, pairs, tmp_path / "run", callbacks=[Busy()], **SETTINGS)
    assert figures(tmp_path / "run") == figures(whole)
    assert weights(tmp_path / "run") == weights(whole)


def test_a_bug_in_a_page_neither_fails_a_run_nor_hides_why_one_failed(
    model: Path, pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(folder: Path) -> Path:
        raise KeyError("a bug")

    monkeypatch.setattr("prefopt.training.record.logbook.write_report", fail)
    narrator = Asks(lambda done: None)
    run("dpo", model, pairs, tmp_path / "run", narrator=narrator, report=True, max_steps=1)
    assert "note: the pages about the run cannot be made: KeyError: 'a bug'" in narrator.said
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "finished"
    with pytest.raises(RunError, match=r"the loss of step 2 is nan"):
        run("dpo", model, pairs, tmp_path / "nan", report=True, learning_rate=1e30, warmup_ratio=0.0, max_grad_norm=1e30)


def test_it_is_part_of_the_public_face():
    assert prefopt.Callback is Callback
