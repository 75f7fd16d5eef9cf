"""Rows with several answers to one prompt, and their ranks or scores."""

from collections.abc import Mapping, Sequence
from typing import Any

from prefopt.data.columns import asked, check_prompt, each_of, fitted, is_number, weight_of
from prefopt.data.examples import Answer, Example, Fields, check_answer, finite
from prefopt.data.kinds import Kind, in_order
from prefopt.data.rows import RowFault, clip
from prefopt.data.thumbs import LISTS

RANKS = ("ranks", "rank")
SCORES = ("scores", "rewards", "ratings", "score", "reward")
TEXTS = ("content", "text", "response", "completion", "answer", "output")
RATINGS = ("score", "reward", "rating", "overall_score")
PLACED = ("rank", *RATINGS)
"""What ranks, scores, and the parts of an answer that is an object may be called."""


def is_rated(value: object) -> bool:
    """A list of objects, each with an answer and its rank or score; nulls among these are for reading to find fault with."""
    if not isinstance(value, list) or len(value) < 2 or not all(is_rating(entry) for entry in value):
        return False
    return any(part_of(entry, PLACED) is not None for entry in value)


def is_rating(value: object) -> bool:
    """An object with an answer and its rank or score, which may be null."""
    return isinstance(value, dict) and part_of(value, TEXTS) is not None and not value.keys().isdisjoint(PLACED)


def part_of(entry: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """The first of these names that the object has."""
    return next((name for name in names if entry.get(name) is not None), None)


def ranked_completions(row: Fields, kind: Kind) -> Example:
    """A prompt, a list of answers, and a list of their ranks, the lowest for the best."""
    name, answers = answers_of(row)
    ranks = row.first(RANKS) or RANKS[0]
    return ranking(row, name, answers, [finite(value, ranks) for value in each_of(row, ranks, len(answers), name)], are_scores=False)


def scored_completions(row: Fields, kind: Kind) -> Example:
    """A prompt, a list of answers, and a list of their scores, the highest for the best."""
    name, answers = answers_of(row)
    scores = row.first(SCORES) or SCORES[0]
    return ranking(row, name, answers, [finite(value, scores) for value in each_of(row, scores, len(answers), name)], are_scores=True)


def rated_completions(row: Fields, kind: Kind) -> Example:
    """A prompt, and a list of objects with an answer and its rank or score each."""
    name, entries = answers_of(row)
    for entry in entries:
        if not is_rating(entry):
            raise RowFault("wrong_type", f"`{name}` holds {clip(entry)}, and must hold objects with an answer and its rank or score")
    are_ranks = all(is_number(entry.get("rank")) for entry in entries) or not any(part_of(entry, RATINGS) for entry in entries)
    are_scores, names = not are_ranks, ("rank",) if are_ranks else RATINGS
    # A null is called as its neighbours' numbers are.
    usual = next((found for entry in entries if (found := part_of(entry, names)) is not None), names[0])
    called = [part_of(entry, names) or usual for entry in entries]
    numbers = [finite(entry.get(own), f"{name}[{place}].{own}") for place, (entry, own) in enumerate(zip(entries, called, strict=True))]
    return ranking(row, name, [entry[part_of(entry, TEXTS) or TEXTS[0]] for entry in entries], numbers, are_scores=are_scores)


def answers_of(row: Fields) -> tuple[str, list[Any]]:
    """What the row calls its list of answers, and the list.

    Raises:
        RowFault: there is none.
    """
    name = row.first(LISTS) or LISTS[0]
    value = row.value(name)
    if not isinstance(value, list) or len(value) < 2:
        raise RowFault("wrong_type", f"`{name}` is {clip(value)}, and must be a list of at least two answers")
    return name, value


def ranking(row: Fields, name: str, answers: Sequence[Any], numbers: Sequence[float], *, are_scores: bool) -> Example:
    """The answers in order, their scores as rewards where they have any.

    Raises:
        RowFault: no prompt stands before them, one is blank, or there are no two different ones.
    """
    prompt, contents = fitted(asked(row), {f"{name}[{place}]": value for place, value in enumerate(answers)})
    check_prompt(prompt)
    for place, content in enumerate(contents):
        check_answer(content, f"{name}[{place}]")
    order = sorted(set(numbers), reverse=are_scores)
    found = [
        Answer(content, rank=order.index(number), reward=number if are_scores else None)
        for content, number in zip(contents, numbers, strict=True)
    ]
    return Example(prompt, in_order(found), weight=weight_of(row))
