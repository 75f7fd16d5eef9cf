"""What a run says while it goes: sentences, and a line of progress."""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from prefopt.training.watch import Finding

SHOWN = {"loss": "loss", "rewards/margin": "margin", "rewards/accuracy": "accuracy", "tokens_per_second": "tok/s", "memory_gb": "GB"}
"""Metrics of the progress line, and what they are called there."""


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
    """Speaks on a terminal with a live line, or in plain lines where the output is a file.

    Args:
        file: where to; the default is standard error, so that standard output stays free for results.
    """

    def __init__(self, file: TextIO | None = None) -> None:
        self.file = file or sys.stderr
        self.console = Console(file=self.file, highlight=False, emoji=False, soft_wrap=True)

    def say(self, line: str) -> None:
        """A sentence on a line of its own."""
        self.console.print(line, markup=False)

    def finding(self, finding: Finding) -> None:
        """What is going on, and what to change."""
        self.say(f"{finding.severity} at step {finding.step}: {finding.what} {finding.do}")

    @contextmanager
    def progress(self, what: str, total: int, done: int = 0) -> Iterator[Ticker]:
        """A live line on a terminal; elsewhere a line every few seconds and at the end."""
        if not self.console.is_terminal:
            yield _Lines(self, what, total, done)
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed}/{task.total}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, TextColumn("{task.fields[figures]}"), console=self.console) as live:
            yield _Live(live, live.add_task(what, total=total, completed=done, figures=""))


class _Silent:
    def step(self, done: int, row: Mapping[str, float]) -> None:
        pass


class _Live:
    def __init__(self, live: Progress, task: TaskID) -> None:
        self.live, self.task = live, task

    def step(self, done: int, row: Mapping[str, float]) -> None:
        self.live.update(self.task, completed=done, figures=figures(row))


class _Lines:
    INTERVAL_S = 10.0

    def __init__(self, terminal: Terminal, what: str, total: int, done: int) -> None:
        self.terminal, self.what, self.total, self.first = terminal, what, total, done
        self.started = self.last = time.monotonic()

    def step(self, done: int, row: Mapping[str, float]) -> None:
        now = time.monotonic()
        if done < self.total and now - self.last < self.INTERVAL_S:
            return
        self.last = now
        left = (now - self.started) / max(1, done - self.first) * (self.total - done)
        self.terminal.say(f"{self.what} {done}/{self.total}, {clock(left)} left  {figures(row)}".rstrip())


def figures(row: Mapping[str, float]) -> str:
    """The metrics of the progress line."""
    return "  ".join(f"{label} {_number(name, row[name])}" for name, label in SHOWN.items() if name in row)


def clock(seconds: float) -> str:
    """A duration as h:mm:ss or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _number(name: str, value: float) -> str:
    if name == "tokens_per_second":
        return f"{value:,.0f}"
    return f"{value:.2f}" if name in ("rewards/accuracy", "memory_gb") else f"{value:.4f}"
