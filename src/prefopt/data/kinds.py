"""The kinds of data that methods ask for, and what an example of one kind is as another.

    demonstration   one answer, to be learned
    pair            two answers, of ranks 0 and 1
    thumbs          one answer with a label, up or down
    ranked          several answers with ranks, the best first; equal ranks are ties

A change of kind loses no answer that says something in the new kind, and invents none. What cannot be changed is left out with a
reason: a tie is no pair, and an answer without a label has no thumb.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Literal

from prefopt.data.examples import Answer, Conversation, Example
from prefopt.data.rows import RowFault

Kind = Literal["demonstration", "pair", "thumbs", "ranked"]
PairsOfRanks = Literal["all", "best", "ends"]
"""Which pairs a ranking comes to: all of different rank; the best answers against the others; one of the best against one of the worst."""

Made = list[Example | RowFault]

SERVES: dict[Kind, frozenset[Kind]] = {
    "demonstration": frozenset({"demonstration"}),
    "pair": frozenset({"pair", "demonstration", "thumbs", "ranked"}),
    "thumbs": frozenset({"thumbs", "demonstration"}),
    "ranked": frozenset({"ranked", "pair", "demonstration"}),
}
"""As what else rows of a kind are read."""

SAYS: dict[tuple[Kind, Kind], str] = {
    ("pair", "demonstration"): "read as demonstrations of the chosen answer",
    ("pair", "thumbs"): "each read as a thumb up for the chosen answer and one down for the rejected",
    ("pair", "ranked"): "read as rankings of two",
    ("thumbs", "demonstration"): "read as demonstrations of the answers with a thumb up",
    ("ranked", "pair"): "read as pairs of answers of different rank",
    ("ranked", "demonstration"): "read as demonstrations of the best answer",
    ("ranked", "thumbs"): "read as thumbs where an answer has votes or a label",
}
"""What is said of a source that is read as another kind than it is."""

PLURAL: dict[Kind, str] = {"demonstration": "demonstrations", "pair": "pairs", "thumbs": "thumbs", "ranked": "rankings"}


def as_kind(example: Example, kind: Kind, pairs_of_ranks: PairsOfRanks = "all") -> Made:
    """What the example is as that kind: one example or several; or why it is none.

    Args:
        example: with labels, ranks or neither; several answers in the order of their ranks.
        kind: what is asked for.
        pairs_of_ranks: which pairs a ranking comes to.
    """
    changed: dict[Kind, Callable[[], Made]] = {
        "demonstration": lambda: as_demonstrations(example),
        "pair": lambda: as_pairs(example, pairs_of_ranks),
        "thumbs": lambda: as_thumbs(example),
        "ranked": lambda: as_ranking(example),
    }
    return changed[kind]()


def as_demonstrations(example: Example) -> Made:
    """The best answer, or each with a thumb up."""
    if any(answer.label is not None and answer.rank is None for answer in example.answers):
        liked = [answer for answer in example.answers if answer.label]
        return [lone(example, answer) for answer in liked] or [RowFault("thumbs_down", "no answer has a thumb up")]
    if len(example.answers) > 1 and is_tie(example.answers):
        return [tie(example)]
    return [lone(example, example.answers[0])]


def as_pairs(example: Example, pairs_of_ranks: PairsOfRanks) -> Made:
    """Pairs of answers whose ranks differ."""
    if is_tie(example.answers):
        return [tie(example)]
    if len(example.answers) == 2:
        return [replace(example, answers=tuple(replace(answer, rank=rank, label=None) for rank, answer in enumerate(example.answers)))]
    couples: Iterable[tuple[Answer, Answer]] = combinations(example.answers, 2)
    if pairs_of_ranks == "best":
        couples = ((one, other) for one, other in couples if one.rank == 0)
    elif pairs_of_ranks == "ends":
        couples = [(example.answers[0], example.answers[-1])]
    return [
        replace(example, answers=(replace(one, rank=0, label=None), replace(other, rank=1, label=None)))
        for one, other in couples
        if one.rank != other.rank
    ]


def as_thumbs(example: Example) -> Made:
    """Each answer that has a label; or of a pair the chosen one up, and the rejected one down."""
    labels: Sequence[bool | None] = [answer.label for answer in example.answers]
    if not any(label is not None for label in labels):
        if len(example.answers) != 2:
            return [RowFault("no_label", "no answer has a label or votes that decide")]
        if is_tie(example.answers):
            return [tie(example)]
        labels = (True, False)
    return [
        replace(example, answers=(replace(answer, label=label, rank=None),))
        for answer, label in zip(example.answers, labels, strict=True)
        if label is not None
    ]


def as_ranking(example: Example) -> Made:
    """The ranking, unless all are of one rank: nothing can be learned from that."""
    if is_tie(example.answers):
        return [tie(example)]
    return [replace(example, answers=tuple(replace(answer, label=None) for answer in example.answers))]


def lone(example: Example, answer: Answer) -> Example:
    """The example with that answer only, as a demonstration."""
    return replace(example, answers=(Answer(answer.content),))


def is_tie(answers: Sequence[Answer]) -> bool:
    """Whether all are of the same rank."""
    return len({answer.rank for answer in answers}) == 1


def tie(example: Example) -> RowFault:
    """Why answers of one rank are left out."""
    return RowFault("tie", f"the {len(example.answers)} answers are equally good, and which of them to prefer is not said")


def in_order(answers: Iterable[Answer]) -> tuple[Answer, ...]:
    """The answers by rank, the best first, with ranks from 0 on without gaps; the same answer given twice stands once.

    Raises:
        RowFault: fewer than two are left, or the same answer has two ranks.
    """
    first: dict[str | Conversation, Answer] = {}
    for answer in answers:
        other = first.setdefault(answer.content, answer)
        if other.rank != answer.rank:
            raise RowFault("same_answers", "the same answer is there twice, with different ranks or scores")
    if len(first) < 2:
        raise RowFault("same_answers", "there are no two different answers")
    places = {rank: place for place, rank in enumerate(sorted({answer.rank for answer in first.values() if answer.rank is not None}))}
    ranked = [replace(answer, rank=places[answer.rank]) for answer in first.values() if answer.rank is not None]
    return tuple(sorted(ranked, key=lambda answer: answer.rank or 0))
