"""Supervised fine-tuning: learn to give the answers of the data.

    loss = −Σ_t log π(y_t | x, y_<t) / number of scored tokens

The mean over all scored tokens of the optimizer batch, so a long answer weighs more than a short one; a prompt's
tokens are not scored. With `score: assistant` every assistant turn of a conversation is.

When to use it: first. Preference methods start from, and compare with, a model that can already do the task.
What to watch: `eval/loss` falls; when it rises while `loss` still falls, stop.
Deviations: none.

Shapes: B examples, one completion each.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from prefopt.methods.maths import in_float32
from prefopt.methods.method import DefaultRates, LossOutput, Method, MethodSettings, Needs, State, Term, scored_tokens

if TYPE_CHECKING:
    from torch import Tensor

    from prefopt.engine.batch import TreeBatch
    from prefopt.engine.logps import ReferenceLogps, TokenLogps


class SFTSettings(MethodSettings):
    """SFT has no settings of its own."""


@in_float32
def sft_loss(logps_B: Tensor) -> Tensor:
    """Negative log-likelihood of each answer, in nats, summed over its tokens.

    Args:
        logps_B: log-probabilities of the answers under the policy, summed over scored tokens, float32.

    Returns:
        Tensor of shape [B]; divide its sum by the number of scored tokens.

    Example:
        >>> import torch
        >>> sft_loss(torch.tensor([-3.5]))
        tensor([3.5000])
    """
    return -logps_B


class SFT(Method):
    """Supervised fine-tuning on the engine that the preference methods use."""

    name = "sft"
    settings_class = SFTSettings
    needs = Needs(completions="demonstration", reference=False)
    units = {"tokens": scored_tokens}
    rates = DefaultRates(full=2e-5, adapter=2e-4)

    def loss(
        self, policy: TokenLogps, reference: ReferenceLogps | None, batch: TreeBatch, *, statistics: Mapping[str, float], state: State
    ) -> LossOutput:
        """The negative log-likelihood per scored token."""
        logps_B = policy.sum()
        return LossOutput(terms=(Term(sft_loss(logps_B), unit="tokens"),), metrics={"logps/chosen": logps_B.detach()})
