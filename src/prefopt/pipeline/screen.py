"""Answers on a screen: side by side where a terminal is wide enough, one below the other where it is not, plain text elsewhere."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TextIO

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from prefopt.report.text import visible
from prefopt.rollout.stream import Stream

WIDE = 100
"""Columns of a terminal from which on two answers stand side by side: less than 48 for each is hard to read."""

GUTTER = 3
SECONDS_PER_FRAME = 0.05
SECONDS_PER_TURN = 0.1
"""How long one answer goes on before it is the other's turn: switching an adapter of many layers costs as much as some tokens."""

STYLES = {"policy": "bold green", "reference": "bold cyan"}


@dataclass(slots=True)
class Column:
    """One model's answer.

    Attributes:
        title: whose it is.
        text: the answer so far.
        note: what there is to say about it, below.
    """

    title: str
    text: str = ""
    note: str = ""

    def lines(self, console: Console, width: int) -> list[Text]:
        """Its lines at that width, the title first."""
        body = Text(shown(self.text.strip())).wrap(console, width)
        lines = [Text(self.title, style=STYLES.get(self.title, "bold")), *body]
        return [*lines, *Text(self.note, style="dim").wrap(console, width)] if self.note else lines


@dataclass(slots=True)
class Page:
    """The answers to one prompt.

    Attributes:
        columns: from left to right, or from top to bottom.
        growing: while they grow, what does not fit on the screen is left out at the top: the end is what one reads.
    """

    columns: Sequence[Column]
    growing: bool = False

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width, room = options.max_width, max(3, console.height - 2)
        if len(self.columns) < 2 or width < WIDE:
            stacked = [line for column in self.columns for line in (*column.lines(console, width), Text(""))][:-1]
            yield from self._end(stacked, room)
            return
        each = (width - GUTTER * (len(self.columns) - 1)) // len(self.columns)
        grid = Table.grid(padding=(0, GUTTER, 0, 0), pad_edge=False)
        sides = [column.lines(console, each) for column in self.columns]
        for _ in sides:
            grid.add_column(width=each, no_wrap=True)
        # The titles stay, whatever scrolls away below them.
        grid.add_row(*(side[0] for side in sides))
        grid.add_row(*(Text("\n").join(self._end(side[1:], room - 1)) for side in sides))
        yield grid

    def _end(self, lines: list[Text], room: int) -> list[Text]:
        return lines[-room:] if self.growing else lines


class Screen(Protocol):
    """Where answers appear."""

    def show(self, streams: Sequence[tuple[str, Stream]], note: Callable[[Stream], str], stopped: Callable[[], bool]) -> None:
        """Runs the streams to their ends, and shows what they write.

        Args:
            streams: each with the name of who writes it.
            note: what to say below an answer that is over.
            stopped: whether to break off; asked between tokens.
        """

    def say(self, line: str) -> None:
        """A sentence about what goes on."""


class LiveScreen:
    """A terminal: text appears as it is written."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def say(self, line: str) -> None:
        """A sentence, dimmed."""
        self.console.print(Text(line, style="dim"))

    def show(self, streams: Sequence[tuple[str, Stream]], note: Callable[[Stream], str], stopped: Callable[[], bool]) -> None:
        """Side by side both write at once, token by token in turn; one below the other each waits for the one above."""
        columns = [Column(name) for name, _ in streams]
        page = Page(columns, growing=True)
        at_once = self.console.width >= WIDE
        drawn = 0.0
        with Live(page, console=self.console, auto_refresh=False, vertical_overflow="visible") as live:
            seconds = SECONDS_PER_TURN if at_once else math.inf
            for place in taking_turns([stream for _, stream in streams], seconds=seconds, stopped=stopped):
                stream = streams[place][1]
                columns[place].text = stream.text
                if stream.stopped is not None:
                    columns[place].note = note(stream)
                if (now := time.monotonic()) - drawn > SECONDS_PER_FRAME:
                    live.refresh()
                    drawn = now
            for column, (_, stream) in zip(columns, streams, strict=True):
                column.note = note(stream)
            page.growing = False  # leaving draws it once more, and only once: what is longer than the screen cannot be drawn over
        self.console.print()


class PlainScreen:
    """Anything that is no terminal: one answer after the other, each with the name of who gives it.

    Args:
        file: where to.
    """

    def __init__(self, file: TextIO) -> None:
        self.file = file

    def say(self, line: str) -> None:
        """A sentence on a line of its own."""
        print(line, file=self.file, flush=True)

    def show(self, streams: Sequence[tuple[str, Stream]], note: Callable[[Stream], str], stopped: Callable[[], bool]) -> None:
        """The pieces as they come."""
        for name, stream in streams:
            print(f"{name}: ", end="", file=self.file)
            pieces = iter(stream)
            while not stopped() and (piece := next(pieces, None)) is not None:
                begins = not stream.text[: len(stream.text) - len(piece)].strip()
                print(piece.lstrip() if begins else piece, end="", file=self.file, flush=True)
            below = note(stream)
            print(f"\n{below}" if below else "", file=self.file, flush=True)
        print(file=self.file, flush=True)


def taking_turns(streams: Sequence[Stream], *, seconds: float, stopped: Callable[[], bool]) -> Iterator[int]:
    """Runs the streams in turns; gives the place of the one that wrote a token.

    Args:
        streams: not begun yet.
        seconds: how long a turn is, at least one token; infinite: each runs to its end before the next begins.
        stopped: whether to break off; asked before every token.
    """
    going = [(place, iter(stream)) for place, stream in enumerate(streams)]
    while going:
        still = []
        for place, pieces in going:
            began = time.monotonic()
            while True:
                if stopped():
                    return
                if next(pieces, None) is None:
                    break
                yield place
                if time.monotonic() - began >= seconds:
                    still.append((place, pieces))
                    break
        going = still


def shown(text: str) -> str:
    """Text that can do nothing to a terminal but stand on it: control characters are written out, tabs become spaces."""
    return visible(text).expandtabs(4)


def rule(console: Console, title: str) -> None:
    """A line across the terminal with a title in it."""
    console.print(Rule(Text(title), align="left", style="dim"))
