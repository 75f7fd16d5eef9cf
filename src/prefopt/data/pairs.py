"""Rows with a chosen and a rejected answer: pairs."""

import math
from collections.abc import Callable, Sequence
from typing import Literal

from prefopt.data.columns import (
    check_prompt,
    common_turns,
    instruction_prompt,
    transcript,
    turns_of,
    weight_of,
    where_they_part,
    with_system,
    without_prompt,
)
from prefopt.data.demonstrations import demonstration
from prefopt.data.examples import Answer, Conversation, Example, Fields, Message, check_answer
from prefopt.data.kinds import Kind
from prefopt.data.rows import RowFault

Side = Literal["chosen", "rejected"]

SCORES = (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"), ("chosen_rating", "rejected_rating"))
"""What scores of the two answers are called."""

REFERENCES = ("reference_chosen_logp", "reference_rejected_logp")

PAIR_FIELDS = (*REFERENCES, "margin", *(name for names in SCORES for name in names))
"""Columns that every pair reads where they are there."""


def text_pair(row: Fields, kind: Kind) -> Example:
    """`prompt`, `chosen` and `rejected` as text."""
    prompt = row.text("prompt")
    return pair(row, kind, lambda side: (prompt, row.answer(side)))


def chat_pair(row: Fields, kind: Kind) -> Example:
    """`prompt` as text or messages; `chosen` and `rejected` as text, a turn, messages, or the whole conversation again."""
    prompt = turns_of(row.value("prompt"), "prompt", role="user")
    return pair(row, kind, lambda side: (prompt, without_prompt(turns_of(row.value(side), side, role="assistant"), prompt, side)))


def conversation_pair(row: Fields, kind: Kind) -> Example:
    """`chosen` and `rejected` as whole conversations; the prompt is what they begin with in common."""
    sides = {side: row.conversation(side) for side in sides_of(kind)}
    shared = min(len(conversation) for conversation in sides.values()) - 1
    if kind != "demonstration":
        shared = common_turns(sides["chosen"], sides["rejected"], shared)
    return pair(row, kind, lambda side: (sides[side][:shared], sides[side][shared:]))


def hh_pair(row: Fields, kind: Kind) -> Example:
    """`chosen` and `rejected` as transcripts of `\\n\\nHuman:` and `\\n\\nAssistant:`; the last answer is the completion."""
    sides = {side: transcript(row.text(side), side) for side in sides_of(kind)}
    return pair(row, kind, lambda side: (sides[side][:-1], sides[side][-1:]))


def sharegpt_pair(row: Fields, kind: Kind) -> Example:
    """`conversations` of from/value turns as the prompt, `chosen` and `rejected` as a turn or text."""
    prompt = with_system(row, row.conversation("conversations"))
    return pair(row, kind, lambda side: (prompt, turns_of(row.value(side), side, role="assistant")))


def instruction_pair(row: Fields, kind: Kind) -> Example:
    """Alpaca's `instruction` and `input`, with `chosen` and `rejected`."""
    prompt = instruction_prompt(row)
    return pair(row, kind, lambda side: (prompt, (Message("assistant", row.answer(side)),)))


def sides_of(kind: Kind) -> tuple[Side, ...]:
    """The answers of a pair that are read: as a demonstration its chosen one only."""
    return ("chosen",) if kind == "demonstration" else ("chosen", "rejected")


def pair(row: Fields, kind: Kind, read: Callable[[Side], tuple[str | Conversation, str | Conversation]]) -> Example:
    """A chosen and a rejected answer to one prompt; or a demonstration of the chosen one.

    Args:
        row: its columns.
        kind: what is asked for.
        read: gives the prompt and the answer of one side.

    Raises:
        RowFault: the prompts differ, an answer is blank, or the two are the same.
    """
    prompt, chosen = read("chosen")
    if kind == "demonstration":
        return demonstration(row, prompt, chosen, "chosen")
    check_prompt(prompt)
    check_answer(chosen, "chosen")
    other_prompt, rejected = read("rejected")
    check_answer(rejected, "rejected")
    if prompt != other_prompt:
        raise RowFault("prompts_differ", f"chosen and rejected answer different prompts, {where_they_part(prompt, other_prompt)}")
    if chosen == rejected:
        raise RowFault("same_answers", "chosen and rejected are the same")
    logps = both(row, REFERENCES, maximum=0)
    rewards = scores_of(row)
    answers = tuple(
        Answer(content, rank=rank, reward=rewards[rank], reference_logp=logps[rank]) for rank, content in enumerate((chosen, rejected))
    )
    return Example(prompt, answers, weight=weight_of(row))


def both(row: Fields, names: Sequence[str], *, maximum: float = math.inf) -> tuple[float | None, float | None]:
    """Two numbers that belong together, or None for each.

    Raises:
        RowFault: one of them is missing, no finite number, or too large.
    """
    first, second = (row.number(name, maximum=maximum) for name in names)
    if (first is None) != (second is None):
        raise RowFault("missing_field", f"the row has one of {names[0]} and {names[1]}, and needs both or none")
    return first, second


def scores_of(row: Fields) -> tuple[float | None, float | None]:
    """The scores of the two answers; of a `margin` alone the chosen one gets it, and the rejected one 0."""
    for names in SCORES:
        if row.has(names[0]) or row.has(names[1]):
            return both(row, names)
    margin = row.number("margin")
    return (None, None) if margin is None else (margin, 0.0)
