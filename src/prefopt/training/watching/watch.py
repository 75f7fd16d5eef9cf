"""The watch: rules that look at a run's figures while it goes and say what is going on and what to change.

The rules are in `rules.py`, each a pure function of the run so far. A step's look costs a few hundredths of a
millisecond however long the run is: rules read the newest rows and the first few, and the evaluations are kept apart.
"""

from collections.abc import Collection, Mapping, Sequence

from prefopt.training.watching.rules import RULES
from prefopt.training.watching.watched import Finding, History, WatchedRun


class Watch:
    """Looks at each new row of metrics; says each thing once.

    Args:
        run: what it watches.
        said: rules that have spoken before, where the run was resumed.
    """

    def __init__(self, run: WatchedRun, *, said: Collection[str] = ()) -> None:
        self.run, self.said = run, set(said)
        self._evaluations: list[Mapping[str, float]] = [run.before] if run.before else []
        self._num_seen = 0

    def look(self, rows: Sequence[Mapping[str, float]]) -> list[Finding]:
        """What is new after the last of the rows.

        Args:
            rows: all metrics so far, one per step, oldest first; empty before the first step.
        """
        new = rows[self._num_seen :]
        self._num_seen = len(rows)
        self._evaluations += [row for row in new if is_evaluation(row)]
        history = History(self.run, rows, self._evaluations)
        now = {"start": len(rows) <= 1, "step": bool(rows), "evaluation": bool(rows) and is_evaluation(rows[-1])}
        rules = [rule for rule in RULES if now[rule.when] and not (rule.over_steps and self.run.reference_moves)]
        found = [finding for rule in rules if rule.name not in self.said and (finding := rule.look(history))]
        self.said.update(finding.rule for finding in found)
        return found


def is_evaluation(row: Mapping[str, float]) -> bool:
    """Whether the row holds held-out figures, or those of samples."""
    return "eval/loss" in row or "samples/length" in row
