"""Anchored Preference Optimization, zero: the chosen answer rises, the rejected one falls.

    loss = 1 − σ(ρ_c) + σ(ρ_r)        ρ = β·(ℓ − ref)

ℓ is a completion's log-probability under the policy, ref the same under the reference, c the
chosen and r the rejected completion. D'Oosterlinck et al. 2024, arXiv 2408.06266, equation 7. Each
answer is anchored to its own reference, where DPO sees their distance only.

When to use it: the chosen answers are better than what the model gives by itself.
What to watch: `rewards/chosen` above 0 and `rewards/rejected` below; gradients vanish at either end, so a pair that is far from right
is left alone.
Deviations from the paper: none.

Shapes: B pairs in the batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefopt.methods.maths import in_float32, sigmoid
from prefopt.methods.method import DefaultRates, Needs
from prefopt.methods.options import SFTWeight
from prefopt.methods.pair_method import BetaSettings, PairMethod, PairSettings

if TYPE_CHECKING:
    from torch import Tensor

    from prefopt.methods.method import State
    from prefopt.methods.pairs import Pairs


class APOZeroSettings(PairSettings, SFTWeight, BetaSettings):
    """Settings of APO-zero."""


@in_float32
def apo_zero_loss(chosen_B: Tensor, rejected_B: Tensor, ref_chosen_B: Tensor, ref_rejected_B: Tensor, *, beta: float) -> Tensor:
    """Loss of each pair, in [0, 2].

    Args:
        chosen_B, rejected_B: log-probabilities of the completions under the policy, summed over tokens, float32.
        ref_chosen_B, ref_rejected_B: the same under the reference; no gradient flows into them.
        beta: inverse temperature of the implicit reward β·(ℓ − ref).

    Returns:
        Tensor of shape [B]; 1 where policy and reference agree.

    Example:
        >>> import torch
        >>> zero = torch.zeros(1)
        >>> apo_zero_loss(zero, zero, zero, zero, beta=0.1)
        tensor([1.])
    """
    chosen_reward_B, rejected_reward_B = beta * (chosen_B - ref_chosen_B), beta * (rejected_B - ref_rejected_B)
    return 1 - sigmoid(chosen_reward_B) + sigmoid(rejected_reward_B)


class APOZero(PairMethod):
    """APO-zero."""

    name = "apo-zero"
    paper = "2408.06266"
    settings_class = APOZeroSettings
    needs = Needs(completions="pair", reference=True)
    rates = DefaultRates(full=5e-7, adapter=5e-6)
    usual = {"beta": (0.01, 0.5)}

    settings: APOZeroSettings

    def pair_losses(self, pairs: Pairs, state: State) -> Tensor:
        """`apo_zero_loss` of each pair."""
        return apo_zero_loss(*pairs.sums(), beta=self.settings.beta)
