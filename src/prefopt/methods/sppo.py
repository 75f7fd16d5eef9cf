"""Self-Play Preference Optimization: log-ratios are regressed to plus and minus ½/β.

    loss = (r_c − ½/β)² + (r_r + ½/β)²        r = ℓ − ref

ℓ is a completion's log-probability under the policy, ref the same under the reference, c the
chosen and r the rejected completion. Wu et al. 2024, arXiv 2405.00675, equation 4.7 with the
probability that the chosen one wins set to 1 (the "hard" form).

When to use it: rounds of training on pairs of the model's own answers, each round with the last round's model as the reference.
What to watch: `rewards/chosen` rests near ½ and `rewards/rejected` near −½ (β times the log-ratio). A β of 0.001 asks for a log-ratio
of 500 nats; the loss is large then, and so are gradients before clipping.
Deviations from the paper: the answers come from the data, not from the model, and labels are hard. The authors' code halves the loss,
which is the same as half the learning rate.

Shapes: B pairs in the batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefopt.methods.maths import in_float32
from prefopt.methods.method import DefaultRates, Needs, Setting
from prefopt.methods.options import SFTWeight
from prefopt.methods.pair_method import PairMethod, PairSettings

if TYPE_CHECKING:
    from torch import Tensor

    from prefopt.methods.method import State
    from prefopt.methods.pairs import Pairs


class SPPOSettings(PairSettings, SFTWeight):
    """Settings of SPPO."""

    beta: float = Setting(0.1, gt=0, help="The log-ratio that is aimed at is 1 / (2 beta), in nats per answer; the paper has 0.001.")


@in_float32
def sppo_loss(chosen_B: Tensor, rejected_B: Tensor, ref_chosen_B: Tensor, ref_rejected_B: Tensor, *, beta: float) -> Tensor:
    """Loss of each pair, in squared nats.

    Args:
        chosen_B, rejected_B: log-probabilities of the completions under the policy, summed over tokens, float32.
        ref_chosen_B, ref_rejected_B: the same under the reference; no gradient flows into them.
        beta: the log-ratios aimed at are ±½/beta; the paper's 1/η.

    Returns:
        Tensor of shape [B]; ½/β² where policy and reference agree.

    Example:
        >>> import torch
        >>> zero = torch.zeros(1)
        >>> sppo_loss(zero, zero, zero, zero, beta=0.1)
        tensor([50.])
    """
    goal = 0.5 / beta
    return (chosen_B - ref_chosen_B - goal).square() + (rejected_B - ref_rejected_B + goal).square()


class SPPO(PairMethod):
    """SPPO."""

    name = "sppo"
    paper = "2405.00675"
    settings_class = SPPOSettings
    needs = Needs(completions="pair", reference=True)
    rates = DefaultRates(full=5e-7, adapter=5e-6)
    usual = {"beta": (0.001, 0.5)}

    settings: SPPOSettings

    def pair_losses(self, pairs: Pairs, state: State) -> Tensor:
        """`sppo_loss` of each pair."""
        return sppo_loss(*pairs.sums(), beta=self.settings.beta)
