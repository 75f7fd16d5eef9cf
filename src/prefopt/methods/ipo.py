"""Identity Preference Optimization: like DPO, with a margin that stops growing.

    loss = (Δ − 1/(2β))²        Δ = (ℓ_c − ref_c) − (ℓ_r − ref_r)

ℓ is a completion's mean log-probability per token under the policy, ref the same under the reference, c the chosen and r the
rejected completion. Azar et al. 2023, arXiv 2310.12036, equation 17 (β is the paper's τ). Where DPO's loss goes on falling as the
margin grows, IPO's is least at Δ = 1/(2β), so that pairs on which everybody agrees do not push the policy away without end.

When to use it: few pairs, or pairs whose preference is certain, where DPO overfits; several epochs.
What to watch: the margin comes to rest near ½ (β times 1/(2β)); if it stays far below, lower β or raise the learning rate.
Deviations from the paper: log-probabilities are averaged over tokens, as in TRL, HALOs and LLaMA-Factory and, by TRL's authors, as
the paper's authors meant it. With `reduction: sum` they are summed, as the equation is written and as the original DPO code and
OpenRLHF have it; β is then smaller by about the length of an answer. Figures `rewards/*` follow the reduction.

Shapes: B pairs in the batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from prefopt.methods.maths import in_float32
from prefopt.methods.method import DefaultRates, Needs, Setting
from prefopt.methods.options import SFTWeight
from prefopt.methods.pair_method import PairMethod, PairSettings

if TYPE_CHECKING:
    from torch import Tensor

    from prefopt.methods.method import State
    from prefopt.methods.pairs import Pairs


class IPOSettings(PairSettings, SFTWeight):
    """Settings of IPO."""

    beta: float = Setting(0.1, gt=0, help="The margin per token that is aimed at is 1 / (2 beta); the paper's tau.")
    reduction: Literal["mean", "sum"] = Setting("mean", help="Log-probabilities as means over an answer's tokens, or as sums.")


@in_float32
def ipo_loss(chosen_B: Tensor, rejected_B: Tensor, ref_chosen_B: Tensor, ref_rejected_B: Tensor, *, beta: float) -> Tensor:
    """Loss of each pair, in squared nats.

    Args:
        chosen_B, rejected_B: log-probabilities of the completions under the policy, means (or sums) over tokens, float32.
        ref_chosen_B, ref_rejected_B: the same under the reference; no gradient flows into them.
        beta: the margin aimed at is 1 / (2·beta).

    Returns:
        Tensor of shape [B]; 1 / (4·beta²) where policy and reference agree.

    Example:
        >>> import torch
        >>> zero = torch.zeros(1)
        >>> ipo_loss(zero, zero, zero, zero, beta=0.1)
        tensor([25.])
    """
    margin_B = (chosen_B - ref_chosen_B) - (rejected_B - ref_rejected_B)
    return (margin_B - 1 / (2 * beta)).square()


class IPO(PairMethod):
    """IPO, on means or sums."""

    name = "ipo"
    paper = "2310.12036"
    settings_class = IPOSettings
    needs = Needs(completions="pair", reference=True)
    rates = DefaultRates(full=5e-7, adapter=5e-6)
    usual = {"beta": (0.01, 1.0)}

    settings: IPOSettings

    @property
    def averaged(self) -> bool:
        """Whether it reads means."""
        return self.settings.reduction == "mean"

    def pair_losses(self, pairs: Pairs, state: State) -> Tensor:
        """`ipo_loss` of each pair."""
        return ipo_loss(*(pairs.means() if self.averaged else pairs.sums()), beta=self.settings.beta)
