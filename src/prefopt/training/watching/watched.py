"""What the watch sees and what it says: a run, its figures so far, and a finding."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any, Literal

Figures = Mapping[str, float]
"""A row of metrics, or the held-out figures before training."""

Severity = Literal["note", "warning"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What a rule has found.

    Attributes:
        rule: its name.
        step: after which it was found.
        severity: `note`: worth knowing; `warning`: the result will suffer.
        what: what is going on and why, in a sentence.
        do: what to change, in a sentence that names settings.
        values: the figures behind it.
    """

    rule: str
    step: int
    severity: Severity
    what: str
    do: str
    values: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class WatchedRun:
    """What the rules know of a run beside its metrics.

    Attributes:
        method: its name.
        settings: all of them, the method's own included.
        learning_rate, usual_learning_rate: the peak, and what is usual for the method, the model's size and adapter or not.
        adapter: whether an adapter is trained rather than all weights.
        num_train: examples.
        num_steps: of the whole run.
        reference_is_start: the reference is the model as it was before training.
        start_difference: mean |log π − log π_ref| per token before the first step, in nats; None where there is no reference.
        before: figures before training, `eval/...` and `samples/...`; empty where nothing is held out.
        data: the data's part of the summary.
        usual: settings of the method that have a usual range, with its ends.
    """

    method: str
    settings: Mapping[str, Any]
    learning_rate: float
    usual_learning_rate: float
    adapter: bool
    num_train: int
    num_steps: int
    reference_is_start: bool
    start_difference: float | None
    before: Figures
    data: Mapping[str, Any]
    usual: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def has_reference(self) -> bool:
        """Whether rewards and KL measure a distance from a reference."""
        return self.start_difference is not None

    @property
    def beta(self) -> float | None:
        """The method's β, where it has one."""
        return self.settings.get("beta")

    @property
    def batch_size(self) -> int:
        """Examples of a step."""
        return max(1, int(self.settings.get("batch_size", 1)))

    @property
    def num_epochs(self) -> float:
        """Passes over the data, of the whole run."""
        return self.num_steps * self.batch_size / max(1, self.num_train)

    @property
    def num_held_out(self) -> int:
        """Held-out examples."""
        return int(self.data.get("num_held_out", 0))

    @property
    def num_samples(self) -> int:
        """Answers drawn at each evaluation."""
        return min(int(self.settings.get("samples", 0)), self.num_held_out or self.num_train)

    def answer_length(self, *, held_out: bool = False) -> float | None:
        """Mean tokens of a chosen answer (of an answer, for demonstrations) in the training data, or in held-out data of its own."""
        summary = (self.data.get("eval_summary") if held_out else None) or self.data.get("summary") or {}
        return summary.get("mean_chosen") or summary.get("mean_answer") or None


@dataclass(frozen=True, slots=True)
class History:
    """A run so far, as rules look at it.

    Attributes:
        run: which.
        rows: metrics of all steps, oldest first; the k-th is of step k.
        evaluations: the rows that hold held-out figures or those of samples; first, where there are any, those before training.
    """

    run: WatchedRun
    rows: Sequence[Figures]
    evaluations: Sequence[Figures]

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return len(self.rows)

    @property
    def ranks_answers(self) -> bool:
        """Whether the method learns which answers are better, rather than to give those of the data."""
        return any("rewards/margin" in row for row in self.rows[:1]) or "eval/rewards/margin" in self.run.before

    def last(self, num: int, name: str) -> list[float]:
        """A metric in the newest rows, at most `num` of them, where it is there and finite."""
        return values(self.rows[-num:], name)

    def now(self, name: str) -> float | None:
        """A metric of the newest row, or before the first step of the figures before training."""
        newest = self.rows[-1] if self.rows else self.run.before
        return next(iter(values([newest], name)), None)

    def before(self, name: str) -> float | None:
        """A figure before training."""
        return next(iter(values([self.run.before], name)), None)


def values(rows: Iterable[Figures], name: str) -> list[float]:
    """A metric of these rows, where it is there and finite."""
    return [row[name] for row in rows if name in row and math.isfinite(row[name])]


def mean_and_error(numbers: Sequence[float]) -> tuple[float, float]:
    """The mean, and its standard error; 0 for a single number, whose spread is not known."""
    return fmean(numbers), stdev(numbers) / math.sqrt(len(numbers)) if len(numbers) > 1 else 0.0


def said(number: float) -> str:
    """A number as a sentence has it: three digits, or whole where it is large."""
    return f"{number:,.0f}" if 1000 <= abs(number) < 1e9 else f"{number:.3g}"
