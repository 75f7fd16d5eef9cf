"""An optimizer made, and the course of its learning rate, which is a function of the step alone."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from prefopt.methods.method import DefaultRates
from prefopt.training.optimizers.kinds import KINDS

SIZE_FACTORS = ((1_000_000_000, 1.0), (100_000_000, 2.0), (10_000_000, 20.0), (0, 100.0))
"""Parameters from which on a method's usual rates are multiplied. The rates of the papers are for models of billions of
weights; DPO's 5e-7 moves one of ten million hardly at all (docs/experiments.md has the curves of small models)."""


def usual_learning_rate(rates: DefaultRates, num_parameters: int, *, adapter: bool) -> float:
    """The peak learning rate when none is given: by method, by adapter or full fine-tuning, and by the model's size."""
    factor = next(factor for at_least, factor in SIZE_FACTORS if num_parameters >= at_least)
    return factor * (rates.adapter if adapter else rates.full)


@dataclass(frozen=True, slots=True)
class Schedule:
    """Learning rate by step: a linear rise from 0, then a cosine or a line to 0, or the peak to the end."""

    peak: float
    num_steps: int
    warmup_ratio: float
    shape: str

    def at(self, step: int) -> float:
        """Learning rate of a step; steps count from 0."""
        warmup = math.ceil(self.warmup_ratio * self.num_steps)
        if step < warmup:
            return self.peak * (step + 1) / warmup
        done = (step - warmup) / max(1, self.num_steps - warmup)
        if self.shape == "cosine":
            return self.peak * 0.5 * (1 + math.cos(math.pi * done))
        return self.peak * (1 - done) if self.shape == "linear" else self.peak


def make_optimizer(parameters: Iterable[tuple[str, nn.Parameter]], *, weight_decay: float, kind: str = "adamw") -> Optimizer:
    """AdamW, as the kind holds it. Matrices decay; biases and norms, which have one dimension, do not.

    Raises:
        ConfigError: the kind's library is not installed.
    """
    trained = list(parameters)
    groups = [
        {"params": [parameter for _, parameter in trained if parameter.ndim >= 2], "weight_decay": weight_decay},
        {"params": [parameter for _, parameter in trained if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    return KINDS[kind].make([group for group in groups if group["params"]])


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """The rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def clip_gradients(module: nn.Module, max_norm: float) -> torch.Tensor:
    """Scale gradients down to the norm; returns what it was, on the device: that of the whole gradient, where processes hold parts."""
    norm = nn.utils.clip_grad_norm_([parameter for parameter in module.parameters() if parameter.grad is not None], max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
