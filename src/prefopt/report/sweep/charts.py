"""The charts of a sweep: accuracy, margin and KL over what was swept, and accuracy against the KL that it cost."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prefopt.report.charts import Role, Scale, show
from prefopt.report.figures import METRICS
from prefopt.report.sweep.record import SweepRecord, SweptRun, label_of
from prefopt.report.text import setting

ROLES: tuple[Role, ...] = ("held", "train", "chosen", "rejected", "muted")
"""Colours of the lines, in their order."""


@dataclass(frozen=True, slots=True)
class Point:
    """A run in a chart.

    Attributes:
        x, y: where it stands.
        error: of `y`, drawn as a bar; None where it is not known.
        label: what is said of it under the pointer.
        name: what stands beside it where points are not joined.
    """

    x: float
    y: float
    error: float | None
    label: str
    name: str = ""


@dataclass(frozen=True, slots=True)
class Series:
    """Runs of one colour.

    Attributes:
        label: in the legend; empty where it is the only one.
        role: its colour.
        points: from the left to the right.
    """

    label: str
    role: Role
    points: tuple[Point, ...]


@dataclass(frozen=True, slots=True)
class SweepChart:
    """A chart.

    Attributes:
        title, unit: above it.
        says: how to read it, in a sentence.
        series: what is drawn; at least one, each with a point.
        ticks: names of the places 0, 1, 2, ... across; empty where numbers stand there.
        across: what the axis across counts.
        scale: of the upright axis.
        levels: dashed lines across: value and label.
        joined: whether neighbours of a series are joined by a line; points that are not are named.
    """

    title: str
    unit: str
    says: str
    series: tuple[Series, ...]
    ticks: tuple[str, ...]
    across: str
    scale: Scale = "plain"
    levels: tuple[tuple[float, str], ...] = ()
    joined: bool = True

    @property
    def description(self) -> str:
        """The chart in words, for those who cannot see it."""
        points = [f"{point.label}: {show(point.y, self.scale)}" for series in self.series for point in series.points]
        return f"{self.title}. {'; '.join(points)}."


def sweep_charts(record: SweepRecord) -> list[SweepChart]:
    """All charts that there are figures for."""
    if not record.finished:
        return []
    of_margin = (
        "β is a factor of every reward: with a larger one the same model has a larger margin."
        if "beta" in record.swept
        else "Reward of the chosen answer less that of the rejected."
    )
    found = [
        over_swept(
            record,
            (("rewards/accuracy", ""),),
            "Bars: one standard error to each side. Runs are judged on the same examples, so what two differ by is known better than "
            "the bars suggest.",
            scale="share",
            levels=((0.5, "chance"),),
        ),
        over_swept(record, (("rewards/margin", ""),), of_margin),
        over_swept(
            record,
            (("kl", "data's answers"), ("samples/kl", "own answers")),
            "How far each model has moved from its reference: what its accuracy was paid with.",
        ),
        frontier(record),
    ]
    if not any(run.after("rewards/accuracy") is not None for run in record.finished):
        length = over_swept(record, (("samples/length", ""),), "Mean length of the model's own answers.")
        found = [over_swept(record, (("loss", ""),), "Lower is better."), *found, length]
    return [chart for chart in found if chart is not None]


def axis_setting(record: SweepRecord) -> str:
    """The swept setting that stands across: that with the most values."""
    return max(record.swept, key=lambda name: len(record.swept[name]))


def ordered(values: Sequence[Any]) -> list[Any]:
    """Numbers by size, anything else as it was given."""
    is_number = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    return sorted(values) if is_number else list(values)


def over_swept(
    record: SweepRecord,
    metrics: Sequence[tuple[str, str]],
    says: str,
    *,
    scale: Scale = "plain",
    levels: tuple[tuple[float, str], ...] = (),
) -> SweepChart | None:
    """Metrics over the values of the setting that stands across; None where no run has them.

    Args:
        record: of the sweep.
        metrics: name and what it is called in the legend.
        says: how to read the chart.
        scale, levels: of the chart.
    """
    across = axis_setting(record)
    ticks = ordered(record.swept[across])
    known = [(name, label) for name, label in metrics if any(run.after(name) is not None for run in record.finished)]
    groups = by_others(record, across)
    if len(groups) > 1:
        known = known[-1:]  # a line for each combination of the others, of one metric
    series = []
    for name, label in known:
        for other, runs in groups.items():
            points = [
                Point(float(ticks.index(run.values[across])), value, run.error(name), run.label)
                for run in runs
                if (value := run.after(name)) is not None
            ]
            if points:
                words = other if len(groups) > 1 else label if len(known) > 1 else ""
                series.append((words, tuple(sorted(points, key=lambda point: point.x))))
    if not series:
        return None
    first = METRICS[known[0][0]]
    title = first.label if len(known) == 1 else "KL from the reference"
    coloured = tuple(Series(words, ROLES[min(place, len(ROLES) - 1)], points) for place, (words, points) in enumerate(series))
    unit = first.unit or "held out"
    return SweepChart(title, unit, says, coloured, tuple(map(setting, ticks)), across, scale, levels)


def by_others(record: SweepRecord, across: str) -> dict[str, list[SweptRun]]:
    """The finished runs by what else was swept."""
    found: dict[str, list[SweptRun]] = {}
    for run in record.finished:
        found.setdefault(label_of({name: value for name, value in run.values.items() if name != across}), []).append(run)
    return found


def frontier(record: SweepRecord) -> SweepChart | None:
    """Accuracy against KL, a point per run; None where fewer than two have both."""
    runs = [run for run in record.finished if run.after("rewards/accuracy") is not None]
    kl = next((name for name in ("samples/kl", "kl") if runs and all(run.after(name) is not None for run in runs)), None)
    if kl is None or len(runs) < 2:
        return None
    points = [
        Point(
            *(run.after(kl) or 0.0, run.after("rewards/accuracy") or 0.0, run.error("rewards/accuracy"), run.label),
            name=", ".join(map(setting, run.values.values())),
        )
        for run in runs
    ]
    on = "own answers" if kl == "samples/kl" else "data's answers"
    says = f"Up and to the left is better: more right for less. Beside each point stands its {' and '.join(record.swept)}."
    series = Series("", "held", tuple(sorted(points, key=lambda point: point.x)))
    return SweepChart("Accuracy against KL", f"nats per answer, {on}", says, (series,), (), "KL", "share", ((0.5, "chance"),), joined=False)
