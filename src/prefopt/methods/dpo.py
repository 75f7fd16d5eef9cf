"""Direct Preference Optimization: prefer the chosen answer to the rejected one.

    loss = −log σ(β·Δ)        Δ = (ℓ_c − ref_c) − (ℓ_r − ref_r)

ℓ is a completion's log-probability under the policy, ref the same under the reference, c the
chosen and r the rejected completion. Rafailov et al. 2023, arXiv 2305.18290, equation 7.
With label smoothing ε: −(1−ε)·log σ(βΔ) − ε·log σ(−βΔ), conservative DPO (Mitchell 2023).

When to use it: answers come in pairs, and the reference is the model after SFT.
What to watch: `rewards/margin` rises; `logps/chosen` may fall, but not far below the reference's.
Deviations from the paper: none.

Shapes: B pairs in the batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from prefopt.methods.maths import log_sigmoid
from prefopt.methods.method import DefaultRates, LossOutput, Method, MethodSettings, Needs, Setting, State, Term, one_per_example
from prefopt.methods.pairs import pair_metrics

if TYPE_CHECKING:
    from torch import Tensor

    from prefopt.engine.batch import TreeBatch
    from prefopt.engine.logps import ReferenceLogps, TokenLogps


class DPOSettings(MethodSettings):
    """Settings of DPO."""

    beta: float = Setting(0.1, gt=0, help="Hold on the reference. 0.01-0.05 moves far, 0.1-0.3 is usual, above 0.5 is slow.")
    label_smoothing: float = Setting(0.0, ge=0, lt=0.5, help="Share of labels taken to be wrong (conservative DPO).")


def dpo_loss(
    chosen_B: Tensor, rejected_B: Tensor, ref_chosen_B: Tensor, ref_rejected_B: Tensor, *, beta: float, label_smoothing: float = 0.0
) -> Tensor:
    """Loss of each pair, in nats.

    Args:
        chosen_B, rejected_B: log-probabilities of the completions under the policy, summed over tokens, float32.
        ref_chosen_B, ref_rejected_B: the same under the reference; no gradient flows into them.
        beta: inverse temperature of the implicit reward β·(ℓ − ref).
        label_smoothing: probability that a label is wrong, in [0, ½).

    Returns:
        Tensor of shape [B]; log 2 where policy and reference agree.

    Example:
        >>> import torch
        >>> zero = torch.zeros(1)
        >>> dpo_loss(zero, zero, zero, zero, beta=0.1)
        tensor([0.6931])
    """
    margin_B = beta * ((chosen_B - ref_chosen_B) - (rejected_B - ref_rejected_B))
    return -(1 - label_smoothing) * log_sigmoid(margin_B) - label_smoothing * log_sigmoid(-margin_B)


class DPO(Method):
    """DPO and, with label smoothing, conservative DPO."""

    name = "dpo"
    settings_class = DPOSettings
    needs = Needs(completions="pair", reference=True)
    units = {"pairs": one_per_example}
    rates = DefaultRates(full=5e-7, adapter=5e-6)
    usual = {"beta": (0.01, 0.5)}

    settings: DPOSettings

    def loss(
        self, policy: TokenLogps, reference: ReferenceLogps | None, batch: TreeBatch, *, statistics: Mapping[str, float], state: State
    ) -> LossOutput:
        """The mean of `dpo_loss` over the pairs."""
        assert reference is not None
        beta = self.settings.beta
        losses_B = dpo_loss(
            *batch.as_pairs(policy.sum()), *batch.as_pairs(reference.sum()), beta=beta, label_smoothing=self.settings.label_smoothing
        )
        return LossOutput(terms=(Term(losses_B, unit="pairs"),), metrics=pair_metrics(policy, reference, batch, beta=beta))
