"""The numbers that the methods on pairs read, and what they report: the same for all of them.

Shapes: B trees, C completions, P comparisons (P = B where each tree is a pair), N scored tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from prefopt.methods.comparisons import Comparisons
from prefopt.methods.maths import divergence, wide
from prefopt.methods.options import Divergence, f_score, tail_weights, wpo_weight

if TYPE_CHECKING:
    from torch import Tensor

    from prefopt.engine.batch import TreeBatch
    from prefopt.engine.logps import ReferenceLogps, TokenLogps


@dataclass(frozen=True, slots=True)
class Pairs:
    """The log-probabilities of a batch's comparisons, as a loss reads them.

    Attributes:
        comparisons: which completion is compared with which.
        policy, reference: log-probabilities of all completions.
        ld_alpha: weight of the tokens past the shorter completion's length (LD-DPO); None: 1.
        f_divergence, f_alpha: what stands in the place of the log-ratio (f-DPO).
    """

    comparisons: Comparisons
    policy: TokenLogps
    reference: ReferenceLogps | None
    ld_alpha: float | None = None
    f_divergence: Divergence = "reverse-kl"
    f_alpha: float | None = None

    def sums(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Log-probabilities summed over tokens: chosen, rejected, and both under the reference, [P] each.

        With another divergence the first two are scores in the place of log-ratios, and the reference's are 0.
        """
        assert self.reference is not None
        if self.f_divergence == "reverse-kl":
            policy_C, reference_C = self._summed(self.policy), self._summed(self.reference)
        else:
            policy_C = self.log_ratios()
            reference_C = policy_C.new_zeros(()).expand_as(policy_C)
        return *self.comparisons.sides(policy_C), *self.comparisons.sides(reference_C)

    def log_ratios(self) -> Tensor:
        """Log-ratio of every completion, or the score that stands in its place, [C]."""
        assert self.reference is not None
        return f_score(self._summed(self.policy) - self._summed(self.reference), divergence=self.f_divergence, alpha=self.f_alpha)

    def means(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same, averaged over each completion's tokens."""
        assert self.reference is not None
        return *self.own_means(), *self.comparisons.sides(self.reference.mean())

    def own_sums(self) -> tuple[Tensor, Tensor]:
        """Log-probabilities under the policy, summed over tokens: chosen and rejected, [P] each."""
        return self.comparisons.sides(self.policy.sum())

    def own_means(self) -> tuple[Tensor, Tensor]:
        """The same, averaged over each completion's tokens."""
        return self.comparisons.sides(self.policy.mean())

    def lengths(self) -> tuple[Tensor, Tensor]:
        """Scored tokens of chosen and rejected, [P] each."""
        chosen_P, rejected_P = self.comparisons.sides(self.policy.lengths_C.to(wide(self.policy.values_N).dtype))
        return chosen_P, rejected_P

    def wpo_weights(self, *, clamp: bool) -> Tensor:
        """WPO's weight of each comparison, [P]."""
        assert self.policy.log_sum_squares_N is not None
        own_N = wide(self.policy.values_N.detach()) - self.policy.log_sum_squares_N
        chosen_P, rejected_P = self.comparisons.sides(self.policy.mean_tokens(own_N))
        return wpo_weight(chosen_P, rejected_P, clamp=clamp)

    def _summed(self, logps: ReferenceLogps) -> Tensor:
        if self.ld_alpha is None:
            return logps.sum()
        assert self.comparisons.of_pairs, "LD-DPO is about the two completions of a pair"
        lengths_C, values_N = self.policy.lengths_C, wide(logps.values_N[: self.policy.num_completion_tokens])
        shorter_C = lengths_C.view(-1, 2).amin(1).repeat_interleave(2)
        weights_N = tail_weights(lengths_C, shorter_C, alpha=self.ld_alpha, num_tokens=len(values_N), dtype=values_N.dtype)
        return self.policy.sum_tokens(values_N * weights_N)


def pair_metrics(
    policy: TokenLogps,
    reference: ReferenceLogps | None,
    batch: TreeBatch,
    *,
    beta: float,
    averaged: bool = False,
    comparisons: Comparisons | None = None,
) -> dict[str, Tensor]:
    """Metrics of each example, [B], detached.

    `rewards/*` are implicit rewards β·(ℓ − ref), without a reference β·ℓ. `rewards/accuracy` is 1 where the chosen one is larger and
    ½ on a tie, so that it starts at one half. `kl` sums `divergence` over the tokens of each completion, and is the mean of the two:
    how far the policy has moved on the data's tokens, in nats. It estimates KL(policy ‖ reference) as far as the data's answers
    are like the models' own; for samples of the policy see `prefopt.evaluate.kl`.

    Args:
        policy, reference, batch: as a loss reads them.
        beta: scale of the reward.
        averaged: rewards are read from means over tokens, not from sums: the loss is.
        comparisons: of rankings, where each figure is the mean over a tree's comparisons; None: each tree is a pair.
    """
    policy = policy.detach()
    compared = comparisons or Comparisons.of(batch, all_pairs=False)
    logps_C = policy.sum()
    rewards_C = policy.mean() if averaged else logps_C
    if reference is not None:
        rewards_C = rewards_C - (reference.mean() if averaged else reference.sum())
    chosen_P, rejected_P = compared.sides(beta * rewards_C)
    logps_chosen_P, logps_rejected_P = compared.sides(logps_C)
    figures = {
        "rewards/chosen": chosen_P,
        "rewards/rejected": rejected_P,
        "rewards/margin": chosen_P - rejected_P,
        "rewards/accuracy": ((chosen_P > rejected_P).to(chosen_P.dtype) + (chosen_P >= rejected_P).to(chosen_P.dtype)) / 2,
        "logps/chosen": logps_chosen_P,
        "logps/rejected": logps_rejected_P,
    }
    if reference is not None and reference.has_tokens:
        moved_C = policy.sum_tokens(divergence(policy.values_N - reference.values_N))
        kl_chosen_P, kl_rejected_P = compared.sides(moved_C)
        figures["kl"] = (kl_chosen_P + kl_rejected_P) / 2
    return {name: compared.of_trees(values_P) for name, values_P in figures.items()}
