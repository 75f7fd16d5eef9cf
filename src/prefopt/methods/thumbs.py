"""What the methods on thumbs have in common: single completions, each good or bad.

Shapes: B completions, one per tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import TYPE_CHECKING, overload

import numpy as np

from prefopt.data.store import Sizes
from prefopt.errors import DataError
from prefopt.methods.maths import divergence
from prefopt.methods.method import Times
from prefopt.trees import Completion, PromptTree

if TYPE_CHECKING:
    from torch import Tensor

    from prefopt.engine.batch import TreeBatch
    from prefopt.engine.logps import ReferenceLogps, TokenLogps

CROWDED = 4
"""Thumbs that share a partner, from which on they are many: with two answers to each prompt hardly any do."""

ROUNDING = 1e-3
"""Nats by which a log-ratio of 0 may be off: an answer packed beside others is not summed up in the same order."""


@dataclass(frozen=True, slots=True)
class Thumbs:
    """How many thumbs there are of each kind, and what they count for.

    Attributes:
        num_up, num_down: examples.
        up, down: what an epoch makes of them: each example by its weight, as often as it is taken.
    """

    num_up: int
    num_down: int
    up: float
    down: float

    @classmethod
    def of(cls, trees: Sequence[PromptTree], times: Times | None = None) -> Thumbs:
        """Those of the trees.

        Args:
            trees: of one labelled completion each, or of more of which the first is the labelled one.
            times: how often an epoch takes each; None: once.
        """
        is_up = np.array([bool(tree.completions[0].label) for tree in trees], dtype=np.bool_)
        weights = np.array([tree.weight for tree in trees]) * (1.0 if times is None else times)
        return cls(int(is_up.sum()), int((~is_up).sum()), float(weights[is_up].sum()), float(weights[~is_up].sum()))

    def __str__(self) -> str:
        """In words: how many, and what they weigh where that is something else."""
        numbers = f"thumbs: {self.num_up:,} up, {self.num_down:,} down"
        if (self.up, self.down) == (self.num_up, self.num_down):
            return numbers
        return f"{numbers}, which weigh {self.up:,.6g} and {self.down:,.6g} in an epoch"

    def one_kind(self) -> str:
        """What to say where there is but one kind; empty where there are both."""
        if self.up and self.down:
            return ""
        return f"{self}; with one kind only the model learns to give, or to avoid, everything that it is shown"


class WithPartners(Sequence[PromptTree]):
    """Single thumbs, each with a completion of another prompt behind its own: what the policy's divergence is measured on.

    The partners are the neighbours on a circle of all examples that is drawn by seed, so that each completion is a partner about once
    and the same examples have the same partners for the whole run. Where the neighbour answers the same prompt it is the next but
    one, and so on; where all have one prompt (a few held-out examples may) it is the neighbour all the same. Where prompt and partner
    together are longer than the longest example, the partner's end is left out. Examples of weight 0 have no place on the circle, so
    that the others are paired as if these were not there; each is its own partner, which counts for nothing.

    Args:
        trees: of one completion each; read when one is asked for.
        seed: of the draw.

    Attributes:
        partners: the place of each example's partner.
        on_circle: the places of the examples that take part in the draw.
        has_one_prompt: whether these answer one prompt, all of them.

    Raises:
        DataError: the examples bring log-probabilities of their reference, which partners cannot have.
    """

    def __init__(self, trees: Sequence[PromptTree], *, seed: int) -> None:
        self.trees = trees
        sizes = Sizes.of(trees)
        if sizes.references.any():
            raise DataError(
                "kto compares the policy with its reference on answers to other prompts too, and the data brings the reference's "
                "log-probability of its own answers only. Remove the columns with reference log-probabilities, so that they are computed."
            )
        prompts, counts = np.zeros(len(trees), dtype=np.uint64), np.zeros(len(trees), dtype=np.bool_)
        for place, tree in enumerate(trees):
            prompts[place] = int.from_bytes(blake2b(tree.prompt_ids.tobytes(), digest_size=8).digest(), "little")
            counts[place] = tree.weight > 0
        self.on_circle = np.flatnonzero(counts)
        self.longest = int((sizes.prompt + sizes.longest)[counts].max(initial=0))
        circle = self.on_circle[np.random.default_rng([seed % 2**63, len(self.on_circle)]).permutation(len(self.on_circle))]
        # Where the prompt is another than that of the place before: the first of these behind a place is its partner.
        starts = np.flatnonzero(prompts[circle] != np.roll(prompts[circle], 1))
        self.has_one_prompt = not len(starts)
        behind = np.searchsorted(starts, np.arange(len(circle)), side="right") % max(len(starts), 1)
        self.partners = np.arange(len(trees))
        self.partners[circle] = np.roll(circle, -1) if self.has_one_prompt else circle[starts[behind]]

    def __len__(self) -> int:
        return len(self.trees)

    @overload
    def __getitem__(self, place: int) -> PromptTree: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[PromptTree]: ...

    def __getitem__(self, place: int | slice) -> PromptTree | Sequence[PromptTree]:
        if isinstance(place, slice):
            return [self[index] for index in range(len(self))[place]]
        place = range(len(self))[place]
        tree = self.trees[place]
        other = int(self.partners[place])
        partner = self.trees[other].completions[0]
        room = max(self.longest - len(tree.prompt_ids), 1)  # an example of weight 0 may be longer than all others
        scored = None if partner.scored is None else partner.scored[:room]
        return replace(tree, completions=(*tree.completions, Completion(partner.ids[:room], scored)))

    def narrowness(self) -> str:
        """What to say where z0 rests on few answers, because most are to few prompts; empty where it does not."""
        if self.has_one_prompt:
            return "all answer one prompt, so z0 is measured on answers to that prompt too"
        partners = self.partners[self.on_circle]
        is_crowded = np.bincount(partners, minlength=len(self))[partners] >= CROWDED
        if 2 * int(is_crowded.sum()) <= len(partners):
            return ""
        num = len(np.unique(partners[is_crowded]))
        answers = "one answer" if num == 1 else f"{num:,} answers"
        return (
            f"for {is_crowded.sum():,} of {len(partners):,} z0 is measured on {answers} alone, because few answer another prompt than they"
        )


def thumb_metrics(
    policy: TokenLogps, reference: ReferenceLogps, batch: TreeBatch, *, beta: float, point: float
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Metrics of each example, [B], detached; and which examples have those that belong to one kind of thumb only.

    `rewards/desirable` and `rewards/undesirable` are the implicit rewards β·(ℓ − ref) of what is up and what is down.
    `rewards/accuracy` is 1 where the reward lies on the right side of the point that the loss compares it with, and ½ where it lies
    within `ROUNDING` of it, so that it starts at one half. `kl` as in `prefopt.methods.pairs.pair_metrics`.

    Args:
        policy, reference, batch: as a loss reads them.
        beta: scale of the reward.
        point: what a reward is compared with: β·z₀ of KTO, δ of BCO.
    """
    policy = policy.detach()
    logps_B, is_up_B = policy.sum(), batch.labels()
    rewards_B = beta * (logps_B - reference.sum())
    away_B = (rewards_B - point) * (2 * is_up_B.to(rewards_B.dtype) - 1)
    metrics = {
        "rewards/desirable": rewards_B,
        "rewards/undesirable": rewards_B,
        "rewards/accuracy": ((away_B > beta * ROUNDING).float() + (away_B >= -beta * ROUNDING).float()) / 2,
        "logps/desirable": logps_B,
        "logps/undesirable": logps_B,
    }
    if reference.has_tokens:
        metrics["kl"] = policy.sum_tokens(divergence(policy.values_N - reference.values_N))
    only = {name: is_up_B if name.endswith("/desirable") else ~is_up_B for name in metrics if name.endswith("desirable")}
    return metrics, only
