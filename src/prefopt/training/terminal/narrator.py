"""What a run says while it goes: sentences, and how it is getting on."""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, TextIO, cast

from rich.console import Console

from prefopt.training.terminal.live import SteadyLive, View
from prefopt.training.terminal.outlet import Outlet
from prefopt.training.terminal.shown import Pace, clock, figures
from prefopt.training.watching.watched import Finding

CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
"""What terminals take for orders. Texts of data and models are shown, and must not give any."""


class Ticker(Protocol):
    """Counts the steps of one stretch of work."""

    def step(self, done: int, row: Mapping[str, float]) -> None:
        """`done` steps are done; `row` holds the newest metrics."""


class Narrator(Protocol):
    """Where a run's words go."""

    def say(self, line: str) -> None:
        """A sentence for people."""

    def finding(self, finding: Finding) -> None:
        """What the watch has found."""

    def progress(self, what: str, total: int, done: int = 0) -> AbstractContextManager[Ticker]:
        """A stretch of work of `total` steps, `done` of them before."""


class Quiet:
    """Says nothing; for callers that speak themselves."""

    def say(self, line: str) -> None:
        """Nothing."""

    def finding(self, finding: Finding) -> None:
        """Nothing."""

    @contextmanager
    def progress(self, what: str, total: int, done: int = 0) -> Iterator[Ticker]:
        """A ticker that shows nothing."""
        yield _Silent()


class Terminal:
    """Speaks on a terminal with a live view, or in plain lines where the output is a file or a terminal that cannot move its cursor.

    Nothing that goes wrong with the output ends the run: where it cannot be written any more, this falls silent.

    Args:
        file: where to; the default is standard error, so that standard output stays free for results.
    """

    def __init__(self, file: TextIO | Outlet | None = None) -> None:
        self.file = file if isinstance(file, Outlet) else Outlet(file or sys.stderr)
        self.console = console_on(self.file)
        self.live: SteadyLive | None = None

    def say(self, line: str) -> None:
        """A sentence on a line of its own, above the live view where there is one. A terminal gets it broken between words."""
        self.console.print(line.translate(CONTROL), markup=False, soft_wrap=not self.console.is_interactive)

    def finding(self, finding: Finding) -> None:
        """What the watch has found: the newest stay below the live view's figures, and follow in full when it ends."""
        if self.live is None:
            self._say_finding(finding)
        elif displaced := self.live.view.find(finding):
            self._say_finding(displaced)

    @contextmanager
    def progress(self, what: str, total: int, done: int = 0) -> Iterator[Ticker]:
        """A live view on a terminal; elsewhere a line every few seconds and at the end."""
        if self.live is not None or not self.console.is_interactive:
            yield _Lines(self, what, total, done)
            return
        live = SteadyLive(View(what, total, done), self.console)
        held: list[Finding] = []
        try:
            with live:
                self.live = live
                try:
                    yield live.view
                finally:
                    held = live.view.take_findings()
        finally:  # an interruption may fall into the end of the view too
            self.live = None
            self.console.show_cursor(True)
            for finding in held:  # the view had room for a part of it at best, and nothing for its step
                self._say_finding(finding)

    def _say_finding(self, finding: Finding) -> None:
        self.say(f"step {finding.step}, {finding.severity}: {finding.what}\n  {finding.do}")


def console_on(file: Outlet, *, soft_wrap: bool = True) -> Console:
    """A console that takes text as it is; `soft_wrap`: also where it is longer than a line."""
    stream = cast(TextIO, file)  # it has all of a TextIO that rich asks for
    console = Console(file=stream, highlight=False, emoji=False, soft_wrap=soft_wrap)
    if console.width < 1 or console.height < 1:  # COLUMNS=0, as some shells in containers have it
        console = Console(file=stream, highlight=False, emoji=False, soft_wrap=soft_wrap, width=80, height=25)
    return console


class _Silent:
    def step(self, done: int, row: Mapping[str, float]) -> None:
        pass


class _Lines:
    INTERVAL_S = 10.0

    def __init__(self, terminal: Terminal, what: str, total: int, done: int) -> None:
        self.terminal, self.what, self.total = terminal, what, total
        self.last = time.monotonic()
        self.pace = Pace(total, done, self.last)

    def step(self, done: int, row: Mapping[str, float]) -> None:
        now = time.monotonic()
        self.pace.step(done, now)
        held_out = figures(row, prefix="eval/")
        if done < self.total and now - self.last < self.INTERVAL_S and not held_out:
            return
        self.last = now
        left = self.pace.left(now)
        time_left = f", {clock(left)} left" if left is not None else ""
        self.terminal.say(f"{self.what} {done}/{self.total}{time_left}  {figures(row)}".rstrip())
        if held_out:
            self.terminal.say(f"{self.what} {done}/{self.total}, held out  {held_out}")
