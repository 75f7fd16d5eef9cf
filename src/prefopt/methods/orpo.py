"""Odds-Ratio Preference Optimization: fine-tuning and preference in one step, without a reference.

    loss = NLL + λ·(−log σ(log odds_c − log odds_r))        log odds = ℓ̄ − log(1 − e^ℓ̄)

NLL is the negative log-likelihood per token of the prompts and their chosen answers, over all tokens of the optimizer batch; ℓ̄ a
completion's mean log-probability per token, c the chosen and r the rejected completion. Hong et al. 2024, arXiv 2403.07691,
equations 6 and 7.

When to use it: a base model, pairs, and no stage of SFT before; memory for one model only.
What to watch: `loss` is mostly likelihood; `rewards/accuracy` and `rewards/margin` (λ·ℓ̄) say what was learned of the preference. The
learning rate is that of SFT, not of DPO.
Deviations from the paper: its equation has the likelihood of the chosen answer, its code that of prompt and answer, as here and in
TRL; `likelihood_of: chosen` leaves the prompt out. The likelihood is per token over the optimizer batch, as in its code; with
`sft_reduction: mean` every pair weighs the same, however long, as the expectation of its equation can be read. Both together are
LLaMA-Factory's.

Shapes: B pairs in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from prefopt.methods.arranged import ArrangedTrees, with_scored_prompt
from prefopt.methods.maths import in_float32, log_odds, log_sigmoid
from prefopt.methods.method import DefaultRates, Needs, Setting
from prefopt.methods.options import Reduction
from prefopt.methods.pair_method import PairMethod, PairSettings

if TYPE_CHECKING:
    from torch import Tensor

    from prefopt.methods.method import State
    from prefopt.methods.pairs import Pairs
    from prefopt.trees import PromptTree


class ORPOSettings(PairSettings):
    """Settings of ORPO."""

    has_reference = False

    odds_weight: float = Setting(0.1, ge=0, help="Weight of the odds ratio beside the likelihood (the paper's lambda, TRL's beta).")
    sft_reduction: Reduction = Setting(
        "tokens",
        help="The likelihood's mean: tokens, over all tokens of a step, as its code and TRL have it; over its pairs mean, of their "
        "means per token (LLaMA-Factory, with likelihood_of chosen), or sum, of their sums.",
    )
    likelihood_of: Literal["prompt-and-chosen", "chosen"] = Setting("prompt-and-chosen", help="Whose tokens the likelihood is of.")


@in_float32
def orpo_loss(chosen_B: Tensor, rejected_B: Tensor) -> Tensor:
    """The odds ratio's part of each pair's loss, in nats, before its weight.

    Args:
        chosen_B, rejected_B: log-probabilities of the completions under the policy, averaged over tokens, float32.

    Returns:
        Tensor of shape [B]; log 2 where the two are as likely.

    Example:
        >>> import torch
        >>> orpo_loss(torch.tensor([-1.0]), torch.tensor([-1.0]))
        tensor([0.6931])
    """
    return -log_sigmoid(log_odds(chosen_B) - log_odds(rejected_B))


class ORPO(PairMethod):
    """ORPO."""

    name = "orpo"
    paper = "2403.07691"
    settings_class = ORPOSettings
    needs = Needs(completions="pair", reference=False)
    rates = DefaultRates(full=8e-6, adapter=8e-5)
    usual = {"odds_weight": (0.05, 1.0)}

    settings: ORPOSettings

    @property
    def averaged(self) -> bool:
        """It reads means."""
        return True

    @property
    def reward_scale(self) -> float:
        """λ, so that rewards are on the scale of the loss."""
        return self.settings.odds_weight

    @property
    def likelihood_weight(self) -> float:
        """Always there: it is what the odds ratio is added to."""
        return 1.0

    @property
    def learns_prompt(self) -> bool:
        """As the authors' code does."""
        return self.settings.likelihood_of == "prompt-and-chosen"

    def arrange(self, trees: Sequence[PromptTree], *, seed: int) -> Sequence[PromptTree]:
        """With scored prompts, where the likelihood is of these too."""
        trees = super().arrange(trees, seed=seed)
        return ArrangedTrees(trees, with_scored_prompt) if self.learns_prompt else trees

    def pair_losses(self, pairs: Pairs, state: State) -> Tensor:
        """`orpo_loss` of each pair, by its weight."""
        return self.settings.odds_weight * orpo_loss(*pairs.own_means())
