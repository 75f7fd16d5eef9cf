"""Held-out figures before and after training, with their standard errors: what verdict, cards and model card speak of."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prefopt.report.record import RunRecord
from prefopt.report.text import NO_FIGURE, plain, share


@dataclass(frozen=True, slots=True)
class Metric:
    """What is known of a metric.

    Attributes:
        label: its name for people.
        unit: of its values; empty where it has none.
        better: whether more or less of it is better; None where that depends.
        is_share: whether it is shown in percent.
        digits: after the point.
    """

    label: str
    unit: str = ""
    better: str | None = None
    is_share: bool = False
    digits: int = 3

    def show(self, value: float | None, error: float | None = None) -> str:
        """A value as people read it; the error only decides how many digits a share has."""
        return share(value, error) if self.is_share else plain(value, self.digits)


METRICS: Mapping[str, Metric] = {
    "rewards/accuracy": Metric("Accuracy", better="up", is_share=True),
    "rewards/margin": Metric("Margin", better="up"),
    "loss": Metric("Loss", better="down"),
    "kl": Metric("KL", "nats per answer", digits=2),
    "scores/mean": Metric("Mean score", digits=2),
    "scores/spread": Metric("Spread of one prompt's scores", digits=2),
    "rewards/chosen": Metric("Reward of the chosen answer"),
    "rewards/rejected": Metric("Reward of the rejected answer"),
    "rewards/desirable": Metric("Reward of answers with a thumb up"),
    "rewards/undesirable": Metric("Reward of answers with a thumb down"),
    "z0": Metric("Point of comparison (z0)", "nats per answer", digits=2),
    "logps/chosen": Metric("Log-probability of the chosen answer", "nats", digits=1),
    "logps/rejected": Metric("Log-probability of the rejected answer", "nats", digits=1),
    "logps/desirable": Metric("Log-probability of answers with a thumb up", "nats", digits=1),
    "logps/undesirable": Metric("Log-probability of answers with a thumb down", "nats", digits=1),
    "samples/kl": Metric("KL on its own answers", "nats per answer", digits=2),
    "samples/length": Metric("Length of sampled answers", "tokens", digits=0),
    "samples/repetition": Metric("Repetition in sampled answers", is_share=True),
    "samples/entropy": Metric("Entropy of sampled answers", "nats per token", digits=2),
    "samples/ended": Metric("Sampled answers that ended by themselves", is_share=True),
}
"""Metrics that every method reports under the same names; the order is that of the results' table."""


@dataclass(frozen=True, slots=True)
class Change:
    """A figure before and after training.

    Attributes:
        name: of the metric, without `eval/`.
        before, after: its values; None where there is none.
        error: standard error of `after` as an estimate for all examples of the kind; None where it cannot be known.
        change_error: that of `after - before`, from the differences of the same examples.
        num: examples behind it.
    """

    name: str
    before: float | None
    after: float | None
    error: float | None = None
    change_error: float | None = None
    num: int = 0

    @property
    def metric(self) -> Metric:
        """What is known of the metric."""
        return METRICS.get(self.name) or Metric(self.name)

    @property
    def difference(self) -> float | None:
        """`after - before`."""
        return None if self.before is None or self.after is None else self.after - self.before

    @property
    def errors_away(self) -> float | None:
        """How many of its standard errors the difference is away from 0; None where that cannot be known."""
        error = self.change_error or self.error  # differences that are all the same say nothing of how others would differ
        if self.difference is None or error is None:
            return None
        if error == 0:
            return 0.0 if self.difference == 0 else math.copysign(math.inf, self.difference)
        return self.difference / error

    def shown_before(self) -> str:
        """The figure before training, in as many digits as the one after."""
        return self.metric.show(self.before, self.error)

    def shown_after(self) -> str:
        """The newest figure."""
        return self.metric.show(self.after, self.error)

    def shown_error(self) -> str:
        """Its standard error; a dash where it is not known."""
        if self.error is None:
            return NO_FIGURE
        return share(self.error, self.error) if self.metric.is_share else f"{self.error:.{self.metric.digits}f}"


def changes(record: RunRecord) -> dict[str, Change]:
    """All held-out figures of a run, by metric; first those of `METRICS`, in its order.

    Where the single examples' figures are known, an error is s/√n of them, weighted examples counting with their effective
    number (Σw)²/Σw²; of an accuracy alone it is √(a(1−a)/n). An accuracy of 0 or 1 has the error of (k+1)/(n+2), since that
    no example differed does not say that none ever will.
    """
    before, after = record.held_out_figures(before=True), record.held_out_figures(before=False)
    found = {*before, *after}
    names = [name for name in METRICS if name in found] + sorted(found - set(METRICS))
    return {name: change_of(name, before.get(name), after.get(name), record) for name in names}


def change_of(name: str, before: float | None, after: float | None, record: RunRecord) -> Change:
    """One figure with its errors."""
    if name.startswith("samples/"):
        return Change(name, before, after, num=len({answer.row for answer in record.answers}))
    num = record.num_held_out
    # The examples' own figures are of the newest evaluation, which the saved model may not be from; of the loss they are sums.
    fits = name != "loss" and (not record.summary or record.held_out_step == record.model_step)
    rows = [example for example in record.held_out if fits and example.weight > 0]
    later = [(example.after[name], example.weight) for example in rows if name in example.after]
    both = [
        (example.after[name] - example.before[name], example.weight) for example in rows if name in example.after and name in example.before
    ]
    error = standard_error(later)
    if not error and name == "rewards/accuracy" and after is not None and num > 1:
        likely = after if 0 < after < 1 else (after * num + 1) / (num + 2)
        error = math.sqrt(max(likely * (1 - likely), 0.0) / num)
    return Change(name, before, after, error if after is not None else None, standard_error(both), num)


def standard_error(values: Sequence[tuple[float, float]]) -> float | None:
    """Standard error of a weighted mean.

    Args:
        values: each with its weight, which is positive.

    Returns:
        s/√n with s² the weighted variance n/(n−1)·Σw(x−x̄)²/Σw and n the effective number (Σw)²/Σw²; None below two.
    """
    total = sum(weight for _, weight in values)
    squares = sum(weight**2 for _, weight in values)
    if not squares:
        return None
    num = total**2 / squares
    if num < 1.5:  # two examples of very unequal weight are little more than one
        return None
    mean = sum(value * weight for value, weight in values) / total
    variance = sum(weight * (value - mean) ** 2 for value, weight in values) / total
    if variance <= (1e-12 * mean) ** 2:  # all the same but for rounding
        return 0.0
    return math.sqrt(variance / (num - 1))
