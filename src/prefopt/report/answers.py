"""The model's own answers: before training and now, and on the way there."""

from collections.abc import Sequence
from dataclasses import dataclass

from prefopt.report.record import Answer, RunRecord
from prefopt.report.text import plain, share

MOST_PROMPTS = 8
MOST_STEPS = 8
"""Answers on the way that are shown of each prompt: the first, the newest, and others evenly between."""


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A prompt and what the model answered to it.

    Attributes:
        row: where the prompt comes from.
        prompt: its text.
        first: the answer before training; None where none was sampled then.
        newest: the newest answer; None where there is only the one before training.
        on_the_way: answers over time, oldest first; the first and the newest among them.
    """

    row: str
    prompt: str
    first: Answer | None
    newest: Answer | None
    on_the_way: tuple[Answer, ...]


def dialogues(record: RunRecord) -> list[Dialogue]:
    """The prompts in the order in which they were first answered, each with its answers."""
    by_prompt: dict[tuple[str, str], dict[int, Answer]] = {}
    for answer in record.answers:
        by_prompt.setdefault((answer.row, answer.prompt), {})[answer.step] = answer  # a resumed run may have answered again
    found = []
    for (row, prompt), answers in list(by_prompt.items())[:MOST_PROMPTS]:
        steps = sorted(answers)
        newest = answers[steps[-1]] if steps[-1] > 0 else None
        found.append(Dialogue(row, prompt, answers.get(0), newest, tuple(answers[step] for step in spaced(steps, MOST_STEPS))))
    return found


def spaced(steps: Sequence[int], most: int) -> list[int]:
    """At most so many of the steps, evenly spread, the first and the last among them."""
    if len(steps) <= most:
        return list(steps)
    return [steps[round(place * (len(steps) - 1) / (most - 1))] for place in range(most)]


def figures_of(answer: Answer) -> str:
    """An answer's figures: `41 tokens, ended by itself, 3 % repeated`."""
    parts = [
        "" if answer.num_tokens is None else f"{plain(answer.num_tokens, 0)} tokens",
        "" if answer.ended is None else "ended by itself" if answer.ended else "cut off",
        "" if not answer.repetition else f"{share(answer.repetition)} repeated",
        "" if answer.entropy is None else f"entropy {plain(answer.entropy, 2)}",
    ]
    return ", ".join(filter(None, parts))


def sides(record: RunRecord) -> tuple[tuple[str, str], tuple[str, str]]:
    """What the left and the right column are called, and their colours."""
    left = "before training: the reference" if record.reference_is_start else "before training"
    return (left, "outline"), (f"after step {max((answer.step for answer in record.answers), default=0):,}", "held")


def introduction(record: RunRecord) -> str:
    """What is shown, and whether the left column is the reference."""
    which = "held-out prompts" if record.num_held_out else "prompts of the training data (nothing was held out)"
    words = f"The same {which} with the same random numbers each time, so that what differs between the columns is the model. "
    if record.reference_is_start:
        return words + "Before training the model is the reference itself."
    if record.has_reference:
        return words + f"The left column is the model before training and not the reference ({record.reference_words})."
    return words + "This method has no reference; the left column is the model that training began with."
