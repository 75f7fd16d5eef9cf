"""How far verdicts can be trusted: who contradicts whom, and at what rate that makes a verdict wrong.

If every verdict is wrong with the same probability ε, and one is so independently of the others, two on the same answers agree with
probability a = (1 − ε)² + ε², so ε = (1 − √(2a − 1)) / 2. Of k who vote, more than half are wrong with the probability that the binomial
distribution gives. What people agree on wrongly, all alike, no count of this kind can see.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from prefopt.data.comparisons import ANNOTATORS, verdict_of
from prefopt.data.rows import RowFault


@dataclass(frozen=True, slots=True)
class Agreement:
    """Verdicts on the same two answers, two by two.

    Attributes:
        agree, couples: couples of verdicts that are the same, and all couples.
        pairs: different pairs of answers, each however often it was judged.
        contradicted: those among them with verdicts both ways.
        votes: votes of a row, on average, which are counted together; 1: rows that judge the same answers, each for itself.
        ties: votes for neither answer, which are left out of all of this: no pair is made of what they say.
        if_verdicts: rate of wrong verdicts if rows that are the same in every column are verdicts that agree, not copies, where that
            cannot be told and matters; else None.
    """

    agree: int = 0
    couples: int = 0
    pairs: int = 0
    contradicted: int = 0
    votes: float = 1.0
    ties: int = 0
    if_verdicts: float | None = None

    @property
    def is_rate_known(self) -> bool:
        """Whether there is anything that tells how many are wrong."""
        return self.couples > 0 and self.if_verdicts is None and not self.lacks_agreeing

    @property
    def lacks_agreeing(self) -> bool:
        """Whether rows agree less often than coins would, by two standard errors: those that agree were removed, as copies perhaps."""
        return not self.of_voters and (0.5 - self.share) * 2 * math.sqrt(self.couples) >= 2

    @property
    def of_voters(self) -> bool:
        """Whether the verdicts are votes within rows."""
        return self.votes > 1

    @property
    def share(self) -> float:
        """Of the couples, those that agree."""
        return self.agree / self.couples if self.couples else 1.0

    @property
    def error(self) -> float:
        """Rate at which a verdict, or what most votes say, is wrong; ½ where two agree no more often than by chance."""
        single = (1 - math.sqrt(max(0.0, 2 * self.share - 1))) / 2
        return of_most(single, max(1, round(self.votes)))


def of_most(error: float, votes: int) -> float:
    """The probability that more than half of so many voters are wrong, where each is with probability `error`; a draw is half wrong."""
    return sum(
        math.comb(votes, wrong) * error**wrong * (1 - error) ** (votes - wrong) * (1.0 if 2 * wrong > votes else 0.5)
        for wrong in range(votes + 1)
        if 2 * wrong >= votes
    )


def votes_of(columns: Mapping[str, Any]) -> tuple[list[int], int]:
    """The votes in a row that are for one of the two answers, as 0 and 1; and how many are for neither."""
    cast: list[int] = []
    ties = 0
    for name in ANNOTATORS:
        if columns.get(name) is None:
            continue
        try:
            winner = verdict_of(columns[name], name, first=1, lettered=False).winner
        except RowFault:
            continue
        if winner is None:
            ties += 1
        else:
            cast.append(winner)
    return cast, ties


def agreement_of(groups: Iterable[list[int]], *, together: bool, ties: int = 0) -> Agreement:
    """What groups of verdicts on the same two answers come to.

    Args:
        groups: the verdicts of each, as 0 and 1.
        together: whether one verdict is made of each group; else each stands for itself.
        ties: verdicts for neither, which are not in the groups.
    """
    agree = couples = pairs = judged = contradicted = cast = 0
    for verdicts in groups:
        pairs += 1
        number = len(verdicts)
        if number < 2:
            continue
        judged += 1
        cast += number
        contradicted += len(set(verdicts)) > 1
        couples += math.comb(number, 2)
        agree += sum(math.comb(same, 2) for same in Counter(verdicts).values())
    return Agreement(agree, couples, pairs, contradicted, cast / judged if together and judged else 1.0, ties)


def verdicts_by_pair(judged: Iterable[tuple[str, str, str]]) -> list[list[int]]:
    """The verdicts on each two answers to a prompt, as 0 and 1.

    Args:
        judged: prompt, chosen and rejected answer of each pair.
    """
    found: defaultdict[tuple[str, str, str], list[int]] = defaultdict(list)
    for prompt, chosen, rejected in judged:
        first, second = sorted((chosen, rejected))
        found[prompt, first, second].append(int(chosen == second))
    return list(found.values())
