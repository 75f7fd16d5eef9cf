"""Contrastive Preference Optimization: DPO without a reference, held by the likelihood of the chosen answers.

    loss = −log σ(β·(ℓ_c − ℓ_r)) + α·NLL_c

ℓ is a completion's log-probability under the policy, c the chosen and r the rejected completion, NLL_c the chosen answers' negative
log-likelihood, by default per token over all tokens of the optimizer batch. Xu et al. 2024, arXiv 2401.08417, equations 3 to 5: DPO
with a uniform reference, and the likelihood in the place of what the reference does.

When to use it: no memory or time for a reference, and chosen answers that are good to imitate, as in translation.
What to watch: sums of log-probabilities favour short answers: look at `samples/length`. `rewards/*` are β·ℓ, so their accuracy does
not start at one half.
Deviations from the paper: its likelihood is −E[log π(y_c|x)], an answer's sum, averaged over pairs: `sft_reduction: sum` computes that.
The default is a mean per token, as in the authors' code and in TRL, and smaller by about the length of an answer. α is `sft_weight` here,
cpo_alpha in TRL.

Shapes: B pairs in the batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefopt.methods.maths import in_float32, smoothed_log_sigmoid
from prefopt.methods.method import DefaultRates, Needs, Setting
from prefopt.methods.options import LabelSmoothing, SFTWeight
from prefopt.methods.pair_method import PairMethod, PairSettings

if TYPE_CHECKING:
    from torch import Tensor

    from prefopt.methods.method import State
    from prefopt.methods.pairs import Pairs


class CPOSettings(PairSettings, SFTWeight, LabelSmoothing):
    """Settings of CPO."""

    has_reference = False

    beta: float = Setting(0.1, gt=0, help="Scale of the reward, the summed log-probability; 0.1-0.5 is usual.")
    sft_weight: float = Setting(1.0, ge=0, help="Weight of the chosen answers' negative log-likelihood; the paper's is 1, of sums.")


@in_float32
def cpo_loss(chosen_B: Tensor, rejected_B: Tensor, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """The preference's part of each pair's loss, in nats.

    Args:
        chosen_B, rejected_B: log-probabilities of the completions under the policy, summed over tokens, float32.
        beta: scale of the reward.
        label_smoothing: probability that a label is wrong, in [0, ½).

    Returns:
        Tensor of shape [B]; log 2 where the two are as likely.

    Example:
        >>> import torch
        >>> cpo_loss(torch.tensor([-10.0]), torch.tensor([-10.0]), beta=0.1)
        tensor([0.6931])
    """
    margin_B = beta * (chosen_B - rejected_B)
    return -smoothed_log_sigmoid(margin_B, label_smoothing)


class CPO(PairMethod):
    """CPO."""

    name = "cpo"
    paper = "2401.08417"
    settings_class = CPOSettings
    needs = Needs(completions="pair", reference=False)
    rates = DefaultRates(full=1e-6, adapter=1e-5)
    usual = {"beta": (0.05, 0.5), "sft_weight": (0.1, 2.0)}

    settings: CPOSettings

    def pair_losses(self, pairs: Pairs, state: State) -> Tensor:
        """`cpo_loss` of each pair."""
        return cpo_loss(*pairs.own_sums(), beta=self.settings.beta, label_smoothing=self.settings.label_smoothing)
