"""What the watch sees and what it says: a run, its figures so far, and a finding."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any, Literal

Figures = Mapping[str, float]
"""A row of metrics, or the held-out figures before training."""

Severity = Literal["note", "warning"]

WINDOW = 20
"""Steps that a mean is taken over: enough for a standard error, few enough to be about now."""

SURE = 2.0
"""Standard errors that a figure must be beyond a bound."""


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
        num_samples: answers drawn at each evaluation; fewer than were asked for where prompts are the same or too long.
        num_steps: of the whole run.
        begins_at_reference: the run begins where its reference is: the reference is, or was when training began, the model itself.
        start_difference: mean |log π − log π_ref| per token before the first step, in nats; None where there is no reference.
        before: figures before training, `eval/...` and `samples/...`; empty where nothing is held out.
        data: the data's part of the summary.
        first_length: mean tokens of a chosen answer (of an answer, for demonstrations) in the first step; None where it is not known.
        usual: settings of the method that have a usual range, with its ends.
    """

    method: str
    settings: Mapping[str, Any]
    learning_rate: float
    usual_learning_rate: float
    adapter: bool
    num_train: int
    num_samples: int
    num_steps: int
    begins_at_reference: bool
    start_difference: float | None
    before: Figures
    data: Mapping[str, Any]
    first_length: float | None = None
    usual: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def has_reference(self) -> bool:
        """Whether rewards and KL measure a distance from a reference."""
        return self.start_difference is not None

    @property
    def reference_moves(self) -> bool:
        """Whether the reference moves with the policy, so that figures of different steps are against different ones."""
        return self.settings.get("sync_reference_every_steps") is not None

    @property
    def beta(self) -> float | None:
        """The method's β, where it has one."""
        return self.settings.get("beta")

    def with_beta(self, advice: str) -> str:
        """An advice about β and what β is; nothing where the method has none."""
        return "" if self.beta is None else f"{advice} (now {self.beta:g})"

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

    def answer_length(self, *, held_out: bool = False) -> float | None:
        """Mean tokens of a chosen answer (of an answer, for demonstrations) in the data, or of the held-out ones alone.

        Figures of held-out examples are divided by the second: a small side may well have other lengths than the whole. Where
        nothing is held out both are the same.
        """
        of_them = self.data.get("held_out_lengths" if held_out and self.num_held_out else "summary") or {}
        return of_them.get("mean_chosen") or of_them.get("mean_answer") or None


@dataclass(frozen=True, slots=True)
class History:
    """A run so far, as rules look at it.

    Attributes:
        run: which.
        rows: metrics of all steps, oldest first; the k-th is of step k, unless a line of the file was damaged.
        evaluations: the rows that hold held-out figures or those of samples; first, where there are any, those before training.
    """

    run: WatchedRun
    rows: Sequence[Figures]
    evaluations: Sequence[Figures]

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self.rows[-1].get("step", len(self.rows))) if self.rows else 0

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
