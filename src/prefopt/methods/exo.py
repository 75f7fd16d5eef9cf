"""Efficient Exact Optimization: the reverse KL to the labels, in place of DPO's forward KL.

    loss = KL( [p, 1−p] ‖ [1−ε, ε] )        p = σ(β·Δ),  Δ = (ℓ_c − ref_c) − (ℓ_r − ref_r)

ℓ is a completion's log-probability under the policy, ref the same under the reference, c the
chosen and r the rejected completion. ε is the probability that a label is wrong. Ji et al. 2024, arXiv 2402.00856,
equation 16, for two completions. DPO's loss is the same divergence the other way round; the reverse one looks for a mode of the labels
and does not spread over them, and is least at a finite margin, β·Δ = log((1−ε)/ε).

When to use it: where DPO's margins run away, and labels are mostly right.
What to watch: `rewards/margin` comes to rest near log((1−ε)/ε), 6.9 for ε = 0.001.
Deviations from the paper: none for pairs; its form for K completions is not offered (`all_pairs` takes pairs of a ranking).

Shapes: B pairs in the batch.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from prefopt.methods.maths import in_float32, log_sigmoid
from prefopt.methods.method import DefaultRates, Needs, Setting
from prefopt.methods.options import FDivergence, LengthDesensitised, SFTWeight
from prefopt.methods.pair_method import BetaSettings, PairMethod, PairSettings

if TYPE_CHECKING:
    from torch import Tensor

    from prefopt.methods.method import State
    from prefopt.methods.pairs import Pairs


class EXOSettings(PairSettings, LengthDesensitised, FDivergence, SFTWeight, BetaSettings):
    """Settings of EXO."""

    label_smoothing: float = Setting(1e-3, gt=0, lt=0.5, help="Probability that a label is wrong; the loss has no meaning at 0.")


@in_float32
def exo_loss(
    chosen_B: Tensor, rejected_B: Tensor, ref_chosen_B: Tensor, ref_rejected_B: Tensor, *, beta: float, label_smoothing: float
) -> Tensor:
    """Loss of each pair, in nats.

    Args:
        chosen_B, rejected_B: log-probabilities of the completions under the policy, summed over tokens, float32.
        ref_chosen_B, ref_rejected_B: the same under the reference; no gradient flows into them.
        beta: inverse temperature of the implicit reward β·(ℓ − ref).
        label_smoothing: ε, the probability that a label is wrong, in (0, ½).

    Returns:
        Tensor of shape [B]; ½·log(½/(1−ε)) + ½·log(½/ε) where policy and reference agree.

    Example:
        >>> import torch
        >>> zero = torch.zeros(1)
        >>> exo_loss(zero, zero, zero, zero, beta=0.1, label_smoothing=0.25)
        tensor([0.1438])
    """
    margin_B = beta * ((chosen_B - ref_chosen_B) - (rejected_B - ref_rejected_B))
    log_p_B, log_q_B = log_sigmoid(margin_B), log_sigmoid(-margin_B)
    return log_p_B.exp() * (log_p_B - math.log1p(-label_smoothing)) + log_q_B.exp() * (log_q_B - math.log(label_smoothing))


class EXO(PairMethod):
    """EXO."""

    name = "exo"
    paper = "2402.00856"
    settings_class = EXOSettings
    needs = Needs(completions="pair", reference=True)
    rates = DefaultRates(full=5e-7, adapter=5e-6)
    usual = {"beta": (0.01, 0.5)}

    settings: EXOSettings

    def pair_losses(self, pairs: Pairs, state: State) -> Tensor:
        """`exo_loss` of each pair."""
        return exo_loss(*pairs.sums(), beta=self.settings.beta, label_smoothing=self.settings.label_smoothing)
