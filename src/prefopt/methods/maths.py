"""The few functions that losses are made of.

Method files import these instead of torch, so that `prefopt train dpo --help` reads a method's
settings without loading torch (two seconds); torch comes in when a loss is first computed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def log_sigmoid(x: Tensor) -> Tensor:
    """log σ(x), stable for any x."""
    from torch.nn.functional import logsigmoid

    return logsigmoid(x)


def sigmoid(x: Tensor) -> Tensor:
    """σ(x) = 1 / (1 + e^−x)."""
    return x.sigmoid()


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
