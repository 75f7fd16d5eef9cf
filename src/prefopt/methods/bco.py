"""Binary Classifier Optimization: the implicit reward, shifted, classifies answers as good or bad.

    loss = −log σ(ρ_c − δ) − log σ(−(ρ_r − δ))        ρ = β·(ℓ − ref)

ℓ is a completion's log-probability under the policy, ref the same under the reference, c the chosen and r the rejected
completion; δ is halfway between the mean reward of chosen and that of rejected answers seen so far, without gradient. Jung et al. 2024,
arXiv 2404.04656. With `unpaired` each answer has a thumb: −log σ(ρ − δ) where it is up, −log σ(−(ρ − δ)) where it is down.

When to use it: thumbs on single answers, where KTO's second pass is too dear; or pairs whose answers are good or bad by themselves.
What to watch: `rewards/accuracy` of thumbs is that of the classifier; the shift follows the rewards, more slowly the longer the run,
and faster with a lower `shift_decay`.
Deviations from the paper: the shift is made of the steps before, so that a step takes one pass. The paper's weights for answers whose
prompts differ between the kinds (by a classifier of prompts) are not offered: give `weight` in the data. TRL's form for pairs has no
shift.

Shapes: B pairs, or completions with a thumb, in the batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pydantic import model_validator

from prefopt.methods.maths import in_float32, log_sigmoid
from prefopt.methods.method import DefaultRates, LossOutput, Needs, Setting, State, Term, Times, one_per_example
from prefopt.methods.options import SFTWeight
from prefopt.methods.pair_method import BetaSettings, PairMethod, PairSettings
from prefopt.methods.thumbs import Thumbs, thumb_metrics

if TYPE_CHECKING:
    from torch import Tensor

    from prefopt.engine.batch import TreeBatch
    from prefopt.engine.logps import ReferenceLogps, TokenLogps
    from prefopt.methods.comparisons import Comparisons
    from prefopt.methods.pairs import Pairs
    from prefopt.trees import PromptTree

ABOUT_PAIRS = ("all_pairs", "mix", "wpo", "sft_weight")
"""Settings that have no meaning for single answers."""

SEEN = ("up_reward", "up_weight", "down_reward", "down_weight")
"""What the shift is made of: sums of rewards and of weights, of good and of bad answers."""


class BCOSettings(PairSettings, SFTWeight, BetaSettings):
    """Settings of BCO."""

    unpaired: bool = Setting(False, help="Learn from single answers with a thumb up or down, in place of pairs.", reads="thumbs")
    shift_decay: float = Setting(
        1.0, gt=0, le=1, help="What a step's rewards still count for in the shift after the next step: 1 is the mean of all, 0.99 follows."
    )

    @model_validator(mode="after")
    def _thumbs_are_no_pairs(self) -> BCOSettings:
        if self.unpaired and (given := [name for name in ABOUT_PAIRS if getattr(self, name)]):
            raise ValueError(f"{given[0]} is about pairs, and unpaired reads single answers: leave one of them out")
        return self


@in_float32
def bco_loss(
    chosen_B: Tensor, rejected_B: Tensor, ref_chosen_B: Tensor, ref_rejected_B: Tensor, *, beta: float, shift: float = 0.0
) -> Tensor:
    """Loss of each pair, in nats.

    Args:
        chosen_B, rejected_B: log-probabilities of the completions under the policy, summed over tokens, float32.
        ref_chosen_B, ref_rejected_B: the same under the reference; no gradient flows into them.
        beta: inverse temperature of the implicit reward β·(ℓ − ref).
        shift: δ, the reward at which an answer is neither good nor bad.

    Returns:
        Tensor of shape [B]; 2·log 2 where policy and reference agree and the shift is 0.

    Example:
        >>> import torch
        >>> zero = torch.zeros(1)
        >>> bco_loss(zero, zero, zero, zero, beta=0.1)
        tensor([1.3863])
    """
    chosen_reward_B, rejected_reward_B = beta * (chosen_B - ref_chosen_B), beta * (rejected_B - ref_rejected_B)
    return -log_sigmoid(chosen_reward_B - shift) - log_sigmoid(shift - rejected_reward_B)


@in_float32
def bco_thumbs_loss(logps_B: Tensor, ref_B: Tensor, is_up_B: Tensor, *, beta: float, shift: float = 0.0) -> Tensor:
    """Loss of each completion with a thumb, in nats.

    Args:
        logps_B: log-probabilities of the completions under the policy, summed over tokens, float32.
        ref_B: the same under the reference; no gradient flows into it.
        is_up_B: which have a thumb up, bool.
        beta: inverse temperature of the implicit reward β·(ℓ − ref).
        shift: δ, the reward at which an answer is neither good nor bad.

    Returns:
        Tensor of shape [B]; log 2 where policy and reference agree and the shift is 0.

    Example:
        >>> import torch
        >>> bco_thumbs_loss(torch.zeros(2), torch.zeros(2), torch.tensor([True, False]), beta=0.1)
        tensor([0.6931, 0.6931])
    """
    sign_B = 2 * is_up_B.to(logps_B.dtype) - 1
    return -log_sigmoid(sign_B * (beta * (logps_B - ref_B) - shift))


class BCO(PairMethod):
    """BCO on pairs, or on thumbs."""

    name = "bco"
    paper = "2404.04656"
    settings_class = BCOSettings
    needs = Needs(completions="pair", reference=True)
    units = {**PairMethod.units, "thumbs": one_per_example}
    rates = DefaultRates(full=5e-7, adapter=5e-6)
    usual = {"beta": (0.01, 0.5)}

    settings: BCOSettings

    def remarks(self, trees: Sequence[PromptTree], *, times: Times | None = None) -> Sequence[str]:
        """That there is but one kind of thumbs, where that is so."""
        one_kind = Thumbs.of(trees, times).one_kind() if self.settings.unpaired else ""
        return (f"note: {one_kind}",) if one_kind else ()

    def initial_state(self) -> State:
        """Nothing is seen yet."""
        return super().initial_state() | dict.fromkeys(SEEN, 0.0)

    def next_state(self, state: State, sums: Mapping[str, float]) -> State:
        """With the rewards of the step."""
        return super().next_state(state, sums) | {name: self.settings.shift_decay * state[name] + sums[name] for name in SEEN}

    def pair_losses(self, pairs: Pairs, state: State) -> Tensor:
        """`bco_loss` of each pair."""
        return bco_loss(*pairs.sums(), beta=self.settings.beta, shift=shift_of(state))

    def state_sums(
        self, compared: Comparisons, policy: TokenLogps, reference: ReferenceLogps | None, batch: TreeBatch
    ) -> Mapping[str, Tensor]:
        """Rewards of chosen and of rejected answers, by weight."""
        assert reference is not None
        chosen_P, rejected_P = compared.sides(self.settings.beta * (policy.detach().sum() - reference.sum()))
        weight_B = batch.weight_B * (compared.num_B > 0)
        chosen, rejected = ((weight_B * compared.of_trees(side_P)).sum() for side_P in (chosen_P, rejected_P))
        return dict(zip(SEEN, (chosen, weight_B.sum(), rejected, weight_B.sum()), strict=True))

    def loss(
        self, policy: TokenLogps, reference: ReferenceLogps | None, batch: TreeBatch, *, statistics: Mapping[str, float], state: State
    ) -> LossOutput:
        """The mean of `bco_loss` over the pairs, or of `bco_thumbs_loss` over the answers."""
        if not self.settings.unpaired:
            return super().loss(policy, reference, batch, statistics=statistics, state=state)
        assert reference is not None
        beta, shift, is_up_B = self.settings.beta, shift_of(state), batch.labels()
        losses_B = bco_thumbs_loss(policy.sum(), reference.sum(), is_up_B, beta=beta, shift=shift)
        metrics, only = thumb_metrics(policy, reference, batch, beta=beta, point=shift)
        up_B, down_B = batch.weight_B * is_up_B, batch.weight_B * ~is_up_B
        rewards_B = metrics["rewards/desirable"]
        sums = ((up_B * rewards_B).sum(), up_B.sum(), (down_B * rewards_B).sum(), down_B.sum())
        return LossOutput((Term(losses_B, unit="thumbs"),), metrics, dict(zip(SEEN, sums, strict=True)), only)


def shift_of(state: State) -> float:
    """δ: halfway between the mean reward of good and that of bad answers, 0 before any was seen.

    Example:
        >>> shift_of({"up_reward": 6.0, "up_weight": 2.0, "down_reward": -4.0, "down_weight": 4.0})
        1.0
    """
    means = [state[f"{kind}_reward"] / state[f"{kind}_weight"] if state[f"{kind}_weight"] else 0.0 for kind in ("up", "down")]
    return sum(means) / 2
