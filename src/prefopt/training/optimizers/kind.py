"""What the run asks of an optimizer beside its steps."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from prefopt.errors import ConfigError

Groups = list[dict[str, Any]]
"""Parameters and their weight decay, as torch's optimizers take them."""

BETAS = (0.9, 0.999)
EPS = 1e-8


class Kind(ABC):
    """A way of holding AdamW's numbers.

    Attributes:
        name: of the setting's choice.
        trained: dtype of trained weights and their gradients, but for norms, which are in float32.
        state_bytes: what the optimizer keeps for a trained weight, in bytes.
        state_name: what that is, in words.
        library: that must be installed; None: torch is enough.
        extra: of the package, which installs it.
    """

    name: ClassVar[str]
    trained: ClassVar[torch.dtype] = torch.float32
    state_bytes: ClassVar[float]
    state_name: ClassVar[str] = "AdamW's moments"
    library: ClassVar[str | None] = None
    extra: ClassVar[str] = ""

    def is_installed(self) -> bool:
        """Whether its library is there."""
        return self.library is None or find_spec(self.library) is not None

    def check_installed(self) -> None:
        """Its library must be there.

        Raises:
            ConfigError: it is not; names the command that installs it.
        """
        if not self.is_installed():
            raise ConfigError(
                f"--optim {self.name} needs the library {self.library}, which is not installed. "
                f"Install it: pip install 'prefopt[{self.extra}]'"
            )

    @abstractmethod
    def make(self, groups: Groups) -> Optimizer:
        """The optimizer, at learning rate 0.

        Raises:
            ConfigError: its library is not installed.
        """

    @abstractmethod
    def made(self, optimizer: object) -> bool:
        """Whether it is one of these."""

    @abstractmethod
    def tensors(self, optimizer: Optimizer, parameter: Tensor) -> dict[str, Tensor]:
        """All that decides the parameter's next steps, as tensors by name; empty before the first one."""

    @abstractmethod
    def put(self, optimizer: Optimizer, parameter: Tensor, tensors: Mapping[str, Tensor]) -> None:
        """What `tensors` gave, back into an optimizer; those as large as the parameter are cut as it is, where it is cut."""
