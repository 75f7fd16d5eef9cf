"""Hinge loss on the margin, as in SLiC: pairs that are right by enough teach no more.

    loss = max(0, 1 − β·Δ)        Δ = (ℓ_c − ref_c) − (ℓ_r − ref_r)

ℓ is a completion's log-probability under the policy, ref the same under the reference, c the
chosen and r the rejected completion. The hinge of SLiC-HF (Zhao et al. 2023, arXiv 2305.10425) on DPO's
margin, as in Liu et al. 2023 (RSO), arXiv 2309.06657. A pair whose margin has reached 1 has no gradient, all others have
the same: noise in pairs that are far from right pulls no harder than the rest.

When to use it: pairs of mixed quality, or where DPO goes on pushing pairs that it has learned long ago.
What to watch: `rewards/margin` comes to rest near 1; the loss is 0 where all pairs are learned, and training has ended by itself.
Deviations from the paper: SLiC's own calibration has no reference and adds a likelihood term; for the latter give `sft_weight`
with `sft_reduction: sum`.

Shapes: B pairs in the batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefopt.methods.maths import in_float32
from prefopt.methods.method import DefaultRates, Needs
from prefopt.methods.options import FDivergence, LengthDesensitised, SFTWeight
from prefopt.methods.pair_method import BetaSettings, PairMethod, PairSettings

if TYPE_CHECKING:
    from torch import Tensor

    from prefopt.methods.method import State
    from prefopt.methods.pairs import Pairs


class HingeSettings(PairSettings, LengthDesensitised, FDivergence, SFTWeight, BetaSettings):
    """Settings of the hinge loss."""


@in_float32
def hinge_loss(chosen_B: Tensor, rejected_B: Tensor, ref_chosen_B: Tensor, ref_rejected_B: Tensor, *, beta: float) -> Tensor:
    """Loss of each pair, without unit.

    Args:
        chosen_B, rejected_B: log-probabilities of the completions under the policy, summed over tokens, float32.
        ref_chosen_B, ref_rejected_B: the same under the reference; no gradient flows into them.
        beta: inverse temperature of the implicit reward β·(ℓ − ref).

    Returns:
        Tensor of shape [B]; 1 where policy and reference agree.

    Example:
        >>> import torch
        >>> zero = torch.zeros(1)
        >>> hinge_loss(zero, zero, zero, zero, beta=0.1)
        tensor([1.])
    """
    margin_B = beta * ((chosen_B - ref_chosen_B) - (rejected_B - ref_rejected_B))
    return (1 - margin_B).clamp(min=0)


class Hinge(PairMethod):
    """the hinge loss."""

    name = "hinge"
    paper = "2309.06657"
    settings_class = HingeSettings
    needs = Needs(completions="pair", reference=True)
    rates = DefaultRates(full=5e-7, adapter=5e-6)
    usual = {"beta": (0.01, 0.5)}

    settings: HingeSettings

    def pair_losses(self, pairs: Pairs, state: State) -> Tensor:
        """`hinge_loss` of each pair."""
        return hinge_loss(*pairs.sums(), beta=self.settings.beta)
