"""What people read while a run goes."""

import io
from itertools import count

import pytest

from prefopt.training import narrator
from prefopt.training.narrator import Quiet, Terminal, clock, figures

ROW = {
    "step": 3,
    "loss": 0.69314,
    "rewards/margin": 0.01234,
    "rewards/accuracy": 0.625,
    "tokens_per_second": 12345.6,
    "memory_gb": 2.348,
    "grad_norm": 3.0,
}


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (9.4, "0:09"), (59.6, "1:00"), (754, "12:34"), (3600, "1:00:00"), (36_061, "10:01:01")]
)
def test_durations(seconds: float, text: str):
    assert clock(seconds) == text


def test_the_figures_of_a_step():
    assert figures(ROW) == "loss 0.6931  margin 0.0123  accuracy 0.62  tok/s 12,346  GB 2.35"
    assert figures({"loss": 1.0}) == "loss 1.0000"
    assert figures({}) == ""


def test_sentences_stand_as_they_are():
    file = io.StringIO()
    long = "a word and another " * 20
    for line in (long, "[bold]not a style[/bold] :smile: [1, 2]", "two\nlines"):
        Terminal(file).say(line)
    assert file.getvalue() == f"{long}\n[bold]not a style[/bold] :smile: [1, 2]\ntwo\nlines\n"


def test_a_file_gets_a_line_now_and_then_and_one_at_the_end(monkeypatch: pytest.MonkeyPatch):
    ticks = count(100.0, 4.0)
    monkeypatch.setattr(narrator.time, "monotonic", lambda: next(ticks))
    file = io.StringIO()
    with Terminal(file).progress("training", 8) as ticker:
        for done in range(1, 9):
            ticker.step(done, ROW)
    found = file.getvalue().splitlines()
    assert [line.split("  ")[0] for line in found] == ["training 3/8, 0:20 left", "training 6/8, 0:08 left", "training 8/8, 0:00 left"]
    assert all("loss 0.6931" in line for line in found)


def test_the_time_left_of_a_resumed_run_counts_its_own_steps(monkeypatch: pytest.MonkeyPatch):
    ticks = iter([0.0, 20.0])
    monkeypatch.setattr(narrator.time, "monotonic", lambda: next(ticks))
    file = io.StringIO()
    with Terminal(file).progress("training", 100, done=80) as ticker:
        ticker.step(82, {})
    assert file.getvalue() == "training 82/100, 3:00 left\n"


def test_a_terminal_gets_a_live_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    file = io.StringIO()
    terminal = Terminal(file)
    assert terminal.console.is_terminal
    with terminal.progress("training", 4, done=1) as ticker:
        ticker.step(2, ROW)
        terminal.say("a word between")
    assert "2/4" in file.getvalue()
    assert "loss 0.6931" in file.getvalue()
    assert "a word between" in file.getvalue()


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]):
    quiet = Quiet()
    quiet.say("hello")
    with quiet.progress("training", 3) as ticker:
        ticker.step(1, ROW)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_speaks_on_standard_error(capsys: pytest.CaptureFixture[str]):
    Terminal().say("hello")
    assert capsys.readouterr() == ("", "hello\n")
