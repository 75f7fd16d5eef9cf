"""The watch: rules that look at a run's figures while it goes and say what is going on and what to change."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal


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
    severity: Literal["note", "warning"]
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
        before: held-out figures before training, `eval/...`; empty where nothing is held out.
        data: the data's part of the summary.
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
    before: Mapping[str, float]
    data: Mapping[str, Any]


class Watch:
    """Looks at each new row of metrics; says each thing once.

    Args:
        run: what it watches.
    """

    def __init__(self, run: WatchedRun) -> None:
        self.run = run

    def look(self, rows: Sequence[Mapping[str, float]]) -> list[Finding]:
        """What is new after the last of the rows.

        Args:
            rows: all metrics so far, one per step, oldest first; empty before the first step.
        """
        return []
