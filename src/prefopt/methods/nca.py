"""Noise Contrastive Alignment: raises the chosen answer itself, not only its distance from the rejected one.

    loss = −log σ(ρ_c) − ½·log σ(−ρ_c) − ½·log σ(−ρ_r)        ρ = β·(ℓ − ref)

ℓ is a completion's log-probability under the policy, ref the same under the reference, c the
chosen and r the rejected completion. Chen et al. 2024, arXiv 2402.05369, the form for
pairs of answers. The second term holds a chosen answer that has risen, so that its reward rests at log 2; DPO has nothing that holds it.

When to use it: DPO lowers the chosen answers' log-probability, and that hurts (reasoning, code).
What to watch: `rewards/chosen` rises to about log 2 = 0.69 and stays; `rewards/rejected` falls without end.
Deviations from the paper: none for pairs.

Shapes: B pairs in the batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefopt.methods.maths import in_float32, log_sigmoid
from prefopt.methods.method import DefaultRates, Needs
from prefopt.methods.options import SFTWeight
from prefopt.methods.pair_method import BetaSettings, PairMethod, PairSettings

if TYPE_CHECKING:
    from torch import Tensor

    from prefopt.methods.method import State
    from prefopt.methods.pairs import Pairs


class NCASettings(PairSettings, SFTWeight, BetaSettings):
    """Settings of NCA."""


@in_float32
def nca_loss(chosen_B: Tensor, rejected_B: Tensor, ref_chosen_B: Tensor, ref_rejected_B: Tensor, *, beta: float) -> Tensor:
    """Loss of each pair, in nats.

    Args:
        chosen_B, rejected_B: log-probabilities of the completions under the policy, summed over tokens, float32.
        ref_chosen_B, ref_rejected_B: the same under the reference; no gradient flows into them.
        beta: inverse temperature of the implicit reward β·(ℓ − ref).

    Returns:
        Tensor of shape [B]; 2·log 2 where policy and reference agree.

    Example:
        >>> import torch
        >>> zero = torch.zeros(1)
        >>> nca_loss(zero, zero, zero, zero, beta=0.1)
        tensor([1.3863])
    """
    chosen_reward_B, rejected_reward_B = beta * (chosen_B - ref_chosen_B), beta * (rejected_B - ref_rejected_B)
    return -log_sigmoid(chosen_reward_B) - (log_sigmoid(-chosen_reward_B) + log_sigmoid(-rejected_reward_B)) / 2


class NCA(PairMethod):
    """NCA."""

    name = "nca"
    paper = "2402.05369"
    settings_class = NCASettings
    needs = Needs(completions="pair", reference=True)
    rates = DefaultRates(full=5e-7, adapter=5e-6)
    usual = {"beta": (0.01, 0.5)}

    settings: NCASettings

    def pair_losses(self, pairs: Pairs, state: State) -> Tensor:
        """`nca_loss` of each pair."""
        return nca_loss(*pairs.sums(), beta=self.settings.beta)
