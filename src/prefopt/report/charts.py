"""Which charts a run's page has, what is in them, and the sentence that says what good looks like."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from prefopt.report.curves import central_range, column
from prefopt.report.metrics import Curve
from prefopt.report.record import RunRecord, mapping
from prefopt.report.text import number, plain, rate, share, visible

Role = Literal["train", "held", "chosen", "rejected", "muted"]
"""What a line stands for, which is its colour."""

Scale = Literal["plain", "share", "rate", "count"]
"""How the values on the axis are written."""


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a chart.

    Attributes:
        label: in the legend; empty where it is the chart's only line.
        role: its colour.
        curve: its points; at least one.
        is_held_out: drawn dashed, with a mark at each evaluation; else as a curve with a smooth line.
        is_noisy: whether a smooth line helps; a schedule has no noise.
    """

    label: str
    role: Role
    curve: Curve
    is_held_out: bool = False
    is_noisy: bool = True


@dataclass(frozen=True, slots=True)
class Level:
    """A dashed line across a chart, at a value that the curves are read against."""

    value: float
    label: str


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart of metrics over the steps.

    Attributes:
        key: names it among the page's charts.
        title, unit: above it.
        says: what good looks like, in a sentence.
        lines, levels: what is drawn; at least one line.
        scale: of the axis.
        low: where the axis ends at the latest; None where the values decide.
        beyond: what the eye may miss, in words: peaks outside the axis, the lowest held-out loss; may be empty.
    """

    key: str
    title: str
    unit: str
    says: str
    lines: tuple[Line, ...]
    levels: tuple[Level, ...] = ()
    scale: Scale = "plain"
    low: float | None = None
    beyond: str = ""

    @property
    def description(self) -> str:
        """The chart in words, for those who cannot see it."""
        return f"{self.title} over the steps. " + " ".join(
            f"{line.label or self.title}: {show(line.curve.values[0], self.scale)} at step {line.curve.steps[0]:.0f}, "
            f"{show(line.curve.values[-1], self.scale)} at step {line.curve.steps[-1]:.0f}, "
            f"lowest {show(min(line.curve.values), self.scale)}, highest {show(max(line.curve.values), self.scale)}."
            for line in self.lines
        )


@dataclass(frozen=True, slots=True)
class Group:
    """Charts that answer the same question."""

    title: str
    charts: tuple[Chart, ...]


@dataclass(frozen=True, slots=True)
class Spec:
    """A chart as it would be if all of its metrics were there: (metric, label, role) of its lines over the steps."""

    key: str
    title: str
    unit: str
    says: str
    lines: Sequence[tuple[str, str, Role]]
    levels: Sequence[Level] = ()
    scale: Scale = "plain"
    low: float | None = None


CHANCE = Level(0.5, "chance")
ZERO = Level(0.0, "")

SPECS: Mapping[str, Sequence[Spec]] = {
    "Does it learn?": (
        Spec(
            "loss",
            "Loss",
            "",
            "Should fall, and the held-out line with it: where that turns upwards while the other still falls, the model learns its "
            "examples by heart.",
            [("loss", "trained on", "train"), ("eval/loss", "held out", "held")],
        ),
        Spec(
            "accuracy",
            "Accuracy",
            "",
            "Share of pairs whose chosen answer has the higher reward, or of single answers whose reward agrees with their thumb. Held "
            "out, 60 to 75 % is usual for what people prefer; what stays near 50 % was not learned.",
            [("rewards/accuracy", "trained on", "train"), ("eval/rewards/accuracy", "held out", "held")],
            levels=[CHANCE],
            scale="share",
        ),
        Spec(
            "margin",
            "Margin",
            "",
            "Reward of the chosen answer less that of the rejected. Should rise; held out, less than on the examples trained on.",
            [("rewards/margin", "trained on", "train"), ("eval/rewards/margin", "held out", "held")],
            levels=[ZERO],
        ),
        Spec(
            "rewards",
            "Rewards",
            "",
            "How much more likely than under the reference each answer has become, times β. Best where the chosen rises and the rejected "
            "falls; common, and worth a look below, where both fall.",
            [
                ("rewards/chosen", "chosen", "chosen"),
                ("rewards/rejected", "rejected", "rejected"),
                ("eval/rewards/chosen", "chosen, held out", "chosen"),
                ("eval/rewards/rejected", "rejected, held out", "rejected"),
            ],
            levels=[ZERO],
        ),
        Spec(
            "scores",
            "Scores of the answers",
            "",
            "A reward model's scores: their mean, which says nothing by itself and should not drift far, and their standard deviation "
            "among the answers to one prompt, which grows as it learns to tell them apart and should level off.",
            [
                ("scores/mean", "mean", "train"),
                ("eval/scores/mean", "mean, held out", "train"),
                ("scores/spread", "spread", "chosen"),
                ("eval/scores/spread", "spread, held out", "chosen"),
            ],
            levels=[ZERO],
        ),
        Spec(
            "thumbs",
            "Rewards",
            "",
            "How much more likely than under the reference answers with a thumb up and with a thumb down have become, times β. The two "
            "should part.",
            [
                ("rewards/desirable", "thumb up", "chosen"),
                ("rewards/undesirable", "thumb down", "rejected"),
                ("eval/rewards/desirable", "thumb up, held out", "chosen"),
                ("eval/rewards/undesirable", "thumb down, held out", "rejected"),
            ],
            levels=[ZERO],
        ),
    ),
    "What does it cost?": (
        Spec(
            "kl",
            "KL from the reference",
            "nats per answer",
            "How far the model has moved from its reference on the data's answers; its own, where those could be measured, say it best. "
            "Should rise slowly and level off; what was learned has to be worth it.",
            [("kl", "trained on", "train"), ("eval/kl", "held out", "held"), ("samples/kl", "its own answers", "chosen")],
            low=0.0,
        ),
        Spec(
            "logps",
            "Log-probabilities of the answers",
            "nats per answer",
            "That of the chosen answers should stay level or rise. Where it falls far, probability goes to answers that nobody has seen.",
            [
                ("logps/chosen", "chosen", "chosen"),
                ("logps/rejected", "rejected", "rejected"),
                ("eval/logps/chosen", "chosen, held out", "chosen"),
                ("eval/logps/rejected", "rejected, held out", "rejected"),
            ],
        ),
        Spec(
            "length",
            "Length of its answers",
            "tokens",
            "Sampled at each evaluation, on the prompts below. Should stay near what the data holds: growth without end is a way to please "
            "without being better.",
            [("samples/length", "", "held")],
            low=0.0,
        ),
        Spec(
            "entropy",
            "Entropy of its answers",
            "nats per token",
            "How unsure the model is of each token that it draws. A fall to near 0 says that it gives the same answer whatever happens.",
            [("samples/entropy", "", "held")],
            low=0.0,
        ),
        Spec(
            "repetition",
            "Repetition in its answers",
            "",
            "Share of stretches of four tokens that the same answer has held before. Should stay near 0.",
            [("samples/repetition", "", "held")],
            scale="share",
            low=0.0,
        ),
    ),
    "Does it run smoothly?": (
        Spec(
            "grad_norm",
            "Gradient norm",
            "",
            "Before clipping. Should be steady: spikes come from odd examples or from a learning rate that is too high.",
            [("grad_norm", "", "train")],
            low=0.0,
        ),
        Spec(
            "learning_rate",
            "Learning rate",
            "",
            "As the schedule gave it.",
            [("learning_rate", "", "train")],
            scale="rate",
            low=0.0,
        ),
        Spec(
            "tokens_per_second",
            "Speed",
            "tokens per second",
            "Should be steady; a slow stretch is other work on the machine, or longer examples.",
            [("tokens_per_second", "", "train")],
            scale="count",
            low=0.0,
        ),
    ),
}

ANSWERS_LOGPS = Spec(
    "logps",
    "Log-probability of the answers",
    "nats per answer",
    "Should rise: per token, and with its sign turned, it is the loss.",
    [("logps/chosen", "trained on", "train"), ("eval/logps/chosen", "held out", "held")],
)
"""What stands for the chart of chosen and rejected answers where there are no pairs."""

ELSEWHERE = frozenset({"epoch", "seconds", "examples_per_second", "memory_gb", "samples/ended"})
"""Metrics that tables and cards show."""

MOST_OTHERS = 12
"""Charts of metrics that no chart above knows; a method of the user's own may report any number."""


def groups(record: RunRecord) -> list[Group]:
    """All charts of a run; those without a point are left out."""
    before = record.held_out_figures(before=True)
    known = {name for specs in SPECS.values() for spec in specs for name, _, _ in spec.lines} | ELSEWHERE
    others = sorted({name.removeprefix("eval/") for name in record.metrics.curves if name not in known})[:MOST_OTHERS]
    wanted = {**(SPECS if record.is_pairs or record.is_thumbs else without_pairs()), "Other figures": [other(name) for name in others]}
    drawn = {title: tuple(chart for spec in specs if (chart := chart_of(spec, record, before))) for title, specs in wanted.items()}
    return [Group(title, charts) for title, charts in drawn.items() if charts]


def without_pairs() -> dict[str, Sequence[Spec]]:
    """The charts where examples are single answers, which have no side to be preferred to."""
    learning, costs, smoothness = SPECS.values()
    own = [spec for spec in costs if spec.key != "logps"]
    return {"Does it learn?": [*learning, ANSWERS_LOGPS], "How does it answer?": own, "Does it run smoothly?": smoothness}


def other(name: str) -> Spec:
    """A chart of a metric that none above knows."""
    lines: list[tuple[str, str, Role]] = [(name, "trained on", "train"), (f"eval/{name}", "held out", "held")]
    return Spec(f"other-{name}", visible(name), "", "A figure of this method's own.", lines)


def chart_of(spec: Spec, record: RunRecord, before: Mapping[str, float]) -> Chart | None:
    """The chart with the run's figures in it; None where there are none.

    Args:
        spec: what belongs in it.
        record: of the run.
        before: figures before training, as `RunRecord.held_out_figures` gives them.
    """
    if spec.key == "rewards" and record.is_reward_model:
        spec = replace(spec, says="Mean scores of chosen and of rejected answers. The two should part; where both lie says nothing.")
    lines = tuple(
        Line(label, role, curve, is_held_out=name.startswith(("eval/", "samples/")), is_noisy=name != "learning_rate")
        for name, label, role in spec.lines
        if (curve := curve_with_start(name, record, before))
    )
    if not lines:
        return None
    low, high = limits(lines)
    levels = [*spec.levels, *more_levels(spec.key, record)]
    near = tuple(level for level in levels if level.value <= high + 2 * (high - low) or level in spec.levels)
    notes = [f"{level.label} is {show(level.value, spec.scale)}" for level in levels if level not in near] + peaks_beyond(lines, spec.scale)
    beyond = f"Beyond the axis: {', '.join(notes)}." if notes else ""
    if spec.key == "loss" and len(held_out := record.metrics.curve("eval/loss")) > 1:
        lowest = min(range(len(held_out)), key=lambda place: held_out.values[place])
        beyond = joined(
            f"Held out it was lowest, {show(held_out.values[lowest], spec.scale)}, at step {held_out.steps[lowest]:,.0f}.", beyond
        )
    return Chart(spec.key, spec.title, spec.unit, spec.says, lines, near, spec.scale, spec.low, beyond)


def curve_with_start(name: str, record: RunRecord, before: Mapping[str, float]) -> Curve:
    """A metric's curve; of one that is taken at evaluations the figure before training comes first."""
    curve = record.metrics.curve(name)
    start = before.get(name.removeprefix("eval/")) if name.startswith(("eval/", "samples/")) else None
    if start is None or (curve and curve.steps[0] == 0):
        return curve
    whole = Curve()
    whole.add(0.0, start)
    whole.steps.extend(curve.steps)
    whole.values.extend(curve.values)
    return whole


def more_levels(key: str, record: RunRecord) -> list[Level]:
    """Lines across a chart that depend on the run."""
    if key == "kl" and (budget := number(record.settings.get("kl_budget"))) is not None:
        return [Level(budget, "kl_budget")]
    if key == "length" and (mean := number(mapping(record.data.get("summary")).get("mean_answer"))):
        return [Level(mean, "answers of the data")]
    return []


def joined(*sentences: str) -> str:
    """Those that say something."""
    return " ".join(filter(None, sentences))


def limits(lines: Sequence[Line]) -> tuple[float, float]:
    """Lowest and highest value that the axis must show."""
    ranges = [central_range(column(line.curve.values)) for line in lines]
    return min(low for low, _ in ranges), max(high for _, high in ranges)


def peaks_beyond(lines: Sequence[Line], scale: Scale) -> list[str]:
    """The highest and the lowest value of each line that do not fit on the axis, in words."""
    low, high = limits(lines)
    found = []
    for line in lines:
        values = column(line.curve.values)
        outside = [
            int(place) for place, is_out in ((values.argmax(), values.max() > high), (values.argmin(), values.min() < low)) if is_out
        ]
        found += [f"{show(values[place], scale)} at step {line.curve.steps[place]:,.0f}" for place in outside]
    return found


def show(value: float, scale: Scale) -> str:
    """A value as the chart writes it."""
    if scale == "share":
        return share(value)
    if scale == "rate":
        return rate(value)
    return plain(value, 0 if scale == "count" else 3)


@dataclass(frozen=True, slots=True)
class Mark:
    """A place on the charts where the watch found something.

    Attributes:
        step: after which.
        numbers: of the findings, as the page counts them.
        is_warning: one of them at least.
    """

    step: int
    numbers: tuple[int, ...]
    is_warning: bool


def marks(record: RunRecord) -> list[Mark]:
    """One mark per step at which something was found, in the order of the steps; what is known before the first has none."""
    found: dict[int, list[int]] = {}
    for place, finding in enumerate(record.findings, start=1):
        if finding.step > 0:
            found.setdefault(finding.step, []).append(place)
    return [
        Mark(step, tuple(places), any(record.findings[place - 1].is_warning for place in places)) for step, places in sorted(found.items())
    ]
