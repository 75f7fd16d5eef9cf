"""Ctrl-C and SIGTERM cost the step's time, and no step."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.training.runs import Asks, figures, losses, run, weights

from prefopt.errors import RunStopped
from prefopt.training.interrupt import StopRequest, stop_on_signals
from prefopt.training.narrator import Quiet
from prefopt.training.processes import Processes

ONE = Processes(0, 1, torch.device("cpu"))


class Listening(Quiet):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, line: str) -> None:
        self.said.append(line)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_stops(number: signal.Signals):
    before = signal.getsignal(number)
    narrator = Listening()
    stop = StopRequest()
    with stop_on_signals(narrator, stop):
        assert not stop.agreed(ONE)
        signal.raise_signal(number)
        assert stop.agreed(ONE)
        assert narrator.said == [f"{number.name}: the step is finished and saved, then the run stops (again: stop at once)"]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert signal.getsignal(number) is before


def test_what_a_launcher_hands_on_is_no_second_request(monkeypatch: pytest.MonkeyPatch):
    now = 50.0
    monkeypatch.setattr("prefopt.training.interrupt.time.monotonic", lambda: now)
    stop = StopRequest()
    with stop_on_signals(Quiet(), stop, grace_s=2.0):
        signal.raise_signal(signal.SIGINT)
        now = 51.9
        signal.raise_signal(signal.SIGINT)
        assert stop.asked
        now = 52.1
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_the_handlers_are_put_back_after_an_error():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(ZeroDivisionError), stop_on_signals(Quiet(), StopRequest()):
        raise ZeroDivisionError
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_narrator_in_the_middle_of_a_word_does_not_matter():
    class Busy(Quiet):
        def say(self, line: str) -> None:
            raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stderr>'>")

    stop = StopRequest()
    with stop_on_signals(Busy(), stop):
        signal.raise_signal(signal.SIGINT)
        assert stop.asked


def test_other_threads_train_without_handlers():
    asked: list[bool] = []

    def work() -> None:
        stop = StopRequest()
        with stop_on_signals(Quiet(), stop):
            asked.append(stop.asked)

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert asked == [False]
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("settings", [{}, {"lora_rank": 4, "learning_rate": 1e-2}], ids=["full", "lora"])
def test_a_stopped_run_goes_on_to_the_bit(
    model_folder: Callable[..., Path], pairs: str, tmp_path: Path, number: signal.Signals, settings: dict[str, object]
):
    def at(done: int) -> None:
        if done == 2:
            signal.raise_signal(number)

    model = model_folder()
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run("dpo", model, pairs, whole, eval_fraction=0.3, **settings)
    narrator = Asks(at)
    says = rf"stopped after step 2 of 5, as asked; the checkpoint is in {stopped}/checkpoints. Go on with the same command and --resume"
    with pytest.raises(RunStopped, match=says):
        run("dpo", model, pairs, stopped, eval_fraction=0.3, narrator=narrator, **settings)
    assert any(line.startswith(number.name) for line in narrator.said)
    assert len(losses(stopped)) == 2
    assert not (stopped / "model").exists()
    assert [path.name for path in (stopped / "checkpoints").iterdir()] == ["step-000002"]
    run("dpo", model, pairs, stopped, eval_fraction=0.3, resume=True, **settings)
    assert figures(stopped) == figures(whole)
    assert weights(stopped) == weights(whole)


def test_a_signal_in_the_last_step_lets_the_run_finish(model_folder: Callable[..., Path], pairs: str, tmp_path: Path):
    def at(done: int) -> None:
        if done == 6:
            signal.raise_signal(signal.SIGINT)

    result = run("dpo", model_folder(), pairs, tmp_path / "run", narrator=Asks(at))
    assert result.summary["steps"] == 6
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_the_command_line_stops(model_folder: Callable[..., Path], pairs: str, tmp_path: Path):
    """In a process of its own: exit code 130, one sentence, no traceback."""
    out = tmp_path / "run"
    words = ["--model", str(model_folder()), "--data", pairs, "--out", str(out), "--batch-size", "4", "--max-length", "128"]
    more = ["--epochs", "20000", "--device", "cpu", "--precision", "float32"]
    command = [sys.executable, "-m", "prefopt", "train", "dpo", *words, *more]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2] / "src"), "PREFOPT_CACHE": str(tmp_path / "cache")}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        while process.poll() is None and not (out / "metrics.jsonl").exists():
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    *_, announced, last = said.splitlines()
    assert announced.startswith("SIGTERM: the step is finished and saved")
    done = len(losses(out))
    assert last.startswith(f"prefopt: stopped after step {done} of 60000, as asked; the checkpoint is in {out}")
    assert [path.name for path in (out / "checkpoints").iterdir()] == [f"step-{done:06d}"]
