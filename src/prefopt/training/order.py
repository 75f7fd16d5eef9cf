"""Which examples an optimizer step sees: a function of seed and step, so that nothing needs saving to resume."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

MOST_TAKEN = 2.0**53
"""Examples that a number of epochs can stand for; more cannot be counted in floats, and nobody would see the end."""


@dataclass(frozen=True, slots=True)
class DataOrder:
    """Epoch after epoch in a new random order each; a step takes the next `batch_size` examples.

    A batch may straddle two epochs, so that every example is seen equally often and no batch but the last is short.

    Attributes:
        num_examples: size of the data.
        batch_size: examples of an optimizer step, at most all there are.
        seed: of the orders.
        epochs: passes over the data; may be a fraction.
        max_steps: steps in place of epochs.
    """

    num_examples: int
    batch_size: int
    seed: int
    epochs: float = 1.0
    max_steps: int | None = None

    def __post_init__(self) -> None:
        if self.batch_size > self.num_examples:  # each epoch that a step touches costs time and memory
            raise ValueError(f"a step of {self.batch_size} examples is more than the {self.num_examples} that there are")

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the run."""
        return self.max_steps if self.max_steps is not None else max(1, -(-self.num_taken // self.batch_size))

    @property
    def num_taken(self) -> int:
        """Examples that the run takes, repeats counted."""
        if self.max_steps is not None:
            return self.max_steps * self.batch_size
        return max(1, round(min(self.num_examples * self.epochs, MOST_TAKEN)))

    def examples(self, step: int) -> npt.NDArray[np.int64]:
        """Indices of the examples of a step; steps count from 0."""
        first, last = self.num_taken_before(step), self.num_taken_before(step + 1)
        parts = []
        for epoch in range(first // self.num_examples, (last - 1) // self.num_examples + 1):
            start = epoch * self.num_examples
            parts.append(_order_of(self.num_examples, self.seed, epoch)[max(first - start, 0) : last - start])
        return np.concatenate(parts)

    def num_taken_before(self, step: int) -> int:
        """Examples that the steps before have taken, repeats counted."""
        return min(step * self.batch_size, self.num_taken)

    def epoch_after(self, step: int) -> float:
        """Passes over the data when the step is done."""
        return self.num_taken_before(step + 1) / self.num_examples


@lru_cache(maxsize=2)
def _order_of(num_examples: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """The order of an epoch; kept, because drawing it anew for every step would take longer than the step where examples are many."""
    order = np.random.default_rng([seed, epoch]).permutation(num_examples)
    order.flags.writeable = False
    return order
