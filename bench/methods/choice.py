"""Which of a contender's trials is taken, and all that is known of the contender."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from bench.methods.book import Line
from bench.methods.contenders import Contender

MOST_KL = 8.0
"""Nats. Beyond it the text breaks: the reward goes on rising and means nothing (docs/results.md)."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A contender with what was found.

    Attributes:
        name: of the contender.
        contender: itself.
        trials: of its present settings, in the order of the axis.
        chosen: the one whose settings it is run with.
        runs: with these, one for each seed.
    """

    name: str
    contender: Contender
    trials: Sequence[Line]
    chosen: Line
    runs: Sequence[Line]

    @property
    def settings(self) -> Mapping[str, Any]:
        """What it is run with."""
        settings: Mapping[str, Any] = self.chosen["settings"]
        return settings

    @property
    def edge(self) -> str:
        """Which end of its axis the choice is, so that a value beyond might do better; empty: it lies between two others."""
        tried = self.contender.trials()
        return {0: "lowest", len(tried) - 1: "highest"}.get(tried.index(dict(self.settings)), "")

    def mean(self, figure: str) -> float:
        """Over the seeds."""
        return mean(run[figure] for run in self.runs)


def best_trial(trials: Sequence[Line], contender: Contender) -> Line:
    """The highest true reward at no more than `MOST_KL`; where all went further, the one that went least far. Of reward models the most
    accurate."""
    if contender.scores:
        return max(trials, key=lambda trial: trial["accuracy"])
    near = [trial for trial in trials if trial["kl"] <= MOST_KL]
    return max(near, key=lambda trial: trial["true_reward"]) if near else min(trials, key=lambda trial: trial["kl"])


def trial_lines(name: str, contender: Contender, seed: int) -> list[Line]:
    """What is to be tried."""
    return [{"kind": "trial", "name": name, "method": contender.method, "seed": seed, "settings": own} for own in contender.trials()]


def run_line(name: str, contender: Contender, seed: int, settings: Mapping[str, Any]) -> Line:
    """What is to be run."""
    return {"kind": "run", "name": name, "method": contender.method, "seed": seed, "settings": dict(settings)}


def entries(lines: Sequence[Line], contenders: Mapping[str, Contender], seeds: Iterable[int]) -> list[Entry]:
    """All contenders that have been run with their present settings; the highest mean reward first, reward models last."""
    found = []
    for name, contender in contenders.items():
        tried = contender.trials()
        of_name = [line for line in lines if line.get("name") == name and line.get("method") == contender.method and "failed" not in line]
        trials = [line for settings in tried for line in of_name if line["kind"] == "trial" and line["settings"] == settings]
        if not trials:
            continue
        chosen = best_trial(trials, contender)
        runs = [line for line in of_name if line["kind"] == "run" and line["settings"] == chosen["settings"] and line["seed"] in set(seeds)]
        if runs:
            found.append(Entry(name, contender, trials, chosen, sorted(runs, key=lambda line: line["seed"])))
    return sorted(found, key=lambda entry: (entry.contender.scores, -entry.mean("accuracy" if entry.contender.scores else "true_reward")))
