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
