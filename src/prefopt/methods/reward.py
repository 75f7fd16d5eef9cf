"""Bradley-Terry reward model: a score for any answer, learned from which answers people prefer.

    loss = −log σ(s_c − s_r − m) + λ·(s_c + s_r)²

s is a completion's score: one number that a linear layer makes of the hidden state at its last token, the end-of-turn token
included. c is the chosen and r the rejected completion; the margin m and the centring λ are 0 unless asked for. Bradley and Terry
1952; Ouyang et al. 2022, arXiv 2203.02155, equation 1. With `label_smoothing` ε: −(1−ε)·log σ(d) − ε·log σ(−d), d = s_c − s_r − m.

Rankings of K answers, each run once: `all_pairs` takes the mean over the pairs of different rank, as Ouyang et al. do over K choose 2;
`plackett_luce` the negative log-likelihood of the whole order. For two answers both are the loss above.

`margin_from_scores`: m = r_c − r_r, the data's own scores of the two answers, so that what is much better must score much better
(Touvron et al. 2023, arXiv 2307.09288, section 3.2.2). `center_weight` λ: a score says nothing about its zero, since only differences
enter the loss; the square of the sum, of K answers (2·mean)², holds it near 0 (Eisenstein et al. 2023, arXiv 2312.09244; λ = 0.01
is usual).

When to use it: PPO or GRPO is to follow, answers are to be ranked or filtered, or another model's answers judged. Start from the model
after SFT. What comes out is a sequence-classification model, which cannot generate.
What to watch: `eval/rewards/accuracy` is the figure that counts, 0.6-0.75 on human preferences; one epoch is mostly enough, and when
`eval/loss` rises while `loss` falls, it has been. `scores/spread` that keeps growing says that the model is too sure of itself.
Deviations from the paper: the loss is the mean over prompts, however many answers each has; the score layer has no bias, as in
transformers, since a bias cancels.

Shapes: B prompts, P comparisons (P = B for pairs), C completions, K completions of a prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from prefopt.errors import DataError
from prefopt.methods.comparisons import Comparisons, pairs_of
from prefopt.methods.maths import in_float32, smoothed_log_sigmoid
from prefopt.methods.method import DefaultRates, LossOutput, Method, Needs, Setting, State, Term
from prefopt.methods.options import AllPairs, LabelSmoothing, PlackettLuce
from prefopt.methods.pair_method import one_per_ranking
from prefopt.methods.ranked import order_losses
from prefopt.trees import PromptTree

if TYPE_CHECKING:
    from torch import Tensor

    from prefopt.engine.batch import TreeBatch
    from prefopt.engine.logps import ReferenceLogps, TokenLogps


class RewardSettings(LabelSmoothing, AllPairs, PlackettLuce):
    """Settings of the reward model."""

    margin_from_scores: bool = Setting(
        False, help="Ask for as large a difference of scores as the data's own scores of the two answers have; every answer needs one."
    )
    center_weight: float = Setting(
        0.0, ge=0, help="Weight of the squared sum of a prompt's scores, which keeps them near 0; 0.01 is usual."
    )

    about_pairs = ("all_pairs", "label_smoothing", "margin_from_scores")


@in_float32
def reward_loss(chosen_B: Tensor, rejected_B: Tensor, *, margin_B: Tensor | float = 0.0, label_smoothing: float = 0.0) -> Tensor:
    """Loss of each pair, in nats.

    Args:
        chosen_B, rejected_B: scores of the completions, float32.
        margin_B: by how much the chosen one should score more.
        label_smoothing: probability that a label is wrong, in [0, ½).

    Returns:
        Tensor of shape [B]; log 2 where the scores differ by the margin.

    Example:
        >>> import torch
        >>> reward_loss(torch.tensor([1.5]), torch.tensor([0.5]), margin_B=torch.tensor([1.0]))
        tensor([0.6931])
    """
    return -smoothed_log_sigmoid(chosen_B - rejected_B - margin_B, label_smoothing)


@in_float32
def centring_loss(mean_B: Tensor) -> Tensor:
    """What holds the scores of a prompt's answers near 0: (2·mean)², of a pair (s_c + s_r)².

    Args:
        mean_B: mean score of each prompt's answers, float32.

    Returns:
        Tensor of shape [B].

    Example:
        >>> import torch
        >>> centring_loss(torch.tensor([0.5]))
        tensor([1.])
    """
    return (2 * mean_B).square()


class Reward(Method):
    """The Bradley-Terry reward model."""

    name = "reward"
    paper = "2203.02155"
    settings_class = RewardSettings
    needs = Needs(completions="pair", reference=False, model="reward")
    units = {"pairs": one_per_ranking}
    rates = DefaultRates(full=1e-5, adapter=1e-4)
    usual = {"center_weight": (0.0, 0.1)}

    settings: RewardSettings

    def arrange(self, trees: Sequence[PromptTree], *, seed: int) -> Sequence[PromptTree]:
        """As they are; with `margin_from_scores` every answer must bring a score.

        Raises:
            DataError: one does not, or a pair's scores say the opposite of its order.
        """
        if self.settings.margin_from_scores:
            for tree in trees:
                refuse_without_scores(tree)
        return trees

    def loss(
        self, policy: TokenLogps, reference: ReferenceLogps | None, batch: TreeBatch, *, statistics: Mapping[str, float], state: State
    ) -> LossOutput:
        """The mean of `reward_loss` over prompts, or of the orders' likelihoods, with the centring."""
        scores_C = policy.last_scalars(batch.last_C)
        ranked = self.needs.completions == "ranked"
        compared = Comparisons.of(batch, all_pairs=ranked)
        table_BK, exists_BK = batch.by_tree(scores_C)
        mean_B = table_BK.sum(1) / exists_BK.sum(1)
        terms = [Term(self._losses(scores_C, compared, batch), unit="pairs")]
        if self.settings.center_weight:
            # A prompt of which nothing is compared counts as none in the unit, so it must not count in the sum.
            terms.append(Term(centring_loss(mean_B) * (compared.num_B > 0), unit="pairs", weight=self.settings.center_weight))
        metrics = score_metrics(scores_C.detach(), compared, batch)
        only = dict.fromkeys(metrics, compared.num_B > 0) if ranked else {}
        return LossOutput(tuple(terms), metrics, only=only)

    def _losses(self, scores_C: Tensor, compared: Comparisons, batch: TreeBatch) -> Tensor:
        """The loss of each prompt, [B]."""
        if self.settings.plackett_luce:
            return order_losses(scores_C, compared, batch)
        better_P, worse_P = compared.sides(scores_C)
        margin_P: Tensor | float = 0.0
        if self.settings.margin_from_scores:
            given_better_P, given_worse_P = compared.sides(batch.rewards().to(scores_C.dtype))
            margin_P = given_better_P - given_worse_P
        losses_P = reward_loss(better_P, worse_P, margin_B=margin_P, label_smoothing=self.settings.label_smoothing)
        return compared.of_trees(losses_P)


def refuse_without_scores(tree: PromptTree) -> None:
    """A tree that cannot give margins.

    Raises:
        DataError: an answer has no score, or a better one a lower score than a worse one.
    """
    scores = [completion.reward for completion in tree.completions]
    if any(score is None for score in scores):
        raise DataError(
            f"{tree.row_id or 'an example'} brings no score of its answers, and margin_from_scores takes the margin from them. Give "
            "scores in the data (columns chosen_score and rejected_score, or completions with scores), or leave margin_from_scores out."
        )
    for better, worse in pairs_of(tree):
        if (scores[better] or 0.0) < (scores[worse] or 0.0):
            raise DataError(
                f"{tree.row_id or 'an example'}: the better answer has the score {scores[better]:g} and the worse one {scores[worse]:g}, "
                "so that the margin between them would be negative. Mend the row, or leave margin_from_scores out."
            )


def score_metrics(scores_C: Tensor, compared: Comparisons, batch: TreeBatch) -> dict[str, Tensor]:
    """Metrics of each example, [B], of detached scores; the margin that was asked for is not taken off.

    `rewards/accuracy` is 1 where the better answer scores more and ½ on a tie. `scores/spread` is the standard deviation of the
    scores of one prompt's answers: for two, half their distance.
    """
    better_P, worse_P = compared.sides(scores_C)
    figures = {
        "rewards/chosen": better_P,
        "rewards/rejected": worse_P,
        "rewards/margin": better_P - worse_P,
        "rewards/accuracy": ((better_P > worse_P).to(scores_C.dtype) + (better_P >= worse_P).to(scores_C.dtype)) / 2,
    }
    table_BK, exists_BK = batch.by_tree(scores_C)
    num_B = exists_BK.sum(1)
    mean_B = table_BK.sum(1) / num_B
    squares_B = ((table_BK - mean_B[:, None]).square() * exists_BK).sum(1)
    return {
        **{name: compared.of_trees(values_P) for name, values_P in figures.items()},
        "scores/mean": mean_B,
        "scores/spread": (squares_B / num_B).sqrt(),
    }
