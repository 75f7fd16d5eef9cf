"""Weights in bf16 that lose no update, by optimi's AdamW with Kahan summation.

A bf16 weight of 0.02 moves in steps of 6e-5; an update of 5e-7 alone would be rounded away, every time. Here it is added to a second
bf16 number, the compensation, and goes over into the weight when enough has come together. Such a pair resolves about 16 bits of
the weight; norms, whose weights are near 1 and few, stay in float32.

Deviations from the default: β₂ = 0.99, because a bf16 second moment times 0.999 is rounded back to itself and would never
fall again; and weight decay goes through the compensation, because a bf16 weight times 1 − 5e-8 is itself.
"""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from prefopt.training.optimizers.kind import BETAS, EPS, Groups, Kind

BETA2 = 0.99


@final
class Compensated(Kind):
    """Four bf16 numbers beside the weight (gradient, two moments, compensation) in place of three float32 ones."""

    name: ClassVar = "adamw-bf16"
    trained: ClassVar = torch.bfloat16
    state_bytes: ClassVar = 6.0
    state_name: ClassVar = "AdamW's moments and compensation"
    library: ClassVar = "optimi"
    extra: ClassVar = "bf16"

    def make(self, groups: Groups) -> Optimizer:
        """The library's `AdamW`; its decay is ours."""
        self.check_installed()
        from optimi import AdamW

        by_width = [
            {"params": held, "decay": group["weight_decay"], "weight_decay": 0.0 if wide else group["weight_decay"], "kahan_sum": wide}
            for group in groups
            for wide in (True, False)
            if (held := [parameter for parameter in group["params"] if (parameter.dtype == torch.bfloat16) == wide])
        ]
        parameters: list[Tensor] = [parameter for group in by_width for parameter in group["params"]]
        optimizer: Optimizer = AdamW(by_width, lr=0.0, betas=(BETAS[0], BETA2), eps=EPS, triton=_has_kernels(parameters), foreach=False)
        optimizer.register_step_pre_hook(_decay)
        return optimizer

    def made(self, optimizer: object) -> bool:
        """Whether it is one of these; by name, for asking must not load the library."""
        return type(optimizer).__module__.startswith("optimi.")

    def tensors(self, optimizer: Optimizer, parameter: Tensor) -> dict[str, Tensor]:
        """Moments, compensation, and the number of steps, which the library keeps once for a group."""
        state = optimizer.state[parameter]
        own = {name: value for name, value in state.items() if isinstance(value, Tensor) and value.shape == parameter.shape}
        return own | {"step": _group_of(optimizer, parameter)["step"].clone()} if own else {}

    def put(self, optimizer: Optimizer, parameter: Tensor, tensors: Mapping[str, Tensor]) -> None:
        """As they were; a parameter in float32 has no compensation, and the library wants to find something there."""
        group = _group_of(optimizer, parameter)
        own = {name: value for name, value in tensors.items() if name != "step"}
        if not own:
            return
        nothing = torch.zeros(1, dtype=torch.uint8, device=parameter.device) if group["triton"] else None
        optimizer.state[parameter] = {"kahan_comp": nothing} | own
        group["step"], group["setup"] = tensors["step"].cpu().clone(), True


def _has_kernels(parameters: list[Tensor]) -> bool:
    """Whether the library's kernels can do the step: on a GPU, for weights that are not cut among processes."""
    return find_spec("triton") is not None and all(type(parameter) is nn.Parameter and parameter.is_cuda for parameter in parameters)


def _group_of(optimizer: Optimizer, parameter: Tensor) -> dict[str, Any]:
    return next(group for group in optimizer.param_groups if any(one is parameter for one in group["params"]))


@torch.no_grad()
def _decay(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
    """w ← w − lr·λ·w, before the step, and through the compensation."""
    for group in optimizer.param_groups:
        if not (group["kahan_sum"] and group["decay"]):
            continue
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = optimizer.state[parameter]
            if not state:  # the library would make it in its first step, which is about to come
                state.update({name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq", "kahan_comp")})
            state["kahan_comp"].add_(parameter, alpha=-group["lr"] * group["decay"])
