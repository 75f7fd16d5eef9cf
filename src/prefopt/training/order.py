"""Which examples an optimizer step sees: a function of seed and step, so that nothing needs saving to resume."""

from dataclasses import dataclass

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
        first = step * self.batch_size
        last = min(first + self.batch_size, self.num_taken)
        epochs = range(first // self.num_examples, (last - 1) // self.num_examples + 1)
        stream = np.concatenate([self._epoch(epoch) for epoch in epochs])
        return stream[first - epochs[0] * self.num_examples : last - epochs[0] * self.num_examples]

    def epoch_after(self, step: int) -> float:
        """Passes over the data when the step is done."""
        return min((step + 1) * self.batch_size, self.num_taken) / self.num_examples

    def _epoch(self, epoch: int) -> npt.NDArray[np.int64]:
        return np.random.default_rng([self.seed, epoch]).permutation(self.num_examples)
