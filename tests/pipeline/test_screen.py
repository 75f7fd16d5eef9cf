"""Screens: side by side where there is room, the end of a growing answer in view, and nothing a model writes acts on a terminal."""

import math
from collections.abc import Iterator, Sequence
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from prefopt.pipeline.screen import Column, LiveScreen, Page, PlainScreen, shown, taking_turns


class FakeStream:
    """A stream of given pieces; `log` notes whose turn it was."""

    def __init__(self, pieces: Sequence[str], log: list[str] | None = None, name: str = "") -> None:
        self.pieces, self.log, self.name = pieces, log if log is not None else [], name
        self.text = ""
        self.ids: list[int] = []
        self.stopped: str | None = None

    def __iter__(self) -> Iterator[str]:
        for place, piece in enumerate(self.pieces):
            self.log.append(self.name)
            self.ids.append(place)
            self.text += piece
            if place == len(self.pieces) - 1:
                self.stopped = "end"
            yield piece


def drawn(page: Page, width: int, height: int = 40) -> list[str]:
    console = Console(file=StringIO(), width=width, height=height, force_terminal=False, color_system=None)
    console.print(page)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]


def two(growing: bool = False) -> Page:
    return Page([Column("reference", " one two three"), Column("policy", " four\nfive", "(cut)")], growing)


def test_wide_is_side_by_side_and_narrow_is_stacked():
    assert drawn(two(), 100) == [
        "reference".ljust(51) + "policy",
        "one two three".ljust(51) + "four",
        " " * 51 + "five",
        " " * 51 + "(cut)",
    ]
    assert drawn(two(), 99) == ["reference", "one two three", "", "policy", "four", "five", "(cut)"]
    assert drawn(Page([Column("policy", "alone")]), 200) == ["policy", "alone"]


def test_long_lines_are_wrapped_between_words_and_long_words_inside():
    text = "word " * 30 + "x" * 130
    for width in (60, 140):
        lines = drawn(Page([Column("reference", text), Column("policy", text)]), width)
        assert max(map(len, lines)) <= width
        assert sum(line.count("x") for line in lines) == 2 * 130
        assert sum(line.split().count("word") for line in lines) == 2 * 30


@pytest.mark.parametrize("width", [60, 140])
def test_what_grows_beyond_the_screen_shows_its_end_and_when_done_all(width: int):
    text = "\n".join(f"line {number}" for number in range(50))
    columns = [Column("reference", "short"), Column("policy", text)]
    growing = drawn(Page(columns, growing=True), width, height=12)
    assert len(growing) <= 11
    assert "line 49" in growing[-1]
    assert not any("line 0" in line.split("   ") for line in growing)
    assert sum("line " in line for line in drawn(Page(columns), width, height=12)) == 50


def test_control_characters_are_written_out_and_text_of_all_languages_is_left_alone():
    assert shown("a\x1b[2J\x07\x9b\x7f\r\x00b") == "a\\x1b[2J\\x07\\x9b\\x7f\\r\\x00b"
    assert shown("a\tb\n") == "a   b\n"
    for text in ("naïve 好 שלום", "👩\u200d👩\u200d👧", "1\u00a0000", "line\nline"):
        assert shown(text) == text
    assert shown("\ud800") == "\\ud800"


def test_markup_in_answers_is_text():
    assert drawn(Page([Column("policy", "[bold]x[/bold] [link=http://a]y[/link] :smile:")]), 80)[1] == (
        "[bold]x[/bold] [link=http://a]y[/link] :smile:"
    )


def test_streams_take_turns_of_some_seconds_or_wait_for_each_other():
    for seconds, order in ((0.0, "ababa"), (math.inf, "aaabb")):
        log: list[str] = []
        streams: Any = [FakeStream(["x"] * 3, log, "a"), FakeStream(["y"] * 2, log, "b")]
        steps = list(taking_turns(streams, seconds=seconds, stopped=lambda: False))
        assert "".join(log) == order
        assert steps == ["ab".index(name) for name in order]


def test_a_stop_is_heeded_between_tokens_also_where_no_text_comes():
    log: list[str] = []
    streams: Any = [FakeStream([""] * 1000, log, "a"), FakeStream([""] * 1000, log, "b")]
    list(taking_turns(streams, seconds=0.0, stopped=lambda: len(log) >= 7))
    assert len(log) == 7


def show(screen: Any, *streams: FakeStream, stopped: Any = lambda: False) -> None:
    screen.show([(stream.name, stream) for stream in streams], lambda stream: "" if stream.stopped else "(stopped)", stopped)


def test_plain_text_for_pipes():
    out = StringIO()
    screen = PlainScreen(out)
    screen.say("hello")
    show(screen, FakeStream([" ", " one", "\n two "], name="reference"), FakeStream(["", "x", "y"], name="policy"))
    assert out.getvalue() == "hello\nreference: one\n two \npolicy: xy\n\n"
    out.truncate(0)
    out.seek(0)
    show(screen, FakeStream(["x", "y"], name="policy"), stopped=lambda: True)
    assert out.getvalue() == "policy: \n(stopped)\n\n"


@pytest.mark.parametrize("width", [60, 120])
def test_a_terminal_ends_with_all_of_both_answers(width: int):
    out = StringIO()
    console = Console(
        file=out, width=width, height=10, force_terminal=True, color_system=None, legacy_windows=False, _environ={"TERM": "xterm"}
    )
    long = FakeStream([f" word{number}" for number in range(400)], name="policy")
    show(LiveScreen(console), FakeStream([" one"], name="reference"), long)
    last_frame = out.getvalue().rpartition("\x1b[2K")[2]
    assert all(f"word{number}" in last_frame for number in range(400))
    assert last_frame.count("policy") == 1
    assert "\x1b[?25h" in out.getvalue()  # the cursor is back


def test_the_cursor_comes_back_after_an_interrupt():
    out = StringIO()
    console = Console(
        file=out, width=120, height=10, force_terminal=True, color_system=None, legacy_windows=False, _environ={"TERM": "xterm"}
    )

    def interrupt() -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        show(LiveScreen(console), FakeStream(["x"], name="policy"), stopped=interrupt)
    assert out.getvalue().rstrip().endswith("\x1b[?25h")
