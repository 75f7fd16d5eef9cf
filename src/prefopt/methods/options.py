"""Options that several methods share: their settings, each read by the methods that have it, and their formulas.

A method takes what fits its loss by deriving its settings from these groups; `pair_method.py` reads them.

Shapes: P comparisons, C completions, N scored tokens.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import model_validator

from prefopt.methods.maths import in_float32, log_sigmoid
from prefopt.methods.method import MethodSettings, Setting

if TYPE_CHECKING:
    from torch import Tensor, dtype

Divergence = Literal["reverse-kl", "forward-kl", "js", "alpha"]
Reduction = Literal["tokens", "mean", "sum"]
"""How log-likelihoods of answers are averaged: over all tokens of the optimizer batch, or over its pairs, an answer being the mean of
its tokens or their sum."""

LARGEST_EXPONENT = 80.0
"""e^80 is the largest round power that float32 holds with room to spare: beyond it a score stays where it is."""


class SFTWeight(MethodSettings):
    """A share of the likelihood of the chosen answers, as in RPO (Pang et al. 2024, arXiv 2404.19733, equation 1)."""

    sft_weight: float = Setting(
        0.0, ge=0, help="Weight of the chosen answers' negative log-likelihood beside the loss (RPO's alpha; 0.2-1 is usual)."
    )
    sft_reduction: Reduction = Setting(
        "tokens",
        help="That likelihood's mean: tokens, over all tokens of a step, as TRL has it; over its pairs mean, of an answer's mean per token "
        "(RPO's paper), or sum, of its sum (CPO's paper; weights are then smaller by about an answer's length).",
    )

    @model_validator(mode="after")
    def _reduction_goes_with_a_weight(self) -> SFTWeight:
        if self.sft_reduction != "tokens" and not self.sft_weight:
            raise ValueError("sft_reduction is about what sft_weight adds, and sft_weight is 0: give it too, or leave sft_reduction out")
        return self


class LabelSmoothing(MethodSettings):
    """Labels that may be wrong (Mitchell 2023)."""

    label_smoothing: float = Setting(0.0, ge=0, lt=0.5, help="Share of labels taken to be wrong (conservative DPO).")


class LengthDesensitised(MethodSettings):
    """LD-DPO (Liu et al. 2024, arXiv 2409.06411)."""

    ld_alpha: float | None = Setting(
        None,
        ge=0,
        le=1,
        help="Weight of the tokens past the length of the pair's shorter answer, in policy and reference (LD-DPO). Left out: they count.",
    )


class AllPairs(MethodSettings):
    """Rankings, read as their pairs."""

    all_pairs: bool = Setting(
        False,
        help="Learn from rankings: all pairs of each prompt's answers, every answer run once; a prompt counts as one example.",
        reads="ranked",
    )


class PlackettLuce(MethodSettings):
    """Rankings, read whole (Rafailov et al. 2023, arXiv 2305.18290, appendix A.3)."""

    plackett_luce: bool = Setting(
        False, help="Learn from rankings: the likelihood of each prompt's whole order, every answer run once.", reads="ranked"
    )

    about_pairs: ClassVar[tuple[str, ...]] = ()
    """Settings of the method that say something about the two answers of a pair, or read rankings another way."""

    @model_validator(mode="after")
    def _an_order_is_no_pair(self) -> PlackettLuce:
        if self.plackett_luce and (given := [name for name in self.about_pairs if getattr(self, name)]):
            raise ValueError(f"plackett_luce reads whole rankings, and {given[0]} is about pairs: leave one of them out")
        return self


class FDivergence(MethodSettings):
    """f-DPO (Wang et al. 2023, arXiv 2309.16240)."""

    f_divergence: Divergence = Setting("reverse-kl", help="Divergence that holds the policy to its reference; reverse-kl is DPO's own.")
    f_alpha: float | None = Setting(
        None, gt=0, lt=1, help="The alpha of f_divergence alpha: near 0 reverse-kl, near 1 forward-kl. TRL's coefficient is 1 minus this."
    )

    @model_validator(mode="after")
    def _alpha_goes_with_alpha(self) -> FDivergence:
        if (self.f_alpha is not None) != (self.f_divergence == "alpha"):
            raise ValueError("f_divergence alpha and f_alpha go together: give both (f_alpha 0.5, for example), or neither")
        return self


class WPO(MethodSettings):
    """WPO (Zhou et al. 2024, arXiv 2406.11827)."""

    wpo: bool = Setting(False, help="Weigh each pair by how likely the policy itself is to give its two answers (WPO).")
    wpo_clamp: bool = Setting(True, help="With wpo: no pair's weight exceeds 1, as in the authors' code; off is as in TRL.")

    @model_validator(mode="after")
    def _clamp_goes_with_wpo(self) -> WPO:
        if not self.wpo and not self.wpo_clamp:
            raise ValueError("wpo_clamp off changes what wpo does, and wpo is off: give wpo too, or leave wpo_clamp out")
        return self


@in_float32
def f_score(log_ratio: Tensor, *, divergence: Divergence, alpha: float | None = None) -> Tensor:
    """What stands in the place of log(π/π_ref) = x when another divergence than KL(π ‖ π_ref) holds the policy: f'(e^x).

        reverse-kl   x
        forward-kl   −e^−x
        js           log σ(x)
        alpha        (1 − e^−αx) / α

    Constants are left out: they cancel between the two answers. Wang et al. 2023, arXiv 2309.16240, table 1. Exponents stop at
    80, so that the score of a completion that has all but vanished is a large number and not infinite.

    Args:
        log_ratio: x of each completion, any shape.
        divergence: which.
        alpha: of `alpha`, in (0, 1).

    Returns:
        of the same shape.

    Example:
        >>> import torch
        >>> f_score(torch.zeros(1), divergence="forward-kl")
        tensor([-1.])
    """
    if divergence == "forward-kl":
        return -(-log_ratio).clamp(max=LARGEST_EXPONENT).exp()
    if divergence == "js":
        return log_sigmoid(log_ratio)
    if divergence == "alpha":
        assert alpha is not None
        return -(-alpha * log_ratio).clamp(max=LARGEST_EXPONENT).expm1() / alpha
    return log_ratio


@in_float32
def wpo_weight(chosen_P: Tensor, rejected_P: Tensor, *, clamp: bool = True) -> Tensor:
    """How likely a pair's completions are under the policy, against what the policy's own tokens are on average: WPO's weight.

        w = w_c·w_r        w_y = exp( mean over tokens of [log π(y_t) − log Σ_v π(v)²] )

    Σ_v π(v)² is the expected probability of a token that is drawn from the policy, so that a pair of the policy's own completions
    weighs about 1. Zhou et al. 2024, arXiv 2406.11827, equation 2. The authors' code clamps the product of the two, so that one very
    likely completion makes up for an unlikely one. No gradient flows through it.

    Args:
        chosen_P, rejected_P: log w_y of the completions: the mean over tokens of log π(y_t) − log Σ_v π(v)².
        clamp: at most 1, as in the authors' code.

    Returns:
        Tensor of shape [P], at least 0.

    Example:
        >>> import torch
        >>> wpo_weight(torch.tensor([-1.0, 0.5, 0.5]), torch.tensor([-1.0, -1.0, 0.25]))
        tensor([0.1353, 0.6065, 1.0000])
    """
    return (chosen_P + rejected_P).detach().clamp(max=0.0 if clamp else LARGEST_EXPONENT).exp()


def tail_weights(lengths_C: Tensor, shorter_C: Tensor, *, alpha: float, num_tokens: int, dtype: dtype) -> Tensor:
    """LD-DPO's weight of every scored token: 1 up to the length of the pair's shorter completion, alpha past it.

    Liu et al. 2024, arXiv 2409.06411: log π of a completion becomes log π of its head plus alpha times that of its tail.

    Args:
        lengths_C: scored tokens of each completion, int64.
        shorter_C: of each completion, scored tokens of the shorter one of its pair, int64.
        alpha: weight of the tail.
        num_tokens: N, the sum of the lengths; known, so that the device need not be asked.
        dtype: of the weights.

    Returns:
        Tensor of shape [N].

    Example:
        >>> import torch
        >>> tail_weights(torch.tensor([3, 1]), torch.tensor([1, 1]), alpha=0.5, num_tokens=4, dtype=torch.float32)
        tensor([1.0000, 0.5000, 0.5000, 1.0000])
    """
    from torch import arange

    def of_tokens(values_C: Tensor) -> Tensor:
        return values_C.repeat_interleave(lengths_C, output_size=num_tokens)

    place_N = arange(num_tokens, device=lengths_C.device) - of_tokens(lengths_C.cumsum(0) - lengths_C)
    in_head_N = (place_N < of_tokens(shorter_C)).to(dtype)
    return alpha + (1 - alpha) * in_head_N


def is_number(value: object) -> bool:
    """Whether a value of a mapping that people wrote is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
