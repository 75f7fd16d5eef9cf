"""Robust DPO: unbiased under labels that are flipped at a known rate.

    loss = [ −(1−ε)·log σ(β·Δ) + ε·log σ(−β·Δ) ] / (1 − 2ε)        Δ = (ℓ_c − ref_c) − (ℓ_r − ref_r)

ℓ is a completion's log-probability under the policy, ref the same under the reference, c the
chosen and r the rejected completion. ε is the rate at which chosen and rejected were
exchanged, by chance. Chowdhury et al. 2024, arXiv 2403.00409. In the mean over such exchanges the loss is DPO's on clean
labels, where conservative DPO (`dpo` with `label_smoothing`) is biased towards small margins.

When to use it: labels are wrong at a rate that you know about, from double annotation for example.
What to watch: the loss may become negative, which is right: its second term rewards being sure. The more pairs are wrong than
`label_smoothing` says, the more it overfits to them; compare with `dpo --label-smoothing` on held-out pairs.
Deviations from the paper: none.

Shapes: B pairs in the batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefopt.methods.maths import in_float32, log_sigmoid
from prefopt.methods.method import DefaultRates, Needs, Setting
from prefopt.methods.options import FDivergence, LengthDesensitised, SFTWeight
from prefopt.methods.pair_method import BetaSettings, PairMethod, PairSettings

if TYPE_CHECKING:
    from torch import Tensor

    from prefopt.methods.method import State
    from prefopt.methods.pairs import Pairs


class RobustSettings(PairSettings, LengthDesensitised, FDivergence, SFTWeight, BetaSettings):
    """Settings of robust DPO."""

    label_smoothing: float = Setting(0.1, ge=0, lt=0.5, help="Share of pairs whose labels are exchanged; with 0 it is DPO.")


@in_float32
def robust_loss(
    chosen_B: Tensor, rejected_B: Tensor, ref_chosen_B: Tensor, ref_rejected_B: Tensor, *, beta: float, label_smoothing: float
) -> Tensor:
    """Loss of each pair, in nats.

    Args:
        chosen_B, rejected_B: log-probabilities of the completions under the policy, summed over tokens, float32.
        ref_chosen_B, ref_rejected_B: the same under the reference; no gradient flows into them.
        beta: inverse temperature of the implicit reward β·(ℓ − ref).
        label_smoothing: ε, the probability that a label is wrong, in [0, ½).

    Returns:
        Tensor of shape [B]; log 2 where policy and reference agree.

    Example:
        >>> import torch
        >>> zero = torch.zeros(1)
        >>> robust_loss(zero, zero, zero, zero, beta=0.1, label_smoothing=0.25)
        tensor([0.6931])
    """
    margin_B = beta * ((chosen_B - ref_chosen_B) - (rejected_B - ref_rejected_B))
    mixed_B = -(1 - label_smoothing) * log_sigmoid(margin_B) + label_smoothing * log_sigmoid(-margin_B)
    return mixed_B / (1 - 2 * label_smoothing)


class Robust(PairMethod):
    """robust DPO."""

    name = "robust"
    paper = "2403.00409"
    settings_class = RobustSettings
    needs = Needs(completions="pair", reference=True)
    rates = DefaultRates(full=5e-7, adapter=5e-6)
    usual = {"beta": (0.01, 0.5), "label_smoothing": (0.01, 0.4)}

    settings: RobustSettings

    def pair_losses(self, pairs: Pairs, state: State) -> Tensor:
        """`robust_loss` of each pair."""
        return robust_loss(*pairs.sums(), beta=self.settings.beta, label_smoothing=self.settings.label_smoothing)
