"""One optimizer step as arithmetic: terms into a loss, metrics into means, whatever the cut.

A term is divided by the count of its unit over the whole optimizer batch, known before the first forward pass, so that
gradients add up to the same whether the batch is cut into one micro-batch or many, on one process or many.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from prefopt.engine.batch import TreeBatch
from prefopt.methods.method import LossOutput, Method
from prefopt.trees import PromptTree


def unit_totals(method: Method, trees: Sequence[PromptTree]) -> dict[str, float]:
    """How much of each unit the optimizer batch holds, by weight."""
    return {unit: sum(tree.weight * count(tree) for tree in trees) for unit, count in method.units.items()}


def weighted_loss(output: LossOutput, batch: TreeBatch, totals: Mapping[str, float]) -> Tensor:
    """This micro-batch's share of the optimizer batch's loss. 0 where the whole batch has no weight."""
    shares = [
        term.weight * (term.values_B * batch.weight_B).sum() / totals[term.unit] if totals[term.unit] > 0 else (0.0 * term.values_B).sum()
        for term in output.terms
    ]
    return torch.stack(shares).sum()


@dataclass(slots=True)
class Sums:
    """Sums over the micro-batches of a step, on the device until they are read.

    Attributes:
        by_name: `loss`, `weight`, and each metric's weighted sum; the method's state sums as `state:name`, and the weight of the
            examples that have a metric, where not all have it, as `weight:name`.
    """

    by_name: dict[str, Tensor] = field(default_factory=dict)

    def add(self, output: LossOutput, batch: TreeBatch, loss: Tensor) -> None:
        """Another micro-batch."""
        self._add("loss", loss.detach())
        self._add("weight", batch.weight_B.sum())
        for name, values_B in output.metrics.items():
            weight_B = batch.weight_B
            if name in output.only:
                weight_B = weight_B * output.only[name]
                self._add(f"weight:{name}", weight_B.sum())
            self._add(name, (values_B * weight_B).sum())
        for name, value in output.state_sums.items():
            self._add(f"state:{name}", value)

    def add_named(self, values: Mapping[str, Tensor]) -> None:
        """Sums that a method takes itself."""
        for name, value in values.items():
            self._add(name, value)

    def stacked(self) -> Tensor:
        """All sums as one float64 vector, to be added over processes and read from the device at once."""
        return torch.stack([value.double() for value in self.by_name.values()])

    def named(self, stacked: Sequence[float]) -> dict[str, float]:
        """A vector as `stacked` gave it, by name."""
        return dict(zip(self.by_name, stacked, strict=True))

    def _add(self, name: str, value: Tensor) -> None:
        self.by_name[name] = self.by_name[name] + value if name in self.by_name else value


@dataclass(slots=True)
class PerExample:
    """The metrics of each example, on the device until they are read.

    Attributes:
        num_examples: N, of all processes together.
        by_name: metric -> one value per example, float64 [N]; 0 for those that another process has, NaN for those that have no
            such metric.
    """

    num_examples: int
    by_name: dict[str, Tensor] = field(default_factory=dict)

    def add(self, places: Sequence[int], metrics: Mapping[str, Tensor], only: Mapping[str, Tensor]) -> None:
        """The values of a micro-batch, whose examples stand at those places; one without places adds none.

        Args:
            places: of its examples.
            metrics: one value per example.
            only: which examples have a metric, where not all have it.
        """
        for name, all_B in metrics.items():
            values_B = all_B.masked_fill(~only[name], math.nan) if name in only else all_B
            if name not in self.by_name:
                self.by_name[name] = values_B.new_zeros(self.num_examples, dtype=torch.float64)
            if places:
                self.by_name[name][torch.tensor(places, device=values_B.device)] = values_B.double()

    def stacked(self) -> Tensor:
        """All values as one float64 tensor [metrics, N], to be added over processes."""
        return torch.stack(list(self.by_name.values()))

    def named(self, stacked: Tensor) -> dict[str, list[float]]:
        """A tensor as `stacked` gave it, by name."""
        return dict(zip(self.by_name, stacked.tolist(), strict=True))


@dataclass(frozen=True, slots=True)
class StepResult:
    """A step's numbers: the loss and metric means of the optimizer batch, and the method's sums."""

    loss: float
    metrics: dict[str, float]
    state_sums: dict[str, float]

    @classmethod
    def of(cls, named: Mapping[str, float]) -> "StepResult":
        """From sums over all micro-batches and processes."""
        metrics = {}
        for name, value in named.items():
            if name in ("loss", "weight") or name.startswith(("state:", "weight:")):
                continue
            weight = named.get(f"weight:{name}", named["weight"])
            if weight > 0:
                metrics[name] = value / weight
            elif f"weight:{name}" not in named:
                metrics[name] = 0.0
        return cls(
            named["loss"], metrics, {name.removeprefix("state:"): value for name, value in named.items() if name.startswith("state:")}
        )
