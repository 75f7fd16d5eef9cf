"""Ctrl-C and SIGTERM cost the step's time, and no step."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.training.crash_server import Blow, Child, Server, flags
from tests.training.runs import Asks, figures, losses, run, weights

from prefopt.errors import RunStopped
from prefopt.training.interrupt import StopRequest, stop_at_once, stop_on_signals
from prefopt.training.record.checkpoint import Checkpoints
from prefopt.training.terminal.narrator import Quiet


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
        assert not stop.asked
        signal.raise_signal(number)
        assert stop.asked
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


@contextmanager
def hangups(handler: signal.Handlers) -> Iterator[None]:
    """With that answer to SIGHUP, whether the tests were started under nohup or not."""
    before = signal.signal(signal.SIGHUP, handler)
    try:
        yield
        assert signal.getsignal(signal.SIGHUP) is handler
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_end_of_the_terminal_asks_and_never_stops_at_once():
    """The kernel sends SIGHUP, and so does the shell."""
    stop = StopRequest()
    narrator = Listening()
    with hangups(signal.SIG_DFL), stop_on_signals(narrator, stop):
        for _ in range(3):
            signal.raise_signal(signal.SIGHUP)
        assert stop.asked
        assert narrator.said == ["SIGHUP: the step is finished and saved, then the run stops (again: stop at once)"]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_nohup_is_respected():
    stop = StopRequest()
    with hangups(signal.SIG_IGN), stop_on_signals(Quiet(), stop):
        signal.raise_signal(signal.SIGHUP)
        assert not stop.asked


@pytest.mark.parametrize(
    "error",
    [RuntimeError("reentrant call inside <_io.BufferedWriter name='<stderr>'>"), OSError(errno.EIO, "Input/output error")],
    ids=["in the middle of a word", "the terminal is gone"],
)
def test_a_narrator_that_cannot_speak_does_not_matter(error: Exception):
    class Busy(Quiet):
        def say(self, line: str) -> None:
            raise error

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
    *lines, last = said.splitlines()
    assert any(line.startswith("SIGTERM: the step is finished and saved") for line in lines)
    done = len(losses(out))
    assert last.startswith(f"prefopt: stopped after step {done} of 60000, as asked; the checkpoint is in {out}")
    assert [path.name for path in (out / "checkpoints").iterdir()] == [f"step-{done:06d}"]


# At once.

SETTINGS = {"eval_fraction": 0.33, "eval_every_steps": 2, "save_every_steps": 1, "samples": 1, "sample_tokens": 4}

PLACES = {
    "in a step": (r"open run/metrics\.jsonl", 4),
    "in a save": (r"open run/checkpoints/\.step.*state\.json", 4),
    "while a save takes its place": (r"os\.rename run/checkpoints/\.step", 4),
    "while an old checkpoint goes": (r"os\.remove \.\.\./policy", 2),
    "in an evaluation": (r"open run/\.held_out", 3),
    "while samples are written": (r"open run/samples", 3),
    "in the saving of the model": (r"open run/\.model\.new/config", 1),
    "while the summary is written": (r"os\.rename run/\.summary", 1),
}


@pytest.fixture(scope="module")
def whole(model_folder: Callable[..., Path], pairs: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    run("dpo", model_folder(), pairs, out, epochs=3, **SETTINGS)
    return out


@pytest.mark.parametrize("place", PLACES)
def test_the_second_stops_at_once_and_leaves_the_last_checkpoint_good(
    server: Server, model_folder: Callable[..., Path], pairs: str, tmp_path: Path, whole: Path, place: str
):
    out = tmp_path / "run"
    words = flags("dpo", model_folder(), pairs, out, **SETTINGS)
    at, nth = PLACES[place]
    said = server.run(words, blow=Blow(at, nth, "interrupt", 2), code=130)
    *_, announced, last = said.splitlines()
    assert announced == "SIGINT: the step is finished and saved, then the run stops (again: stop at once)"
    assert last == "prefopt: stopped at once; the last checkpoint is as it was. Go on with the same command and --resume."
    assert "Traceback" not in said
    status = json.loads((out / "status.json").read_text())
    assert (status["state"], status["message"]) == ("stopped", last.removeprefix("prefopt: "))
    path, state = Checkpoints(out / "checkpoints", keep=1).newest_state()
    assert path.name == f"step-{state['step']:06d}"
    assert not (out / ".lock").exists()
    server.run([*words, "--resume"])
    assert figures(out) == figures(whole)
    assert weights(out) == weights(whole)
    assert [str(path) for path in out.rglob(".*")] == []


def test_at_once_before_anything_was_saved(server: Server, model_folder: Callable[..., Path], pairs: str, tmp_path: Path):
    out = tmp_path / "run"
    words = flags("dpo", model_folder(), pairs, out)
    said = server.run(words, blow=Blow(r"open run/metrics\.jsonl", 2, "interrupt", 2), code=130)
    assert said.splitlines()[-1] == "prefopt: stopped at once; no checkpoint was saved. Start anew with --overwrite."
    server.run([*words, "--overwrite"])
    assert len(losses(out)) == 9


LOADING = "import signal; from prefopt.training import prepare; prepare.load_model = lambda *_, **__: signal.raise_signal({number})"
KEPT = "What was computed of the reference's values is kept in the cache. "
AGAIN = "Give the same command to start again."


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_is_enough_before_the_first_step(
    server: Server, model_folder: Callable[..., Path], pairs: str, demonstrations: str, tmp_path: Path, number: signal.Signals
):
    """There is nothing to finish and nothing to save, and the same command goes on."""
    out = tmp_path / "run"
    prelude = LOADING.format(number=int(number))
    said = server.run(flags("sft", model_folder(), demonstrations, out), prelude=prelude, code=130)
    assert said.splitlines()[-1] == f"prefopt: stopped before the first step. {AGAIN}"
    assert "Traceback" not in said
    assert list(out.iterdir()) == []
    words = flags("dpo", model_folder(), pairs, out)
    said = server.run(words, prelude=prelude, code=130)
    assert said.splitlines()[-1] == f"prefopt: stopped before the first step. {KEPT}{AGAIN}"
    server.run(words)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for how in ("--resume", "--overwrite"):
        said = server.run([*words, how], prelude=prelude, code=130)
        assert said.splitlines()[-1] == f"prefopt: stopped before the first step. What {out} held is as it was. {KEPT}{AGAIN}"
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_what_was_computed_of_the_reference_is_kept(server: Server, model_folder: Callable[..., Path], pairs: str, tmp_path: Path):
    out = tmp_path / "run"
    words = flags("dpo", model_folder(), pairs, out, max_tokens=90)
    said = server.run(words, blow=Blow("sqlite3.connect", 4, "interrupt", 1), code=130)
    assert said.splitlines()[-1] == f"prefopt: stopped before the first step. {KEPT}{AGAIN}"
    assert "Traceback" not in said
    assert list(out.iterdir()) == []
    assert "values come from the cache" in server.run(words)


def test_the_handler_of_sigterm_is_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), stop_at_once():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


# While several processes tokenize. A terminal's Ctrl-C reaches all of them.

STARTING = """
import os, signal, threading
from prefopt.data import workers
class WithASignalSoon(workers.ProcessPoolExecutor):
    def __enter__(self):
        threading.Timer(0.2, os.killpg, (0, signal.SIGINT)).start()
        return super().__enter__()
workers.ProcessPoolExecutor = WithASignalSoon
"""

WORKING = """
import os, signal
from prefopt.data import workers
workers.freeze = lambda tree: os.killpg(0, signal.SIGINT)
"""

KILLED = WORKING.replace("os.killpg(0, signal.SIGINT)", "os.kill(os.getpid(), signal.SIGKILL)")


@pytest.mark.parametrize("prelude", [STARTING, WORKING, KILLED], ids=["while they start", "while they work", "killed"])
def test_no_process_that_tokenizes_is_left_behind(
    server: Server, model_folder: Callable[..., Path], pairs: str, tmp_path: Path, prelude: str
):
    child = server.start(flags("dpo", model_folder(), pairs, tmp_path / "run", data_workers=2), prelude=prelude)
    code = child.wait()
    all_gone(child)
    if prelude is KILLED:
        assert code == -signal.SIGKILL
    else:
        assert (code, child.said) == (130, f"prefopt: stopped before the first step. {KEPT}{AGAIN}\n")


def all_gone(child: Child, within_s: float = 20.0) -> None:
    """Nobody of the command's process group is there any more."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            os.killpg(child.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    os.killpg(child.pid, signal.SIGKILL)
    raise AssertionError("a process is left behind")


def test_the_end_of_the_terminal_in_a_run(server: Server, model_folder: Callable[..., Path], pairs: str, tmp_path: Path, whole: Path):
    out = tmp_path / "run"
    words = flags("dpo", model_folder(), pairs, out, **SETTINGS | {"save_every_steps": 100})
    child = server.start(words, blow=Blow(r"open run/metrics\.jsonl", 3, "wait"))
    while not (tmp_path / "struck").exists():
        assert child.poll() is None, child.said
        time.sleep(0.01)
    child.kill(signal.SIGHUP)
    child.kill(signal.SIGHUP)
    (tmp_path / "go").touch()
    assert child.wait() == 130
    assert len(losses(out)) == 3
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-000002", "step-000003"]  # the best, and the last
    server.run([*words, "--resume"])
    assert figures(out) == figures(whole)
