"""The metrics that people see while a run goes, in the order of their importance, and how numbers are written."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Shown:
    """A metric on the terminal.

    Attributes:
        name: in a row of metrics; held-out, with `eval/` before it.
        label: what it is called.
        decimals: of a number below 10; a larger one gets fewer.
        unit: stands behind the number.
        signed: may be negative, for which there is always room, so that columns stand still.
    """

    name: str
    label: str
    decimals: int = 4
    unit: str = ""
    signed: bool = False


METRICS = (
    Shown("loss", "loss"),
    Shown("rewards/margin", "margin", signed=True),
    Shown("rewards/accuracy", "accuracy", 2),
    Shown("rewards/chosen", "chosen", signed=True),
    Shown("rewards/rejected", "rejected", signed=True),
    Shown("rewards/desirable", "up", signed=True),
    Shown("rewards/undesirable", "down", signed=True),
    Shown("kl", "KL", 3),
)
"""What is learned: beside each other in training and held out."""

PACE = (Shown("tokens_per_second", "tokens/s", 0, " tokens/s"), Shown("memory_gb", "memory", 2, " GB"))
"""How fast, and at what cost."""


def number(shown: Shown, value: float, *, fewer: int = 0) -> str:
    """A value as it is shown, `fewer` decimals where there is little room; as wide for 12 as for 0.12."""
    if shown.decimals == 0:
        return f"{value:,.0f}"
    if not abs(value) < 1e6:  # nor is NaN
        return f"{value:.1e}"
    digits = len(str(int(abs(value))))
    return f"{value:.{max(0, max(2, shown.decimals - fewer) + 1 - digits)}f}"


def figures(row: Mapping[str, float], *, prefix: str = "") -> str:
    """The metrics of a row on one line; with the prefix `eval/`, the held-out ones."""
    learned = [f"{shown.label} {number(shown, row[prefix + shown.name])}" for shown in METRICS if prefix + shown.name in row]
    pace = [number(shown, row[shown.name]) + shown.unit for shown in PACE if shown.name in row and not prefix]
    return "  ".join([*learned, *pace])


def clock(seconds: float) -> str:
    """A duration as h:mm:ss or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Pace:
    """How long the rest of a stretch of work takes, by what was done since it began or was resumed.

    Args:
        total: steps of all.
        done: those done before.
        now: seconds on any clock that does not go back.
    """

    def __init__(self, total: int, done: int, now: float) -> None:
        self.total, self.first, self.done, self.started, self.last = total, done, done, now, now

    def step(self, done: int, now: float) -> None:
        """So many are done."""
        self.done, self.last = done, now

    def left(self, now: float) -> float | None:
        """Seconds that are left; None before the first step is done."""
        if self.done <= self.first:
            return None
        expected = (self.last - self.started) / (self.done - self.first) * (self.total - self.done)
        return max(0.0, expected - (now - self.last))
