"""How far a policy has moved from its reference: KL(π ‖ π_ref) over completions, in nats, from samples of the policy.

With samples y ~ π and x = log π(y|·) − log π_ref(y|·), two estimators whose mean is the divergence:

    k1 = x                      unbiased; a single value may be negative, and the spread is wide
    k3 = exp(−x) − 1 + x        unbiased, never negative; narrow where the two are close

from Schulman, "Approximating KL divergence" (2020, joschu.net/blog/kl-approx.html). Both are taken token by
token and summed over the completion: by the chain rule the divergence of completions is the expected sum of
the divergences of next-token distributions. For k1 that is the same as taking it of the whole
completion. For k3 it is not, and per token is the better one: exp(−x) of a whole completion is carried by samples too
rare to be seen once x is some nats, and the estimate then comes out short by up to 1.

The samples must be the policy's own, at temperature 1, with no truncation of the distribution; otherwise neither is the
divergence. A completion cut at the limit of tokens is fine: what is estimated is then the divergence up to that limit.

Shapes: N tokens of C completions, one completion after the other.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class KL:
    """Estimates of KL(policy ‖ reference) per completion, in nats.

    Attributes:
        kl: mean of k1.
        kl_error: its standard error over completions; NaN for a single one.
        k3: mean of k3.
        k3_error: its standard error.
        num_completions: C.
    """

    kl: float
    kl_error: float
    k3: float
    k3_error: float
    num_completions: int


def estimate_kl(policy_N: Tensor, reference_N: Tensor, lengths_C: Tensor) -> KL:
    """Divergence of the policy from the reference, from samples of the policy.

    Args:
        policy_N: log-probability of each sampled token under the policy that sampled it, in nats.
        reference_N: the same tokens' under the reference.
        lengths_C: tokens of each completion, int64; they add up to N.

    Raises:
        ValueError: no completions, or lengths that do not fit.
    """
    if policy_N.shape != reference_N.shape or policy_N.ndim != 1 or len(lengths_C) == 0 or int(lengths_C.sum()) != len(policy_N):
        raise ValueError(
            f"KL needs two vectors of as many tokens as the lengths add up to, and at least one completion; given {tuple(policy_N.shape)}, "
            f"{tuple(reference_N.shape)} and {len(lengths_C)} lengths that add up to {int(lengths_C.sum())}"
        )
    x_N = policy_N.detach().double() - reference_N.detach().double()
    kl, kl_error = mean_and_error(sum_by_completion(x_N, lengths_C))
    k3, k3_error = mean_and_error(sum_by_completion(torch.expm1(-x_N) + x_N, lengths_C))
    return KL(kl, kl_error, k3, k3_error, len(lengths_C))


def sum_by_completion(values_N: Tensor, lengths_C: Tensor) -> Tensor:
    """Sums over consecutive stretches, [C]."""
    owner_N = torch.arange(len(lengths_C), device=values_N.device).repeat_interleave(lengths_C.to(values_N.device))
    return values_N.new_zeros(len(lengths_C)).index_add_(0, owner_N, values_N)


def mean_and_error(values_C: Tensor) -> tuple[float, float]:
    """The mean and its standard error, s/√C."""
    error = values_C.std().item() / math.sqrt(len(values_C)) if len(values_C) > 1 else math.nan
    return values_C.mean().item(), error
