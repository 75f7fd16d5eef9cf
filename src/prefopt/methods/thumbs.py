"""What the methods on thumbs have in common: single completions, each good or bad.

Shapes: B completions, one per tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, overload

import numpy as np

from prefopt.data.store import Sizes
from prefopt.errors import DataError
from prefopt.methods.comparisons import best_of
from prefopt.methods.maths import divergence
from prefopt.trees import Completion, PromptTree

if TYPE_CHECKING:
    from torch import Tensor

    from prefopt.engine.batch import TreeBatch
    from prefopt.engine.logps import ReferenceLogps, TokenLogps


class SingleThumbs(Sequence[PromptTree]):
    """One tree per completion, each with its thumb; of pairs and rankings without thumbs the best is up and all others are down.

    Args:
        trees: as the data gives them; read when one is asked for.
    """

    def __init__(self, trees: Sequence[PromptTree]) -> None:
        self.trees = trees
        self.ends = np.cumsum(Sizes.of(trees).branches) if len(trees) else np.zeros(0, dtype=np.int64)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    @overload
    def __getitem__(self, place: int) -> PromptTree: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[PromptTree]: ...

    def __getitem__(self, place: int | slice) -> PromptTree | Sequence[PromptTree]:
        if isinstance(place, slice):
            return [self[index] for index in range(len(self))[place]]
        place = range(len(self))[place]
        number = int(np.searchsorted(self.ends, place, side="right"))
        tree = self.trees[number]
        branch = place - int(self.ends[number]) + len(tree.completions)
        own = tree.completions[branch]
        label = branch == best_of(tree) if own.label is None else own.label
        return replace(tree, completions=(replace(own, label=label),))


class WithPartners(Sequence[PromptTree]):
    """Single thumbs, each with a completion of another prompt behind its own: what the policy's divergence is measured on.

    The partners are the neighbours on a circle of all examples that is drawn by seed, so that each completion is a partner about once
    and the same examples have the same partners for the whole run. Where the neighbour answers the same prompt it is the next but
    one, and so on; where all have one prompt (a few held-out examples may) it is the neighbour all the same. Where prompt and partner
    together are longer than the longest example, the partner's end is left out.

    Args:
        trees: of one completion each; read when one is asked for.
        seed: of the draw.

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
        self.longest = int((sizes.prompt + sizes.longest).max()) if len(trees) else 0
        circle = np.random.default_rng([seed % 2**63, len(trees)]).permutation(len(trees))
        self.after = np.empty_like(circle)
        self.after[circle] = np.roll(circle, -1)
        self.has_one_prompt = all(np.array_equal(tree.prompt_ids, trees[0].prompt_ids) for tree in trees)

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
        partner = self._partner(place, tree).completions[0]
        room = self.longest - len(tree.prompt_ids)
        scored = None if partner.scored is None else partner.scored[:room]
        return replace(tree, completions=(*tree.completions, Completion(partner.ids[:room], scored)))

    def _partner(self, place: int, tree: PromptTree) -> PromptTree:
        found = self.trees[other := int(self.after[place])]
        while not self.has_one_prompt and np.array_equal(found.prompt_ids, tree.prompt_ids):
            found = self.trees[other := int(self.after[other])]
        return found


def counts(trees: Sequence[PromptTree]) -> tuple[float, float]:
    """How many thumbs are up and how many down, by weight."""
    up = down = 0.0
    for tree in trees:
        if tree.completions[0].label:
            up += tree.weight
        else:
            down += tree.weight
    return up, down


def thumb_metrics(
    policy: TokenLogps, reference: ReferenceLogps, batch: TreeBatch, *, beta: float, point: float
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Metrics of each example, [B], detached; and which examples have those that belong to one kind of thumb only.

    `rewards/desirable` and `rewards/undesirable` are the implicit rewards β·(ℓ − ref) of what is up and what is down.
    `rewards/accuracy` is 1 where the reward lies on the right side of the point that the loss compares it with, and ½ on it, so that
    it starts at one half. `kl` as in `prefopt.methods.pairs.pair_metrics`.

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
        "rewards/accuracy": ((away_B > 0).float() + (away_B >= 0).float()) / 2,
        "logps/desirable": logps_B,
        "logps/undesirable": logps_B,
    }
    if reference.has_tokens:
        metrics["kl"] = policy.sum_tokens(divergence(policy.values_N - reference.values_N))
    only = {name: is_up_B if name.endswith("/desirable") else ~is_up_B for name in metrics if name.endswith("desirable")}
    return metrics, only
