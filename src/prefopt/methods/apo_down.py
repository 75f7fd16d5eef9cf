"""Anchored Preference Optimization, down: both answers fall, the rejected one faster.

    loss = σ(ρ_c) + 1 − σ(ρ_c − ρ_r)        ρ = β·(ℓ − ref)

ℓ is a completion's log-probability under the policy, ref the same under the reference, c the
chosen and r the rejected completion. D'Oosterlinck et al. 2024, arXiv 2408.06266, equation 8.

When to use it: the model gives better answers by itself than the chosen ones are, and should learn from their difference only.
What to watch: `rewards/chosen` falls too: that is what it is for. `rewards/margin` must rise. Only the sigmoid's flat end stops the
fall: where the chosen answers are as good as the model's own, the text can break (docs/results.md).
Deviations from the paper: none.

Shapes: B pairs in the batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefopt.methods.maths import in_float32, sigmoid
from prefopt.methods.method import DefaultRates, Needs
from prefopt.methods.pair_method import BetaSettings, PairMethod, PairSettings

if TYPE_CHECKING:
    from torch import Tensor

    from prefopt.methods.method import State
    from prefopt.methods.pairs import Pairs


class APODownSettings(PairSettings, BetaSettings):
    """Settings of APO-down."""


@in_float32
def apo_down_loss(chosen_B: Tensor, rejected_B: Tensor, ref_chosen_B: Tensor, ref_rejected_B: Tensor, *, beta: float) -> Tensor:
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
        >>> apo_down_loss(zero, zero, zero, zero, beta=0.1)
        tensor([1.])
    """
    chosen_reward_B, rejected_reward_B = beta * (chosen_B - ref_chosen_B), beta * (rejected_B - ref_rejected_B)
    return sigmoid(chosen_reward_B) + 1 - sigmoid(chosen_reward_B - rejected_reward_B)


class APODown(PairMethod):
    """APO-down."""

    name = "apo-down"
    paper = "2408.06266"
    settings_class = APODownSettings
    needs = Needs(completions="pair", reference=True)
    rates = DefaultRates(full=5e-7, adapter=5e-6)
    usual = {"beta": (0.01, 0.5)}

    settings: APODownSettings

    def pair_losses(self, pairs: Pairs, state: State) -> Tensor:
        """`apo_down_loss` of each pair."""
        return apo_down_loss(*pairs.sums(), beta=self.settings.beta)
