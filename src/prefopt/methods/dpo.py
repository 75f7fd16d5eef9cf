"""Direct Preference Optimization: prefer the chosen answer to the rejected one.

    loss = −log σ(β·Δ)        Δ = (ℓ_c − ref_c) − (ℓ_r − ref_r)

ℓ is a completion's log-probability under the policy, ref the same under the reference, c the
chosen and r the rejected completion. Rafailov et al. 2023, arXiv 2305.18290, equation 7.
With `label_smoothing` ε: −(1−ε)·log σ(βΔ) − ε·log σ(−βΔ), conservative DPO (Mitchell 2023). With `plackett_luce` the loss is the
negative log-likelihood of a whole ranking of K answers (appendix A.3), each of them run once; for two it is the loss above.

When to use it: answers come in pairs, and the reference is the model after SFT.
What to watch: `rewards/margin` rises; `logps/chosen` may fall, but not far below the reference's.
Deviations from the paper: none. `sft_weight` is RPO's term (Pang et al. 2024), by default per token over the optimizer batch as in TRL;
`sft_reduction: mean` is as RPO's paper has it, every answer's mean weighing the same.

Shapes: B pairs in the batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefopt.methods.maths import in_float32, smoothed_log_sigmoid
from prefopt.methods.method import DefaultRates, Needs
from prefopt.methods.options import FDivergence, LabelSmoothing, LengthDesensitised, PlackettLuce, SFTWeight
from prefopt.methods.pair_method import BetaSettings, PairMethod, PairSettings
from prefopt.methods.ranked import order_losses

if TYPE_CHECKING:
    from torch import Tensor

    from prefopt.engine.batch import TreeBatch
    from prefopt.methods.method import State
    from prefopt.methods.pairs import Pairs


class DPOSettings(PairSettings, PlackettLuce, LengthDesensitised, FDivergence, SFTWeight, LabelSmoothing, BetaSettings):
    """Settings of DPO."""

    about_pairs = ("all_pairs", "label_smoothing", "wpo")  # of ld_alpha `PairSettings` says it, for all_pairs too


@in_float32
def dpo_loss(
    chosen_B: Tensor, rejected_B: Tensor, ref_chosen_B: Tensor, ref_rejected_B: Tensor, *, beta: float, label_smoothing: float = 0.0
) -> Tensor:
    """Loss of each pair, in nats.

    Args:
        chosen_B, rejected_B: log-probabilities of the completions under the policy, summed over tokens, float32.
        ref_chosen_B, ref_rejected_B: the same under the reference; no gradient flows into them.
        beta: inverse temperature of the implicit reward β·(ℓ − ref).
        label_smoothing: probability that a label is wrong, in [0, ½).

    Returns:
        Tensor of shape [B]; log 2 where policy and reference agree.

    Example:
        >>> import torch
        >>> zero = torch.zeros(1)
        >>> dpo_loss(zero, zero, zero, zero, beta=0.1)
        tensor([0.6931])
    """
    margin_B = beta * ((chosen_B - ref_chosen_B) - (rejected_B - ref_rejected_B))
    return -smoothed_log_sigmoid(margin_B, label_smoothing)


class DPO(PairMethod):
    """DPO and, with label smoothing, conservative DPO."""

    name = "dpo"
    paper = "2305.18290"
    settings_class = DPOSettings
    needs = Needs(completions="pair", reference=True)
    rates = DefaultRates(full=5e-7, adapter=5e-6)
    usual = {"beta": (0.01, 0.5)}

    settings: DPOSettings

    def pair_losses(self, pairs: Pairs, state: State) -> Tensor:
        """`dpo_loss` of each pair."""
        return dpo_loss(*pairs.sums(), beta=self.settings.beta, label_smoothing=self.settings.label_smoothing)

    def own_losses(self, pairs: Pairs, batch: TreeBatch, state: State) -> Tensor:
        """The loss of each example: of its pairs, or of its order."""
        if not self.settings.plackett_luce:
            return super().own_losses(pairs, batch, state)
        return order_losses(self.settings.beta * pairs.log_ratios(), pairs.comparisons, batch)
