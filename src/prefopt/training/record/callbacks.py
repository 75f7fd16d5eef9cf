"""Code of the user's own that follows a run.

    class Printer(prefopt.Callback):
        def on_step(self, row):
            print(row["step"], row["loss"])

    prefopt.train("dpo", ..., callbacks=[Printer()])

Callbacks are called on the main process, in the order in which they were given. What they raise ends the run; what they
are given must not be changed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt.training.watching.watched import Finding


@dataclass(frozen=True, slots=True)
class RunStart:
    """A run that is about to take its first step, or to go on.

    Attributes:
        folder: of the run.
        manifest: what `manifest.json` holds: settings, what was chosen for them, data, model, versions.
        step: optimizer steps that are done already; more than 0 where the run was resumed.
        stop: asks the run to stop: it finishes the step, saves, and can be resumed.
    """

    folder: Path
    manifest: Mapping[str, Any]
    step: int
    stop: Callable[[], None]


class Callback:
    """Does nothing; override what you need."""

    def on_start(self, run: RunStart) -> None:
        """Before the first step."""

    def on_step(self, row: Mapping[str, float]) -> None:
        """After a step, with its line of `metrics.jsonl`; held-out figures are in it where the step was evaluated."""

    def on_samples(self, samples: Sequence[Mapping[str, Any]]) -> None:
        """After answers were sampled, with their lines of `samples.jsonl`."""

    def on_finding(self, finding: Finding) -> None:
        """When the watch has found something."""

    def on_end(self, summary: Mapping[str, Any]) -> None:
        """When the model is saved, with what `summary.json` holds."""

    def on_failure(self, error: BaseException) -> None:
        """When the run ends in an error, or because it was asked to stop."""
