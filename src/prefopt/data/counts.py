"""What examples hold beside their words, in numbers: thumbs up and down, answers to a prompt, ties."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


class Judged(Protocol):
    """An answer, as text or as tokens."""

    @property
    def label(self) -> bool | None:
        """Thumb up or down."""

    @property
    def rank(self) -> int | None:
        """0 for the best."""


@dataclass(slots=True)
class Counts:
    """Counts of examples.

    Attributes:
        num_up, num_down: answers with a thumb up, and with one down.
        branches: examples by their number of answers.
        num_ties: examples of several answers of which some share a rank.
    """

    num_up: int = 0
    num_down: int = 0
    branches: Counter[int] = field(default_factory=Counter)
    num_ties: int = 0

    def add(self, answers: Sequence[Judged]) -> None:
        """Count an example by its answers."""
        self.branches[len(answers)] += 1
        for answer in answers:
            self.num_up += answer.label is True
            self.num_down += answer.label is False
        self.num_ties += len(answers) > 1 and len({answer.rank for answer in answers}) < len(answers)

    def to_dict(self) -> dict[str, Any]:
        """For a summary."""
        branches = {str(number): count for number, count in sorted(self.branches.items())}
        return {"num_up": self.num_up, "num_down": self.num_down, "branches": branches, "num_ties": self.num_ties}


def shape_lines(num_up: int, num_down: int, branches: Mapping[str, int], num_ties: int) -> list[str]:
    """The counts for the terminal; none of demonstrations and pairs, of which there is nothing to tell."""
    lines = []
    if num_up or num_down:
        share = f"{num_up / (num_up + num_down):.0%} up"
        lonely = "" if num_up and num_down else f"; all are {'up' if num_up else 'down'}, and nothing tells good from bad"
        lines.append(f"thumbs: {num_up:,} up, {num_down:,} down ({share}{lonely})")
    if any(int(number) > 2 for number in branches) or num_ties:
        of_each = ", ".join(f"{count:,} of {number}" for number, count in branches.items() if int(number) > 1)
        ties = f"; {num_ties:,} with ties" if num_ties else ""
        lines.append(f"answers ranked: {of_each}{ties}")
    return lines
