"""Moments in 8 bits (arXiv 2110.02861), by bitsandbytes: a block of 256 shares a scale, and levels lie closer near zero.

Weights and gradients stay in float32, and so do the moments of tensors of less than 4,096 numbers.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import Any, ClassVar, final

import torch
from torch import Tensor
from torch.optim import Optimizer

from prefopt.training.optimizers.kind import BETAS, EPS, Groups, Kind

LEVELS = {"qmap1": "dynamic", "qmap2": "udynamic"}
"""The tables of levels, the same for all parameters, by the names that the library has for them in the state and beside it."""


@final
class EightBit(Kind):
    """Two bytes of moments for a weight in place of eight."""

    name: ClassVar = "adamw-8bit"
    state_bytes: ClassVar = 2 + 2 * 4 / 256
    state_name: ClassVar = "AdamW's moments (8 bits)"
    library: ClassVar = "bitsandbytes"
    extra: ClassVar = "bits"

    def make(self, groups: Groups) -> Optimizer:
        """The library's `AdamW8bit`."""
        self.check_installed()
        library: Any = import_module("bitsandbytes.optim")
        optimizer: Optimizer = library.AdamW8bit(groups, lr=0.0, betas=BETAS, eps=EPS)
        return optimizer

    def made(self, optimizer: object) -> bool:
        """Whether it is one of these; by name, for asking must not load the library."""
        return type(optimizer).__name__ == "AdamW8bit"

    def tensors(self, optimizer: Optimizer, parameter: Tensor) -> dict[str, Tensor]:
        """The moments with their scales, and the number of steps; not the levels, which never change."""
        state = optimizer.state[parameter]
        return {name: torch.as_tensor(value) for name, value in state.items() if name not in LEVELS}

    def put(self, optimizer: Optimizer, parameter: Tensor, tensors: Mapping[str, Tensor]) -> None:
        """As they were."""
        state: dict[str, Any] = {name: value.to(parameter.device) for name, value in tensors.items() if name != "step"}
        if not state:
            return
        if state["state1"].dtype == torch.uint8:
            known: dict[str, Tensor] = optimizer.name2qmap  # type: ignore[attr-defined]  # bitsandbytes' own
            for name, table in LEVELS.items():
                known[table] = state[name] = known[table].to(parameter.device)
        optimizer.state[parameter] = state | {"step": int(tensors["step"])}
