"""Numbers of measured blocks: pure functions, so that a reader can check them by hand.

A block is a few optimizer steps of one contestant; block i of every contestant sees the same examples.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any


@dataclass(frozen=True, slots=True)
class Block:
    """What one block did, warm-up left out.

    Attributes:
        seconds: that it took.
        pairs: pairs that were trained on.
        tokens: their tokens, each prompt counted once per example.
        flops: operations that training on them needs.
        reference_flops: operations that the reference's values of them need.
        rate: the machine's matrix rate around it, operations per second.
    """

    seconds: float
    pairs: int
    tokens: int
    flops: float
    reference_flops: float
    rate: float


@dataclass(frozen=True, slots=True)
class Spread:
    """A median, and the range that holds the middle 80 %."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.low:.3g} to {self.high:.3g})"


@dataclass(frozen=True, slots=True)
class Speed:
    """A contestant's speed.

    Attributes:
        pairs_per_second, tokens_per_second: of the steps alone.
        whole_pairs_per_second, whole_tokens_per_second: with the reference pass before training added to the steps by its share,
            so that contestants who compute the reference before and within the steps compare.
        share: of the machine's matrix rate that the needed operations reach, the reference pass included on both sides.
    """

    pairs_per_second: float
    tokens_per_second: float
    whole_pairs_per_second: float
    whole_tokens_per_second: float
    share: float


def quantile(values: Sequence[float], at: float) -> float:
    """The value below which that share of them lies, interpolated between neighbours."""
    ordered = sorted(values)
    place = at * (len(ordered) - 1)
    left = int(place)
    right = min(left + 1, len(ordered) - 1)
    return ordered[left] + (place - left) * (ordered[right] - ordered[left])


def spread(values: Sequence[float]) -> Spread:
    """Median and the range from 10 to 90 %."""
    return Spread(median(values), quantile(values, 0.1), quantile(values, 0.9))


def speed(blocks: Sequence[Block], *, reference_per_pair: float, computes_reference: bool) -> Speed:
    """Medians over the blocks.

    Args:
        blocks: at least one.
        reference_per_pair: seconds of the reference pass before training, per pair; 0 where there was none.
        computes_reference: whether the contestant computes the reference at all, before the steps or within; a warm cache does not,
            and is not credited with its operations.
    """
    whole = [block.seconds + reference_per_pair * block.pairs for block in blocks]
    pairs = list(zip(blocks, whole, strict=True))
    return Speed(
        pairs_per_second=median(block.pairs / block.seconds for block in blocks),
        tokens_per_second=median(block.tokens / block.seconds for block in blocks),
        whole_pairs_per_second=median(block.pairs / seconds for block, seconds in pairs),
        whole_tokens_per_second=median(block.tokens / seconds for block, seconds in pairs),
        share=median(
            (block.flops + (block.reference_flops if computes_reference else 0.0)) / seconds / block.rate if block.rate else 0.0
            for block, seconds in pairs
        ),
    )


def ratio(
    blocks: Sequence[Block], base: Sequence[Block], *, reference_per_pair: float = 0.0, base_reference_per_pair: float = 0.0
) -> Spread:
    """How many times longer a token takes than with the base, block by block: 3 means that the base is three times as fast.

    Per token and not per block, so that contestants on other workloads compare too; on the same examples it is the same.
    """
    ratios = []
    for own, other in zip(blocks, base, strict=True):
        seconds = own.seconds + reference_per_pair * own.pairs
        other_seconds = other.seconds + base_reference_per_pair * other.pairs
        ratios.append((seconds / own.tokens) / (other_seconds / other.tokens))
    return spread(ratios)


def loss_difference(losses: Sequence[float], base: Sequence[float]) -> dict[str, Any]:
    """How far the losses of two contestants are apart, step by step, the first step by itself."""
    apart = [abs(one - other) for one, other in zip(losses, base, strict=False)]
    if not apart:
        return {"steps": 0, "first": None, "largest": None, "at_step": None}
    worst = max(range(len(apart)), key=lambda step: apart[step])
    return {"steps": len(apart), "first": apart[0], "largest": apart[worst], "at_step": worst + 1}


def as_json(value: Any) -> Any:
    """A dataclass of numbers as a mapping."""
    return asdict(value)
