"""What people read while a run goes."""

import io
import os
import re
import subprocess
import sys
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from prefopt.training.terminal import narrator
from prefopt.training.terminal.live import SteadyLive, View
from prefopt.training.terminal.narrator import Quiet, Terminal
from prefopt.training.terminal.outlet import Outlet
from prefopt.training.terminal.shown import METRICS, Pace, clock, figures, number
from prefopt.training.watching.watched import Finding

ROW = {
    "step": 3,
    "loss": 0.69314,
    "rewards/chosen": -0.12034,
    "rewards/rejected": -0.56341,
    "rewards/margin": 0.01234,
    "rewards/accuracy": 0.625,
    "logps/chosen": -200.0,
    "kl": 0.41234,
    "tokens_per_second": 12345.6,
    "memory_gb": 2.348,
    "grad_norm": 3.0,
}
HELD_OUT = {"eval/loss": 0.7, "eval/rewards/margin": 0.01, "eval/rewards/accuracy": 0.5}
WARNING = Finding("displacement", 10, "warning", "The chosen answers lose likelihood. " * 3, "Lower learning_rate to 1e-06.", {})
NOTE = Finding("rate", 40, "note", "The learning rate is high.", "Try 5e-07.", {})
HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"


@pytest.fixture
def terminal_of(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A narrator on a terminal of that width, and what it writes."""

    def make(width: int = 80, **variables: str) -> tuple[Terminal, io.StringIO]:
        for name, value in ({"TERM": "xterm", "FORCE_COLOR": "1", "COLUMNS": str(width), "LINES": "24"} | variables).items():
            monkeypatch.setenv(name, value)
        file = io.StringIO()
        return Terminal(file), file

    return make


def drawn(view: View, width: int, *, height: int = 24, encoding: str = "utf-8") -> list[str]:
    """The lines of a view on a terminal of that size."""
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=file, force_terminal=True, width=width, height=height, color_system=None)
    console.print(view)
    file.flush()
    return file.buffer.getvalue().decode(encoding).splitlines()  # type: ignore[attr-defined]


def view_of(row: dict[str, float], *findings: Finding, what: str = "training") -> View:
    view = View(what, 500, 0)
    view.step(200, row | HELD_OUT | {"step": 200})
    view.step(300, row)
    for finding in findings:
        view.find(finding)
    return view


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (9.4, "0:09"), (59.6, "1:00"), (754, "12:34"), (3600, "1:00:00"), (36_061, "10:01:01")]
)
def test_durations(seconds: float, text: str):
    assert clock(seconds) == text


def test_the_figures_of_a_step():
    assert figures(ROW) == (
        "loss 0.6931  margin 0.0123  accuracy 0.62  chosen -0.1203  rejected -0.5634  KL 0.412  12,346 tokens/s  2.35 GB"
    )
    assert figures({"loss": 1.0}) == "loss 1.0000"
    assert figures({}) == ""
    assert figures(ROW | HELD_OUT, prefix="eval/") == "loss 0.7000  margin 0.0100  accuracy 0.50"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.12345, "0.1235"), (-1.5, "-1.5000"), (12.3456, "12.346"), (-12345.6, "-12346"), (2e7, "2.0e+07"), (float("nan"), "nan")],
)
def test_numbers_take_the_same_room_whatever_their_size(value: float, text: str):
    assert number(METRICS[1], value) == text
    assert number(METRICS[1], 0.12345, fewer=1) == "0.123"


def test_the_time_left_counts_down_between_steps_and_never_below_nothing():
    pace = Pace(total=100, done=80, now=0.0)
    assert pace.left(5.0) is None
    pace.step(82, 20.0)
    assert pace.left(20.0) == 180.0
    assert pace.left(50.0) == 150.0
    assert pace.left(500.0) == 0.0


def test_sentences_stand_as_they_are():
    file = io.StringIO()
    long = "a word and another " * 20
    for line in (long, "[bold]not a style[/bold] :smile: [1, 2]", "two\nlines"):
        Terminal(file).say(line)
    assert file.getvalue() == f"{long}\n[bold]not a style[/bold] :smile: [1, 2]\ntwo\nlines\n"


def test_text_of_data_gives_a_terminal_no_orders():
    file = io.StringIO()
    Terminal(file).say("an answer \x1b[2J\x1b]0;title\x07 with\rand \x9b31m")
    assert file.getvalue() == "an answer \\x1b[2J\\x1b]0;title\\x07 with\\x0dand \\x9b31m\n"


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


def test_a_file_gets_evaluations_and_findings_as_lines_of_their_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(narrator.time, "monotonic", lambda: 0.0)
    file = io.StringIO()
    terminal = Terminal(file)
    with terminal.progress("training", 100) as ticker:
        ticker.step(1, {"loss": 0.5})
        ticker.step(2, {"loss": 0.5} | HELD_OUT)
        terminal.finding(NOTE)
    assert file.getvalue().splitlines() == [
        "training 2/100, 0:00 left  loss 0.5000",
        "training 2/100, held out  loss 0.7000  margin 0.0100  accuracy 0.50",
        "step 40, note: The learning rate is high.",
        "  Try 5e-07.",
    ]


@pytest.mark.parametrize("width", [140, 80, 60, 40, 20])
def test_the_view_fits_into_every_width(width: int):
    lines = drawn(view_of(ROW, WARNING, NOTE), width)
    assert all(len(line) <= width for line in lines)
    assert lines[0].startswith("training ")
    assert drawn(view_of(ROW, WARNING, NOTE), 1)  # whatever it looks like, nothing breaks


def test_the_view_shows_training_and_held_out_figures_one_above_the_other():
    lines = drawn(view_of(ROW, WARNING, NOTE), 80)
    assert lines[0].endswith("300/500   0:00 left   12,346 tokens/s   2.35 GB")
    assert [line.rstrip() for line in lines[1:4]] == [
        "            loss   margin  accuracy   chosen  rejected     KL",
        "training  0.6931   0.0123      0.62  -0.1203   -0.5634  0.412",
        "held out  0.7000   0.0100      0.50                             after step 200",
    ]
    assert lines[4].startswith("warning: The chosen answers lose")
    assert lines[-2:] == ["note: The learning rate is high.", "  → Try 5e-07."]


def test_where_there_is_little_room_numbers_lose_decimals_and_then_the_least_important_go():
    at_60, at_40 = (drawn(view_of(ROW), width) for width in (60, 40))
    assert at_60[1].split() == ["12,346", "tokens/s", "2.35", "GB"]
    assert at_60[2].split() == ["loss", "margin", "accuracy", "chosen", "rejected", "KL"]
    assert at_60[3].split() == ["training", "0.693", "0.012", "0.62", "-0.120", "-0.563", "0.41"]
    assert at_40[2].split() == ["loss", "margin", "accuracy"]


def test_where_the_terminal_is_low_the_older_finding_goes_first():
    view = view_of(ROW, WARNING, NOTE)
    assert sum("warning:" in line or "note:" in line for line in drawn(view, 80)) == 2
    low = drawn(view, 80, height=8)
    assert len(low) <= 7
    assert [line for line in low if "note:" in line]
    assert not [line for line in low if "warning:" in line]


def test_only_what_a_method_reports_is_shown():
    view = View("training", 10, 0)
    view.step(4, {"step": 4, "loss": 2.5, "logps/chosen": -40.0, "tokens_per_second": 900.0, "memory_gb": 0.5})
    assert [line.split() for line in drawn(view, 80)[1:]] == [["loss"], ["training", "2.5000"]]
    view = View("    reference", 10, 0)
    view.step(10, {})
    (line,) = drawn(view, 80)
    assert line.startswith("    reference ━━━━")
    assert line.endswith("10/10   in 0:00")


def test_a_terminal_without_letters_beyond_ascii_gets_none():
    lines = drawn(view_of(ROW, NOTE), 80, encoding="ascii")
    assert "#" in lines[0]
    assert lines[-1] == "  -> Try 5e-07."


def test_a_terminal_gets_a_live_view(terminal_of: Any):
    terminal, file = terminal_of(120)
    with terminal.progress("training", 4, done=1) as ticker:
        ticker.step(2, ROW)
        terminal.say("a word between")
    written = file.getvalue()
    assert "2/4" in written
    assert "0.6931" in written
    assert "a word between" in written
    assert written.index(HIDE) < written.rindex(SHOW)
    assert written.count("a word between") == 1


def test_a_terminal_keeps_the_newest_findings_in_sight_and_says_the_others_above(terminal_of: Any):
    terminal, file = terminal_of(80)
    first = Finding("old", 1, "note", "The oldest thing.", "Nothing.", {})
    with terminal.progress("training", 4) as ticker:
        ticker.step(1, ROW)
        for finding in (first, WARNING):
            terminal.finding(finding)
        assert terminal.live is not None
        assert "step 1, note: The oldest thing." not in file.getvalue()
        terminal.finding(NOTE)
        assert "step 1, note: The oldest thing." in file.getvalue()
        assert terminal.live.view.findings == [WARNING, NOTE]
    terminal.finding(first)  # outside of any stretch of work
    assert file.getvalue().endswith("step 1, note: The oldest thing.\n  Nothing.\n")


SCREENS = [("80", "24"), ("60", "24"), ("40", "12"), ("20", "5")]


@pytest.mark.parametrize(("width", "height"), SCREENS)
@pytest.mark.parametrize("error", [None, KeyboardInterrupt, RuntimeError])
def test_when_the_view_ends_every_finding_stands_there_in_full(
    terminal_of: Any, width: str, height: str, error: type[BaseException] | None
):
    long = [
        Finding(name, step, "warning", f"What {name} saw. " * 12, f"What to do against {name}. " * 9, {})
        for name, step in (("first", 10), ("second", 20), ("third", 30))
    ]
    terminal, file = terminal_of(int(width), LINES=height)
    with suppress(KeyboardInterrupt, RuntimeError), terminal.progress("training", 40) as ticker:
        for finding in long:
            ticker.step(finding.step, ROW | HELD_OUT | {"step": finding.step})
            terminal.finding(finding)
        if error is not None:
            raise error
    left = " ".join(re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", file.getvalue()).split())
    for finding in long:
        assert left.count(" ".join(f"step {finding.step}, warning: {finding.what} {finding.do}".split())) == 1
    ending = file.getvalue()[file.getvalue().rindex("30/40") :]
    assert "What first saw" not in ending  # said above when the third made it go
    assert "step 20, warning" in ending
    assert "step 30, warning" in ending
    assert "\nwarning:" not in ending  # and not a second time in the view that stays


def test_an_interruption_leaves_the_cursor_visible(terminal_of: Any):
    terminal, file = terminal_of()
    with pytest.raises(KeyboardInterrupt), terminal.progress("training", 4):
        raise KeyboardInterrupt
    assert file.getvalue().rindex(SHOW) > file.getvalue().rindex(HIDE)
    assert terminal.live is None
    assert not type(sys.stderr).__name__.startswith("FileProxy")


@pytest.mark.parametrize("variables", [{"TERM": "dumb"}, {"TERM": "unknown"}, {"TTY_INTERACTIVE": "0"}])
def test_a_terminal_that_cannot_move_its_cursor_gets_plain_lines(terminal_of: Any, variables: dict[str, str]):
    terminal, file = terminal_of(**variables)
    with terminal.progress("training", 1) as ticker:
        ticker.step(1, ROW)
    assert file.getvalue() == f"training 1/1, 0:00 left  {figures(ROW)}\n"


def test_no_color_is_respected(terminal_of: Any):
    terminal, file = terminal_of(NO_COLOR="1")
    with terminal.progress("training", 2) as ticker:
        ticker.step(1, ROW)
    assert "\x1b[36m" not in file.getvalue()
    terminal, file = terminal_of(NO_COLOR="")
    with terminal.progress("training", 2) as ticker:
        ticker.step(1, ROW)
    assert "\x1b[36m" in file.getvalue()


def test_a_terminal_that_claims_to_have_no_columns_gets_the_view_all_the_same(terminal_of: Any):
    terminal, file = terminal_of(width=0, LINES="0")
    with terminal.progress("training", 2) as ticker:
        ticker.step(1, ROW)
    assert "1/2" in file.getvalue()


def test_after_the_terminal_was_narrowed_the_view_finds_its_own_lines_again():
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=100, height=24)
    view = view_of(ROW)
    live = SteadyLive(view, console)
    live.auto_refresh = False
    with live:
        assert max(view.line_widths) == 99
        console.width = 50
        file.truncate(0)
        live.refresh()
        # 99 columns take two rows of 50, and so do the 67 of the last line: 1 + 1 more than the four lines that were drawn.
        rows = sum(-(-width // 50) for width in (99, 61, 61, 78))
        assert file.getvalue().split("training")[0].count("\x1b[1A") == rows - 1
        assert max(view.line_widths) <= 50


class Closed(io.StringIO):
    """A pipe whose reader has gone, after some lines."""

    def __init__(self, lines: int, error: Exception) -> None:
        super().__init__()
        self.left, self.error = lines, error

    def write(self, text: str) -> int:
        if self.left == 0:
            raise self.error
        self.left -= 1
        return super().write(text)


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(28, "No space left on device"), ValueError("I/O operation on closed file")])
def test_where_nobody_reads_any_more_the_run_goes_on_in_silence(error: Exception):
    file = Closed(1, error)
    terminal = Terminal(file)
    for _ in range(3):
        terminal.say("hello")
    with terminal.progress("training", 1) as ticker:
        ticker.step(1, ROW)
    terminal.finding(NOTE)
    assert file.getvalue() == "hello\n"
    assert terminal.file.is_closed


def test_letters_that_the_stream_does_not_know_become_question_marks():
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii", errors="strict")
    terminal = Terminal(file)
    terminal.say("β ≥ 0.1")
    terminal.say("plain")
    assert raw.getvalue() == b"? ? 0.1\nplain\n"
    assert not terminal.file.is_closed


def test_an_outlet_is_asked_like_the_stream_behind_it():
    assert Outlet(io.StringIO()).isatty() is False
    assert Outlet(io.StringIO()).encoding == "utf-8"
    with pytest.raises(OSError, match="fileno"):
        Outlet(io.StringIO()).fileno()


CHILD = """
import sys
from prefopt.training.terminal.narrator import Terminal
terminal = Terminal(sys.stderr if sys.argv[1] == "err" else sys.stdout)
row = {"loss": 0.5}
for step in range(5000):
    terminal.say(f"\\u03b2 line {step}")
with terminal.progress("training", 3) as ticker:
    for step in (1, 2, 3):
        ticker.step(step, row)
open(sys.argv[2], "w").write("done")
"""


@pytest.mark.parametrize("stream", ["err", "out"])
def test_with_head_at_the_other_end_of_the_pipe_the_run_ends_well(stream: str, tmp_path: Path):
    variables = os.environ | {"LC_ALL": "C", "PYTHONIOENCODING": "ascii:strict", "PYTHONUTF8": "0"}
    read, write = os.pipe()
    child = subprocess.Popen([sys.executable, "-c", CHILD, stream, str(tmp_path / "end")], stdout=write, stderr=write, env=variables)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        first = [pipe.readline() for _ in range(3)]
    assert child.wait(timeout=120) == 0
    letter = b"\\u03b2" if stream == "err" else b"?"  # Python writes it like this on standard error, whatever it is told
    assert first == [letter + b" line %d\n" % line for line in range(3)]
    assert (tmp_path / "end").read_text() == "done"


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]):
    quiet = Quiet()
    quiet.say("hello")
    quiet.finding(NOTE)
    with quiet.progress("training", 3) as ticker:
        ticker.step(1, ROW)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_speaks_on_standard_error(capsys: pytest.CaptureFixture[str]):
    Terminal().say("hello")
    assert capsys.readouterr() == ("", "hello\n")
