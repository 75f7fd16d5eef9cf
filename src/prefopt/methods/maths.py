"""The few functions that losses are made of.

Method files import these instead of torch, so that `prefopt train dpo --help` reads a method's
settings without loading torch (two seconds); torch comes in when a loss is first computed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, ParamSpec

if TYPE_CHECKING:
    from torch import Tensor

P = ParamSpec("P")


def in_float32(loss: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """A loss that computes in float32 whatever narrower numbers it is given; float64 stays float64."""

    def widened(value: object) -> object:
        from torch import Tensor

        return wide(value) if isinstance(value, Tensor) and value.is_floating_point() else value

    @wraps(loss)
    def computed(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        values, named = (widened(value) for value in args), {name: widened(value) for name, value in kwargs.items()}
        return loss(*values, **named)  # type: ignore[arg-type]  # a ParamSpec cannot say that types stay

    return computed


def wide(values: Tensor) -> Tensor:
    """The same numbers, in float32 at least."""
    return values.float() if values.element_size() < 4 else values


def log_sigmoid(x: Tensor) -> Tensor:
    """log σ(x), stable for any x."""
    from torch.nn.functional import logsigmoid

    return logsigmoid(x)


def smoothed_log_sigmoid(margin: Tensor, label_smoothing: float) -> Tensor:
    """(1−ε)·log σ(m) + ε·log σ(−m): the log-likelihood of an order that is taken to be wrong with probability ε (Mitchell 2023)."""
    return (1 - label_smoothing) * log_sigmoid(margin) + label_smoothing * log_sigmoid(-margin)


def sigmoid(x: Tensor) -> Tensor:
    """σ(x) = 1 / (1 + e^−x)."""
    return x.sigmoid()


LEAST_DOUBT = 1e-12
"""Distance of a mean log-probability from 0, below which it counts as this much: a certain completion has infinite odds."""


def log_odds(logp: Tensor) -> Tensor:
    """log(p / (1 − p)) of log p ≤ 0, without loss of digits near either end.

    log(1 − e^x) is log(−expm1(x)) near 0, where 1 − e^x cancels, and log1p(−e^x) far from it, where −expm1(x) rounds to 1.
    Each is computed at points where it is good only: a gradient through the other one would be NaN, also where it is not taken.
    """
    from torch import where

    logp = logp.clamp(max=-LEAST_DOUBT)
    is_near = logp > -0.6931471805599453
    near, far = where(is_near, logp, -0.5), where(is_near, -1.0, logp)
    return logp - where(is_near, (-near.expm1()).log(), (-far.exp()).log1p())


def divergence(log_ratio: Tensor) -> Tensor:
    """What a token says about KL(policy ‖ reference), in nats: ½·d² near d = log π − log π_ref = 0, and never more than it can know.

    Two estimators have the divergence as their mean: d − 1 + e^−d over tokens of the policy, and e^d·(d − 1) + 1 over tokens of
    the reference (Schulman's k3, and the same the other way round). Tokens of the data are neither's own, and each of the two
    explodes on the other's: a token that the policy does not say any more changes nothing by becoming less likely still. So the
    smaller of the two is taken: the second where the token has lost probability (1 at most), the first where it has gained.

    Args:
        log_ratio: d of each token, any shape.

    Returns:
        of the same shape, at least 0.
    """
    fallen, risen = log_ratio.clamp(max=0), log_ratio.clamp(min=0)
    return ((fallen * fallen.exp() - fallen.expm1()) + (risen + (-risen).expm1())).clamp(min=0)
