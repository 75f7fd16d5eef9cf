"""A reference that follows the policy (TR-DPO): every few steps it becomes a mix of the two.

    θ_ref ← α·θ + (1 − α)·θ_ref

Gorbatovski et al. 2024, arXiv 2404.09656: α = 1 every few hundred steps is its hard update, α of 0.5 to 0.6 its soft one. The reference
is in memory: a second model, or on an adapter's base a second adapter. Of an adapter the numbers that it holds are mixed, A and B
each for itself, which for α < 1 is not the mix of their products; at α = 1 it is the policy to the last bit.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from prefopt.engine.batch import TreeBatch
from prefopt.engine.logps import TokenLogps
from prefopt.models.policy import Policy
from prefopt.models.reference import FrozenAdapter, FrozenCopy


@dataclass(frozen=True, slots=True)
class Following:
    """How a reference follows.

    Attributes:
        every_steps: optimizer steps between two mixes.
        weight: α, the policy's share, in (0, 1].
    """

    every_steps: int
    weight: float


class MovingReference:
    """A reference in memory that follows the policy.

    It moves before a step and not after one, so that figures and checkpoints of a step are of the reference that the step was taken with.

    Args:
        reference: a copy of the policy as it was at the start.
        policy: whom it follows.
        following: how.

    Attributes:
        moved_for: the step before which it moved last; 0: it has not yet. Part of a checkpoint, like its weights.
    """

    def __init__(self, reference: FrozenCopy | FrozenAdapter, policy: Policy, following: Following) -> None:
        self.reference, self.policy, self.following = reference, policy, following
        self.moved_for = 0

    @torch.no_grad()
    def logps(self, batch: TreeBatch) -> TokenLogps:
        """The log-probabilities under the reference as it is now."""
        return self.reference.logps(batch)

    def before_step(self, step: int) -> None:
        """Move, if it is time and this step has not been begun before.

        Args:
            step: optimizer steps done.
        """
        if step > 0 and step % self.following.every_steps == 0 and step != self.moved_for:
            self.move()
            self.moved_for = step

    @torch.no_grad()
    def move(self) -> None:
        """Mix, weight by weight; weights that are cut among processes part by part, for both are cut in the same way."""
        share = self.following.weight
        for _, own, of_policy in self._pairs():
            mine, theirs = _part(own), _part(of_policy)
            wide = torch.promote_types(mine.dtype, torch.float32)  # of bf16 numbers a sum in bf16 would lose what is small
            mine.copy_(theirs if share == 1 else theirs.to(wide).mul(share).add_(mine.to(wide), alpha=1 - share))

    def parameters(self) -> dict[str, nn.Parameter]:
        """What a checkpoint must hold of it, by the policy's names."""
        return {name: own for name, own, _ in self._pairs()}

    def _pairs(self) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
        """Name, weight of the reference and of the policy, for all that is trained."""
        if isinstance(self.reference, FrozenAdapter):
            yield from self.reference.pairs()
            return
        own = dict(self.reference.policy.named_parameters())
        for name, parameter in self.policy.named_parameters():
            if parameter.requires_grad:
                yield name, own[name], parameter


def _part(parameter: Tensor) -> Tensor:
    """What this process holds of it."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
