"""Simple Preference Optimization: the mean log-probability is the reward; no reference, and a margin to reach.

    loss = −log σ(β·(ℓ̄_c − ℓ̄_r) − γ)

ℓ̄ is a completion's mean log-probability per token under the policy, c the chosen and r the rejected completion. Meng et al. 2024,
arXiv 2405.14734, equation 6. What is rewarded is what decoding looks for, a high mean log-probability; γ is the margin by which the
chosen answer should win.

When to use it: an instruction-tuned model, many pairs of its own answers, no memory for a reference, answers that DPO makes long.
What to watch: nothing holds the policy to where it started: `logps/chosen`, `samples/length` and held-out accuracy say when it has
gone too far. β and the learning rate matter much (the paper tunes both: β 2-10, γ/β 0.1-0.8, learning rate 3e-7 to 1e-6).
Deviations from the paper: none. The authors' code takes γ/β, here `gamma_beta_ratio`, TRL takes γ, here `gamma`.

Shapes: B pairs in the batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import model_validator

from prefopt.methods.maths import in_float32, smoothed_log_sigmoid
from prefopt.methods.method import DefaultRates, Needs, Setting
from prefopt.methods.options import LabelSmoothing, SFTWeight
from prefopt.methods.pair_method import PairMethod, PairSettings

if TYPE_CHECKING:
    from torch import Tensor

    from prefopt.methods.method import State
    from prefopt.methods.pairs import Pairs

USUAL_RATIO = 0.5
"""γ/β where neither it nor γ is given."""


class SimPOSettings(PairSettings, SFTWeight, LabelSmoothing):
    """Settings of SimPO."""

    has_reference = False

    beta: float = Setting(2.5, gt=0, help="Scale of the reward, the mean log-probability per token; 2-10 is usual.")
    gamma_beta_ratio: float | None = Setting(
        None, ge=0, help="Margin to reach, divided by beta, as in the authors' code. Left out, and gamma too: 0.5."
    )
    gamma: float | None = Setting(None, ge=0, help="Margin to reach itself, TRL's simpo_gamma: beta times gamma_beta_ratio.")

    @model_validator(mode="after")
    def _one_margin(self) -> SimPOSettings:
        if self.gamma is not None and self.gamma_beta_ratio is not None:
            raise ValueError("gamma and gamma_beta_ratio say the same in two ways (gamma = beta * gamma_beta_ratio): give one of them")
        return self

    @property
    def margin(self) -> float:
        """γ, whichever way it was given."""
        if self.gamma is not None:
            return self.gamma
        return self.beta * (USUAL_RATIO if self.gamma_beta_ratio is None else self.gamma_beta_ratio)


@in_float32
def simpo_loss(chosen_B: Tensor, rejected_B: Tensor, *, beta: float, gamma: float, label_smoothing: float = 0.0) -> Tensor:
    """Loss of each pair, in nats.

    Args:
        chosen_B, rejected_B: log-probabilities of the completions under the policy, averaged over tokens, float32.
        beta: scale of the reward.
        gamma: margin of the rewards at which the loss is log 2; γ itself, not γ/β.
        label_smoothing: probability that a label is wrong, in [0, ½).

    Returns:
        Tensor of shape [B].

    Example:
        >>> import torch
        >>> simpo_loss(torch.tensor([-1.0]), torch.tensor([-1.5]), beta=2.0, gamma=1.0)
        tensor([0.6931])
    """
    margin_B = beta * (chosen_B - rejected_B) - gamma
    return -smoothed_log_sigmoid(margin_B, label_smoothing)


class SimPO(PairMethod):
    """SimPO."""

    name = "simpo"
    paper = "2405.14734"
    settings_class = SimPOSettings
    needs = Needs(completions="pair", reference=False)
    rates = DefaultRates(full=6e-7, adapter=6e-6)
    usual = {"beta": (2.0, 10.0), "gamma_beta_ratio": (0.1, 0.8)}

    settings: SimPOSettings

    @property
    def averaged(self) -> bool:
        """It reads means."""
        return True

    def pair_losses(self, pairs: Pairs, state: State) -> Tensor:
        """`simpo_loss` of each pair."""
        settings = self.settings
        return simpo_loss(*pairs.own_means(), beta=settings.beta, gamma=settings.margin, label_smoothing=settings.label_smoothing)
