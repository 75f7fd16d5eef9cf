"""DiscoPOP: a loss that a language model found, between the logistic and the exponential.

    loss = (1−m)·(−log σ(x)) + m·exp(−x)        x = β·Δ,  m = σ(x/τ),  Δ = (ℓ_c − ref_c) − (ℓ_r − ref_r)

ℓ is a completion's log-probability under the policy, ref the same under the reference, c the
chosen and r the rejected completion. Lu et al. 2024, arXiv 2406.08414, equation 5 (log-ratio
modulated loss). Wrong pairs are treated as by DPO, right ones by the exponential loss, which soon leaves them alone; between the two,
for small margins, it is not convex.

When to use it: to compare with DPO; in the paper it is as good or better on the tasks that it was not found on.
What to watch: at a margin of 0, where training begins, the slope points the wrong way: the loss has a bump at x = 0.07 and a hollow at
x = −0.12 (τ = 0.05), and pairs that stay in the hollow are not learned. β and the learning rate must carry them over; look at
`rewards/accuracy` after the first tenth. What is stuck there the watch calls `wrong_way`.
Deviations from the paper: none; exp(−x)·m is computed as exp(log m − x), which stays finite where each factor does not.

Shapes: B pairs in the batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefopt.methods.maths import in_float32, log_sigmoid, sigmoid
from prefopt.methods.method import DefaultRates, Needs, Setting
from prefopt.methods.options import FDivergence, LengthDesensitised, SFTWeight
from prefopt.methods.pair_method import BetaSettings, PairMethod, PairSettings

if TYPE_CHECKING:
    from torch import Tensor

    from prefopt.methods.method import State
    from prefopt.methods.pairs import Pairs


class DiscoPOPSettings(PairSettings, LengthDesensitised, FDivergence, SFTWeight, BetaSettings):
    """Settings of DiscoPOP."""

    tau: float = Setting(0.05, gt=0, lt=1, help="Width of the change from the logistic to the exponential loss.")


@in_float32
def discopop_loss(
    chosen_B: Tensor, rejected_B: Tensor, ref_chosen_B: Tensor, ref_rejected_B: Tensor, *, beta: float, tau: float = 0.05
) -> Tensor:
    """Loss of each pair, in nats.

    Args:
        chosen_B, rejected_B: log-probabilities of the completions under the policy, summed over tokens, float32.
        ref_chosen_B, ref_rejected_B: the same under the reference; no gradient flows into them.
        beta: inverse temperature of the implicit reward β·(ℓ − ref).
        tau: width of the change from one loss to the other, in (0, 1).

    Returns:
        Tensor of shape [B]; ½·log 2 + ½ where policy and reference agree.

    Example:
        >>> import torch
        >>> zero = torch.zeros(1)
        >>> discopop_loss(zero, zero, zero, zero, beta=0.1)
        tensor([0.8466])
    """
    margin_B = beta * ((chosen_B - ref_chosen_B) - (rejected_B - ref_rejected_B))
    log_share_B = log_sigmoid(margin_B / tau)
    return sigmoid(-margin_B / tau) * -log_sigmoid(margin_B) + (log_share_B - margin_B).exp()


class DiscoPOP(PairMethod):
    """DiscoPOP."""

    name = "discopop"
    paper = "2406.08414"
    settings_class = DiscoPOPSettings
    needs = Needs(completions="pair", reference=True)
    rates = DefaultRates(full=5e-7, adapter=5e-6)
    usual = {"beta": (0.01, 0.5), "tau": (0.01, 0.2)}

    settings: DiscoPOPSettings

    def pair_losses(self, pairs: Pairs, state: State) -> Tensor:
        """`discopop_loss` of each pair."""
        return discopop_loss(*pairs.sums(), beta=self.settings.beta, tau=self.settings.tau)
