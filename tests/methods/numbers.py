"""Numbers that the tests of losses are given."""

import torch
from torch import Tensor

ENDS = (-1e4, -1e-9)
"""Log-probabilities that are as extreme as any that occur."""


def numbers(*values: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def drawn(num: int, size: int, *, low: float = -6.0) -> list[Tensor]:
    """Log-probabilities from `low` to just below 0."""
    generator = torch.Generator().manual_seed(3)
    return [low * torch.rand(size, dtype=torch.float64, generator=generator) - 1e-3 for _ in range(num)]


def at_the_ends(num: int, *, dtype: torch.dtype) -> list[Tensor]:
    """All ways to put an end into each of so many places, as leaves."""
    ways = torch.cartesian_prod(*[numbers(*ENDS, dtype=dtype)] * num).view(-1, num)
    return [way.clone().requires_grad_() for way in ways.unbind(1)]


def all_finite(loss: Tensor, *given: Tensor) -> bool:
    """Whether losses and their gradients are."""
    loss.sum().backward()
    return bool(torch.isfinite(loss).all()) and all(bool(torch.isfinite(value.grad).all()) for value in given)
