"""Kahneman-Tversky Optimization: learns from thumbs up and down on single answers, without pairs.

    loss = λ_D·(1 − σ(β·(r − z₀)))   for an answer with a thumb up
    loss = λ_U·(1 − σ(β·(z₀ − r)))   for one with a thumb down        r = ℓ − ref

ℓ is a completion's log-probability under the policy, ref the same under the reference. z₀ is the point that both are compared with: the
policy's divergence from the reference, estimated as the mean of r over answers to other prompts, 0 at least, without gradient.
Ethayarajh et al. 2024, arXiv 2402.01306, equation 8.

When to use it: answers have a thumb up or down each, or one kind is much rarer than the other. Pairs serve too: the chosen answer is
up, the rejected one down.
What to watch: `rewards/desirable` above `z0`·β and `rewards/undesirable` below; `kl`. Answers far from z₀ have hardly any gradient, on the
right side, where they are learned, and on the wrong one too: what the policy has moved the wrong way by several 1/β it no longer
learns, and neither does it learn from thumbs that contradict all others. λ_D times the number of thumbs up should be 1 to 1½ times λ_U
times that of thumbs down: the run says so where it is not, and `balance` sees to it.
Deviations from the paper: z₀ is over the whole optimizer batch, not over the part of it that one device happens to hold, and its
answers come from other prompts by a draw that holds for the whole run (paper and HALOs: the neighbour in the batch), so that the
reference's values are computed once. It takes a pass without gradients over these answers before each step.

Shapes: B completions in the batch, one per tree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import model_validator

from prefopt.methods.maths import in_float32, sigmoid
from prefopt.methods.method import (
    DefaultRates,
    LossOutput,
    Method,
    MethodSettings,
    Needs,
    Setting,
    State,
    Term,
    Times,
    one_per_example,
)
from prefopt.methods.thumbs import Thumbs, WithPartners, thumb_metrics
from prefopt.trees import PromptTree

if TYPE_CHECKING:
    from torch import Tensor

    from prefopt.engine.batch import TreeBatch
    from prefopt.engine.logps import ReferenceLogps, TokenLogps

BALANCED = (1.0, 4 / 3)
"""What λ_D·n_D / (λ_U·n_U) should be, by the authors' code; `balance` moves it to the nearer end."""

STILL_BALANCED = (1.0, 1.5)
"""The same by the paper: outside of it the user is told."""


class KTOSettings(MethodSettings):
    """Settings of KTO."""

    beta: float = Setting(0.1, gt=0, help="Hold on the reference. 0.01-0.05 moves far, 0.1-0.3 is usual, above 0.5 is slow.")
    desirable_weight: float = Setting(1.0, ge=0, help="Weight of answers with a thumb up (the paper's lambda_D).")
    undesirable_weight: float = Setting(1.0, ge=0, help="Weight of answers with a thumb down (the paper's lambda_U).")
    balance: bool = Setting(
        False, help="Raise the weight of the rarer thumb until up weighs 1 to 4/3 times what down weighs, in all of the data."
    )

    @model_validator(mode="after")
    def _weights_are_given_or_found(self) -> KTOSettings:
        if self.balance and (self.desirable_weight, self.undesirable_weight) != (1.0, 1.0):
            raise ValueError("balance chooses desirable_weight and undesirable_weight: give it, or give them")
        if self.desirable_weight == self.undesirable_weight == 0:
            raise ValueError("desirable_weight and undesirable_weight are both 0, so there is nothing to learn")
        return self


@in_float32
def kto_loss(
    logps_B: Tensor,
    ref_B: Tensor,
    is_up_B: Tensor,
    *,
    z0: float,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Loss of each completion, in [0, its weight].

    Args:
        logps_B: log-probabilities of the completions under the policy, summed over tokens, float32.
        ref_B: the same under the reference; no gradient flows into it.
        is_up_B: which have a thumb up, bool.
        z0: the divergence that log-ratios are compared with, in nats.
        beta: inverse temperature of the implicit reward β·(ℓ − ref).
        desirable_weight, undesirable_weight: λ of thumbs up and of thumbs down.

    Returns:
        Tensor of shape [B]; half the weight where policy and reference agree and z0 is 0.

    Example:
        >>> import torch
        >>> kto_loss(torch.zeros(2), torch.zeros(2), torch.tensor([True, False]), z0=0.0, beta=0.1, undesirable_weight=1.5)
        tensor([0.5000, 0.7500])
    """
    is_up_B = is_up_B.to(logps_B.dtype)
    sign_B = 2 * is_up_B - 1
    weight_B = desirable_weight * is_up_B + undesirable_weight * (1 - is_up_B)
    # 1 − σ(x) as σ(−x), which keeps its digits where σ(x) is near 1.
    return weight_B * sigmoid(-sign_B * beta * (logps_B - ref_B - z0))


def balancing_weights(up: float, down: float) -> tuple[float, float]:
    """λ_D and λ_U that bring λ_D·n_D / (λ_U·n_U) to the nearer end of `BALANCED`: the rarer kind's weight is raised.

    Args:
        up, down: how many there are of each, by weight and by how often an epoch takes them.

    Example:
        >>> balancing_weights(100.0, 400.0), balancing_weights(400.0, 100.0), balancing_weights(110.0, 100.0)
        ((4.0, 1.0), (1.0, 3.0), (1.0, 1.0))
    """
    if not up or not down:
        return 1.0, 1.0
    least, most = BALANCED
    ratio = up / down
    return max(1.0, least / ratio), max(1.0, ratio / most)


class KTO(Method):
    """KTO. An arranged tree holds the answer and, behind it, one of another prompt, which the statistics read."""

    name = "kto"
    paper = "2402.01306"
    settings_class = KTOSettings
    needs = Needs(completions="thumbs", reference=True)
    units = {"thumbs": one_per_example}
    rates = DefaultRates(full=5e-7, adapter=5e-6)
    usual = {"beta": (0.01, 0.5)}

    settings: KTOSettings

    def arrange(self, trees: Sequence[PromptTree], *, seed: int) -> Sequence[PromptTree]:
        """One tree per answer, with its partner."""
        return WithPartners(trees, seed=seed)

    def in_loss(self, tree: PromptTree) -> PromptTree:
        """The answer without its partner."""
        return replace(tree, completions=tree.completions[:-1])

    def in_statistics(self, tree: PromptTree) -> PromptTree:
        """The partner alone."""
        return replace(tree, completions=tree.completions[-1:])

    def initial_state(self) -> State:
        """The weights of the two kinds, which do not change."""
        return {"desirable_weight": self.settings.desirable_weight, "undesirable_weight": self.settings.undesirable_weight}

    def state_from(self, trees: Sequence[PromptTree], *, times: Times | None = None) -> State:
        """The same, chosen by what an epoch makes of the kinds where that is asked."""
        return self._weights(Thumbs.of(trees, times)) if self.settings.balance else self.initial_state()

    def _weights(self, thumbs: Thumbs) -> State:
        """λ of both kinds."""
        if not self.settings.balance:
            return self.initial_state()
        return dict(zip(("desirable_weight", "undesirable_weight"), balancing_weights(thumbs.up, thumbs.down), strict=True))

    def remarks(self, trees: Sequence[PromptTree], *, times: Times | None = None) -> Sequence[str]:
        """How the kinds weigh against each other, and where z₀ rests on few answers."""
        thumbs = Thumbs.of(trees, times)
        narrowness = trees.narrowness() if isinstance(trees, WithPartners) else ""
        found = f"{thumbs}; {narrowness}" if narrowness else str(thumbs)
        if one_kind := thumbs.one_kind():
            return (f"note: {one_kind}", *([f"note: {narrowness}"] if narrowness else []))
        of_up, of_down = self._weights(thumbs).values()
        if self.settings.balance:
            return (f"{found}; balanced by desirable_weight {of_up:.4g} and undesirable_weight {of_down:.4g}",)
        ratio = of_up * thumbs.up / (of_down * thumbs.down) if of_down else float("inf")
        if STILL_BALANCED[0] <= ratio <= STILL_BALANCED[1]:
            return (f"note: {found}",) if narrowness else ()
        proposed = balancing_weights(thumbs.up, thumbs.down)
        weights_of_both = f"--desirable-weight {proposed[0]:.4g} --undesirable-weight {proposed[1]:.4g}"
        return (
            f"note: {found}; up weighs {ratio:.3g} times what down weighs, and 1 to 1.5 is usual: give --balance, or {weights_of_both}",
        )

    def statistics(self, policy: TokenLogps, reference: ReferenceLogps | None, batch: TreeBatch) -> Mapping[str, Tensor]:
        """Sums of which z₀ is made: log-ratios of the partners, by weight."""
        assert reference is not None
        weight_B = batch.weight_B
        return {"log_ratio": (weight_B * (policy.sum() - reference.sum())).sum(), "weight": weight_B.sum()}

    def loss(
        self, policy: TokenLogps, reference: ReferenceLogps | None, batch: TreeBatch, *, statistics: Mapping[str, float], state: State
    ) -> LossOutput:
        """The mean of `kto_loss` over the answers."""
        assert reference is not None
        beta = self.settings.beta
        z0 = max(0.0, statistics["log_ratio"] / statistics["weight"]) if statistics["weight"] else 0.0
        losses_B = kto_loss(policy.sum(), reference.sum(), batch.labels(), z0=z0, beta=beta, **state)
        metrics, only = thumb_metrics(policy, reference, batch, beta=beta, point=beta * z0)
        return LossOutput((Term(losses_B, unit="thumbs"),), metrics | {"z0": losses_B.detach().new_full((len(losses_B),), z0)}, only=only)
