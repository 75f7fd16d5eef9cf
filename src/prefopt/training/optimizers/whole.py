"""Everything in float32, by torch's own fused AdamW."""

from collections.abc import Mapping
from typing import ClassVar, final

from torch import Tensor
from torch.optim import AdamW, Optimizer

from prefopt.training.optimizers.kind import BETAS, EPS, Groups, Kind


@final
class Whole(Kind):
    """The default."""

    name: ClassVar = "adamw"
    state_bytes: ClassVar = 8.0

    def make(self, groups: Groups) -> Optimizer:
        """One kernel for all parameters."""
        return AdamW(groups, lr=0.0, betas=BETAS, eps=EPS, fused=True)

    def made(self, optimizer: object) -> bool:
        """Whether it is one of these."""
        return type(optimizer) is AdamW

    def tensors(self, optimizer: Optimizer, parameter: Tensor) -> dict[str, Tensor]:
        """Both moments, and the number of steps."""
        return dict(optimizer.state[parameter])

    def put(self, optimizer: Optimizer, parameter: Tensor, tensors: Mapping[str, Tensor]) -> None:
        """As they were; the number of steps lies beside the parameter on a GPU, and on the CPU otherwise."""
        step_device = parameter.device if parameter.is_cuda else "cpu"
        optimizer.state[parameter] = {name: value.to(step_device) if name == "step" else value for name, value in tensors.items()}
