"""The table of a sweep: a row per run, the same on a terminal and on the page."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from prefopt.report.figures import METRICS
from prefopt.report.sweep.best import find_best, warned_of_all
from prefopt.report.sweep.record import SweepRecord, SweptRun
from prefopt.report.text import NO_FIGURE, clip, count, duration, plain, setting


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the table.

    Attributes:
        title: above it.
        says: what stands in it, in a sentence.
        cells: one per run.
        is_number: set to the right.
        rank: how soon it is left out where there is no room; 0: never.
    """

    title: str
    says: str
    cells: tuple[str, ...]
    is_number: bool = True
    rank: int = 0


FIGURES = (
    ("rewards/accuracy", "accuracy", "share of held-out pairs whose chosen answer has the higher reward, with its standard error", 0),
    (
        "rewards/margin",
        "margin",
        "reward of the chosen answer less that of the rejected, held out, with its standard error; it grows with β",
        3,
    ),
    ("loss", "loss", "held out; with another β it is another loss", 2),
    ("kl", "KL", "from the reference on the data's held-out answers, in nats per answer", 0),
    ("samples/kl", "own KL", "from the reference on the model's own answers, in nats per answer", 1),
    ("samples/length", "tokens", "mean length of the model's own answers", 6),
)
"""Metric, title, what it says, and how soon it is left out."""


def columns(record: SweepRecord) -> list[Column]:
    """All columns in which something stands."""
    runs = record.runs
    found = [Column(name, "as swept", tuple(setting(run.values.get(name)) for run in runs)) for name in record.swept]
    if any(run.state != "finished" for run in runs):
        found.append(Column("state", "whether it came to its end", tuple(run.state for run in runs), is_number=False))
    found.append(
        Column(
            "steps", "optimizer steps that its model has seen", tuple(count(run.steps) if run.steps else NO_FIGURE for run in runs), rank=5
        )
    )
    for name, title, says, rank in FIGURES:
        if any(run.after(name) is not None for run in runs):
            found.append(Column(title, says, tuple(figure(name, run) for run in runs), rank=rank))
    shared = warned_of_all(record)
    if any(own := [watch(run, shared) for run in runs]):
        says = "what the watch warned of, where it still holds; what it says of every run is said above"
        found.append(Column("watch", says, tuple(own), is_number=False, rank=1))
    found.append(Column("time", "of its steps, evaluations included", tuple(duration(run.seconds) for run in runs), rank=4))
    return found


def figure(name: str, run: SweptRun) -> str:
    """`58.7 % ± 3.6 %`, the error only where it matters."""
    if name not in run.figures or run.after(name) is None:
        return NO_FIGURE
    change = run.figures[name]
    if name == "loss":
        return plain(change.after, 4)
    error = f" ± {change.shown_error()}" if change.error and name in ("rewards/accuracy", "rewards/margin") else ""
    return METRICS[name].show(change.after, change.error) + error


def watch(run: SweptRun, shared: Sequence[str]) -> str:
    """The rules that warn of it; the first two, and how many more."""
    rules = [finding.rule for finding in run.findings if finding.rule not in shared]
    return ", ".join(rules[:2]) + (f" +{len(rules) - 2}" if len(rules) > 2 else "")


def best_row(record: SweepRecord) -> int | None:
    """The place of the best run; None where there is no other that it is better than."""
    best = find_best(record)
    return record.runs.index(best.run) if best is not None and any(other.by for other in best.behind) else None


def fitting(found: list[Column], fits: Callable[[list[Column]], bool]) -> list[Column]:
    """The columns without those that have to go before the rest fits; what is left may still be too wide."""
    kept = list(found)
    while not fits(kept) and any(column.rank for column in kept):
        kept.remove(max(kept, key=lambda column: column.rank))
    return kept


def reasons(record: SweepRecord) -> list[tuple[str, str]]:
    """The runs that ended in an error, each with the first sentence of what it said; its own page has the rest."""
    failed = [run for run in record.runs if run.state == "failed" and run.message]
    return [(run.label, clip(re.split(r"(?<=[.!?])\s", run.message.strip())[0], 400)) for run in failed]
