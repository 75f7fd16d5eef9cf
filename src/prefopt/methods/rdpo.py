"""R-DPO: DPO that explains a taste for length away instead of learning it.

    loss = −log σ( β·Δ + α·(len_c − len_r) )        Δ = (ℓ_c − ref_c) − (ℓ_r − ref_r)

ℓ is a completion's log-probability under the policy, ref the same under the reference, c the
chosen and r the rejected completion. len counts its tokens. Park et al. 2024, arXiv 2403.19159.
Where the chosen answer is the longer one the loss is small already, so that the policy learns little from it; what it
learns is what length does not account for.

When to use it: chosen answers are longer than rejected ones on the whole, and the model's answers grow in training.
What to watch: `samples/length` beside the same run with `dpo`; `rewards/*` are without the term of length, so accuracy is the policy's own.
Deviations from the paper: none; α is per token (the paper tries 0.005 to 0.05).

Shapes: B pairs in the batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefopt.methods.maths import in_float32, log_sigmoid
from prefopt.methods.method import DefaultRates, Needs, Setting
from prefopt.methods.options import SFTWeight
from prefopt.methods.pair_method import BetaSettings, PairMethod, PairSettings

if TYPE_CHECKING:
    from torch import Tensor

    from prefopt.methods.method import State
    from prefopt.methods.pairs import Pairs


class RDPOSettings(PairSettings, SFTWeight, BetaSettings):
    """Settings of R-DPO."""

    length_weight: float = Setting(0.01, ge=0, help="Reward per token by which an answer is longer (the paper's alpha); with 0 it is DPO.")


@in_float32
def rdpo_loss(
    chosen_B: Tensor,
    rejected_B: Tensor,
    ref_chosen_B: Tensor,
    ref_rejected_B: Tensor,
    *,
    length_chosen_B: Tensor,
    length_rejected_B: Tensor,
    beta: float,
    length_weight: float,
) -> Tensor:
    """Loss of each pair, in nats.

    Args:
        chosen_B, rejected_B: log-probabilities of the completions under the policy, summed over tokens, float32.
        ref_chosen_B, ref_rejected_B: the same under the reference; no gradient flows into them.
        length_chosen_B, length_rejected_B: tokens of the completions.
        beta: inverse temperature of the implicit reward β·(ℓ − ref).
        length_weight: α, reward per token of length.

    Returns:
        Tensor of shape [B]; log 2 where policy and reference agree and both completions are as long.

    Example:
        >>> import torch
        >>> zero = torch.zeros(1)
        >>> rdpo_loss(zero, zero, zero, zero, length_chosen_B=zero, length_rejected_B=zero, beta=0.1, length_weight=0.01)
        tensor([0.6931])
    """
    margin_B = beta * ((chosen_B - ref_chosen_B) - (rejected_B - ref_rejected_B))
    return -log_sigmoid(margin_B + length_weight * (length_chosen_B - length_rejected_B))


class RDPO(PairMethod):
    """R-DPO."""

    name = "rdpo"
    paper = "2403.19159"
    settings_class = RDPOSettings
    needs = Needs(completions="pair", reference=True)
    rates = DefaultRates(full=5e-7, adapter=5e-6)
    usual = {"beta": (0.01, 0.5), "length_weight": (0.001, 0.05)}

    settings: RDPOSettings

    def pair_losses(self, pairs: Pairs, state: State) -> Tensor:
        """`rdpo_loss` of each pair."""
        chosen_P, rejected_P = pairs.lengths()
        beta, length_weight = self.settings.beta, self.settings.length_weight
        return rdpo_loss(*pairs.sums(), length_chosen_B=chosen_P, length_rejected_B=rejected_P, beta=beta, length_weight=length_weight)
