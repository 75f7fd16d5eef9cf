"""Length-normalised DPO: DPO on log-probabilities per token.

    loss = −log σ(β·Δ)        Δ = (ℓ_c − ref_c) − (ℓ_r − ref_r)

ℓ is a completion's mean log-probability per token under the policy, ref the same under the reference, c the chosen and r the rejected
completion. Lambert et al. 2024 (Tülu 3), arXiv 2411.15124. A long answer has no larger reward for being long;
β is larger than DPO's: a mean is smaller than a sum.

When to use it: answers differ much in length, or DPO's answers grow.
What to watch: `rewards/*` are β times the mean per token; `samples/length`. With DPO's β it learns next to nothing: 5 is usual.
Deviations from the paper: none. `label_smoothing` is conservative DPO's.

Shapes: B pairs in the batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefopt.methods.dpo import dpo_loss
from prefopt.methods.maths import in_float32
from prefopt.methods.method import DefaultRates, Needs, Setting
from prefopt.methods.options import LabelSmoothing, SFTWeight
from prefopt.methods.pair_method import PairMethod, PairSettings

if TYPE_CHECKING:
    from torch import Tensor

    from prefopt.methods.method import State
    from prefopt.methods.pairs import Pairs


class LengthNormalisedDPOSettings(PairSettings, SFTWeight, LabelSmoothing):
    """Settings of length-normalised DPO."""

    beta: float = Setting(5.0, gt=0, help="Hold on the reference, per token: 2-10 is usual.")


@in_float32
def ln_dpo_loss(
    chosen_B: Tensor, rejected_B: Tensor, ref_chosen_B: Tensor, ref_rejected_B: Tensor, *, beta: float, label_smoothing: float = 0.0
) -> Tensor:
    """Loss of each pair, in nats.

    Args:
        chosen_B, rejected_B: log-probabilities of the completions under the policy, averaged over tokens, float32.
        ref_chosen_B, ref_rejected_B: the same under the reference; no gradient flows into them.
        beta: inverse temperature of the implicit reward β·(ℓ − ref).
        label_smoothing: probability that a label is wrong, in [0, ½).

    Returns:
        Tensor of shape [B]; log 2 where policy and reference agree.

    Example:
        >>> import torch
        >>> zero = torch.zeros(1)
        >>> ln_dpo_loss(zero, zero, zero, zero, beta=5.0)
        tensor([0.6931])
    """
    return dpo_loss(chosen_B, rejected_B, ref_chosen_B, ref_rejected_B, beta=beta, label_smoothing=label_smoothing)


class LengthNormalisedDPO(PairMethod):
    """length-normalised DPO."""

    name = "ln-dpo"
    paper = "2411.15124"
    settings_class = LengthNormalisedDPOSettings
    needs = Needs(completions="pair", reference=True)
    rates = DefaultRates(full=5e-7, adapter=5e-6)
    usual = {"beta": (2.0, 10.0)}

    settings: LengthNormalisedDPOSettings

    @property
    def averaged(self) -> bool:
        """It reads means."""
        return True

    def pair_losses(self, pairs: Pairs, state: State) -> Tensor:
        """`ln_dpo_loss` of each pair."""
        return ln_dpo_loss(*pairs.means(), beta=self.settings.beta, label_smoothing=self.settings.label_smoothing)
