"""Held-out examples one by one: how their figures are spread before and after, and which were learned best and worst."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from prefopt.report.record import HeldOut, RunRecord
from prefopt.report.text import count, plain, share, without_common

SHOWN = 5
"""Examples listed as learned best, and as many as learned worst."""


@dataclass(frozen=True, slots=True)
class Spread:
    """How a figure of the held-out examples is spread.

    Attributes:
        title: of the chart.
        unit: what the height of a bar counts.
        before, after: the values; of the same examples in the same order where both are known, else `before` is empty.
        has_sides: whether it matters on which side of 0 a value lies.
        says: the chart in words, a sentence each.
    """

    title: str
    unit: str
    before: tuple[float, ...]
    after: tuple[float, ...]
    has_sides: bool
    says: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Learned:
    """A held-out example and how well it was learned.

    Attributes:
        example: its texts and figures.
        title: what sets its prompt apart from the other prompts.
        score: its margin, its reward in the direction of its thumb, or how far its log-probability per token rose; more is better.
        shown: the score as people read it.
    """

    example: HeldOut
    title: str
    score: float
    shown: str


def spread(record: RunRecord) -> Spread | None:
    """The spread of margins, of rewards by thumb, or of losses per token where there is neither; None before the first evaluation."""
    if record.held_out_step is None:
        return None
    value = margin_of if record.is_pairs else agreement if record.is_thumbs else loss_per_token
    rows = [(value(example, False), value(example, True)) for example in record.held_out]
    after = tuple(later for later, _ in rows if later is not None)
    both = [(earlier, later) for later, earlier in rows if later is not None and earlier is not None]
    if not after:
        return None
    before = tuple(earlier for earlier, _ in both) if len(both) == len(after) else ()
    if record.is_pairs:
        return Spread("Margins", "number of held-out pairs", before, after, True, margin_words(before, after))
    if record.is_thumbs:
        words = margin_words(before, after, "answers", "have a reward on the side of their thumb")
        return Spread("Rewards towards the thumb", "number of held-out answers", before, after, True, words)
    return Spread("Loss in nats per token", "number of held-out examples", before, after, False, loss_words(before, after))


def margin_of(example: HeldOut, before: bool) -> float | None:
    """The margin of a pair."""
    return (example.before if before else example.after).get("rewards/margin")


def loss_per_token(example: HeldOut, before: bool) -> float | None:
    """Negative log-probability per token of the answer."""
    logps = (example.before if before else example.after).get("logps/chosen")
    return None if logps is None or not example.lengths or not example.lengths[0] else -logps / example.lengths[0]


def margin_words(
    before: tuple[float, ...],
    after: tuple[float, ...],
    examples: str = "pairs",
    are_right: str = "have a margin above 0, the chosen answer ahead",
) -> tuple[str, ...]:
    """The spread of margins, or of rewards of single answers, in words."""
    num = len(after)
    right, tied = sum(value > 0 for value in after), sum(value == 0 for value in after)
    ties = f", {count(tied)} exactly 0" if tied else ""
    words = [f"{count(right)} of {count(num)} {examples} ({share(right / num)}) {are_right}{ties}."]
    if before and len(set(before)) == 1:
        words.append(
            f"Before training it was {plain(before[0])} for all of them"
            + (", as it must be where the model is its reference." if before[0] == 0 else ".")
        )
    elif before:
        words.append(f"Before training that held for {count(sum(value > 0 for value in before))}.")
    low, middle, high = (float(value) for value in np.quantile(after, (0.1, 0.5, 0.9)))
    words.append(f"The middle one is {plain(middle)}; a tenth lie below {plain(low)} and a tenth above {plain(high)}.")
    return tuple(words)


def loss_words(before: tuple[float, ...], after: tuple[float, ...]) -> tuple[str, ...]:
    """The spread of losses in words."""
    low, middle, high = (float(value) for value in np.quantile(after, (0.1, 0.5, 0.9)))
    words = [f"The middle one is {plain(middle)}; a tenth lie below {plain(low)} and a tenth above {plain(high)}."]
    if before:
        better = sum(later < earlier for earlier, later in zip(before, after, strict=True))
        words.insert(0, f"{count(better)} of {count(len(after))} examples have a lower loss than before training.")
    return tuple(words)


def best_and_worst(record: RunRecord) -> tuple[list[Learned], list[Learned]]:
    """The examples that were learned best, the best first, and those that were learned worst, the worst first; no example is in both."""
    if record.held_out_step is None:
        return [], []
    sided = margin_of if record.is_pairs else agreement if record.is_thumbs else None
    rate: Callable[[HeldOut], float | None] = gained if sided is None else lambda example: sided(example, False)
    titles = without_common([example.prompt for example in record.held_out])
    ranked = [
        Learned(example, title, score, plain(score, 2))
        for example, title in zip(record.held_out, titles, strict=True)
        if (score := rate(example)) is not None
    ]
    ranked.sort(key=lambda learned: -learned.score)
    num = min(SHOWN, len(ranked) // 2)
    if not num:
        return ranked[:1], []
    return ranked[:num], ranked[: -num - 1 : -1]


def agreement(example: HeldOut, before: bool) -> float | None:
    """The reward of a single answer, with its sign turned where its thumb is down."""
    figures = example.before if before else example.after
    down = figures.get("rewards/undesirable")
    return figures.get("rewards/desirable") if down is None else -down


def gained(example: HeldOut) -> float | None:
    """How far the log-probability per token of an answer rose, in nats."""
    before, after = loss_per_token(example, True), loss_per_token(example, False)
    return None if before is None or after is None else before - after
