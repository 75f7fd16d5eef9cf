"""DPO-Positive: DPO that does not let the chosen answer become less likely.

    loss = −log σ( β·(Δ − λ·max(0, ref_c − ℓ_c)) )        Δ = (ℓ_c − ref_c) − (ℓ_r − ref_r)

ℓ is a completion's log-probability under the policy, ref the same under the reference, c the
chosen and r the rejected completion. Pal et al. 2024 (Smaug), arXiv 2402.13228. DPO is
content when both answers fall as long as the rejected one falls faster; here a chosen answer below its reference costs λ times that.

When to use it: the two answers differ in few tokens (maths, code, small edits), where DPO takes the chosen one down with the other.
What to watch: `logps/chosen` stays at its start or rises; if the margin does not grow, the penalty is too strong.
Deviations from the paper: none. The paper's models have β = 0.3 and λ = 50.

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


class DPOPSettings(PairSettings, SFTWeight, BetaSettings):
    """Settings of DPOP."""

    penalty: float = Setting(
        50.0, ge=0, help="Weight of a chosen answer's fall below its reference (the paper's lambda); with 0 it is DPO."
    )


@in_float32
def dpop_loss(chosen_B: Tensor, rejected_B: Tensor, ref_chosen_B: Tensor, ref_rejected_B: Tensor, *, beta: float, penalty: float) -> Tensor:
    """Loss of each pair, in nats.

    Args:
        chosen_B, rejected_B: log-probabilities of the completions under the policy, summed over tokens, float32.
        ref_chosen_B, ref_rejected_B: the same under the reference; no gradient flows into them.
        beta: inverse temperature of the implicit reward β·(ℓ − ref).
        penalty: λ, weight of a chosen completion's fall below its reference.

    Returns:
        Tensor of shape [B]; log 2 where policy and reference agree.

    Example:
        >>> import torch
        >>> zero = torch.zeros(1)
        >>> dpop_loss(zero, zero, zero, zero, beta=0.1, penalty=50.0)
        tensor([0.6931])
    """
    margin_B = (chosen_B - ref_chosen_B) - (rejected_B - ref_rejected_B)
    fallen_B = (ref_chosen_B - chosen_B).clamp(min=0)
    return -log_sigmoid(beta * (margin_B - penalty * fallen_B))


class DPOP(PairMethod):
    """DPOP."""

    name = "dpop"
    paper = "2402.13228"
    settings_class = DPOPSettings
    needs = Needs(completions="pair", reference=True)
    rates = DefaultRates(full=5e-7, adapter=5e-6)
    usual = {"beta": (0.01, 0.5), "penalty": (5.0, 500.0)}

    settings: DPOPSettings

    def pair_losses(self, pairs: Pairs, state: State) -> Tensor:
        """`dpop_loss` of each pair."""
        return dpop_loss(*pairs.sums(), beta=self.settings.beta, penalty=self.settings.penalty)
