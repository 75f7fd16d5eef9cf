"""Which examples an optimizer step sees: a function of seed and step, so that nothing needs saving to resume."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]

MOST_TAKEN = 2.0**53
"""Examples that a number of epochs can stand for; more cannot be counted in floats, and nobody would see the end."""


@dataclass(frozen=True, slots=True, eq=False)
class Mix:
    """How often an epoch takes each example: some several times, of others only a part, which is drawn anew each time.

    Attributes:
        parts: the examples that an epoch takes equally often, and how often, on average.
    """

    parts: tuple[tuple[Indices, float], ...]

    @classmethod
    def of(cls, times: npt.NDArray[np.float64]) -> "Mix":
        """From how often each example is taken."""
        return cls(tuple((np.flatnonzero(times == value), float(value)) for value in np.unique(times)))

    @property
    def num_per_epoch(self) -> int:
        """Examples of an epoch, repeats counted; the same for every epoch."""
        return max(1, sum(self._whole(times) * len(own) + self._num_drawn(own, times) for own, times in self.parts))

    @property
    def times(self) -> npt.NDArray[np.float64]:
        """How often each example is taken: what the mix was made from."""
        times = np.empty(sum(len(own) for own, _ in self.parts))
        for own, value in self.parts:
            times[own] = value
        return times

    def examples(self, seed: int, epoch: int) -> Indices:
        """The examples of an epoch, in the order of its drawing."""
        rng = np.random.default_rng([seed, epoch])
        taken = [np.tile(own, self._whole(times)) for own, times in self.parts]
        taken += [rng.choice(own, self._num_drawn(own, times), replace=False) for own, times in self.parts]
        whole = np.concatenate(taken)
        return rng.permutation(whole if len(whole) else self.parts[0][0][:1])

    @staticmethod
    def _whole(times: float) -> int:
        return int(times)

    @staticmethod
    def _num_drawn(own: Indices, times: float) -> int:
        return round((times - int(times)) * len(own))


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
        mix: how often an epoch takes each example; None: once.
    """

    num_examples: int
    batch_size: int
    seed: int
    epochs: float = 1.0
    max_steps: int | None = None
    mix: Mix | None = None

    def __post_init__(self) -> None:
        if self.batch_size > self.num_per_epoch:  # each epoch that a step touches costs time and memory
            raise ValueError(f"a step of {self.batch_size} examples is more than the {self.num_per_epoch} that there are")

    @property
    def num_per_epoch(self) -> int:
        """Examples of an epoch."""
        return self.num_examples if self.mix is None else self.mix.num_per_epoch

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the run."""
        return self.max_steps if self.max_steps is not None else max(1, -(-self.num_taken // self.batch_size))

    @property
    def num_taken(self) -> int:
        """Examples that the run takes, repeats counted."""
        if self.max_steps is not None:
            return self.max_steps * self.batch_size
        return max(1, round(min(self.num_per_epoch * self.epochs, MOST_TAKEN)))

    def examples(self, step: int) -> Indices:
        """Indices of the examples of a step; steps count from 0."""
        first, last = self.num_taken_before(step), self.num_taken_before(step + 1)
        parts = []
        for epoch in range(first // self.num_per_epoch, (last - 1) // self.num_per_epoch + 1):
            start = epoch * self.num_per_epoch
            parts.append(_order_of(self.mix or self.num_examples, self.seed, epoch)[max(first - start, 0) : last - start])
        return np.concatenate(parts)

    def num_taken_before(self, step: int) -> int:
        """Examples that the steps before have taken, repeats counted."""
        return min(step * self.batch_size, self.num_taken)

    def epoch_after(self, step: int) -> float:
        """Passes over the data when the step is done."""
        return self.num_taken_before(step + 1) / self.num_per_epoch


@lru_cache(maxsize=2)
def _order_of(examples: "int | Mix", seed: int, epoch: int) -> Indices:
    """The order of an epoch; kept, because drawing it anew for every step would take longer than the step where examples are many."""
    order = examples.examples(seed, epoch) if isinstance(examples, Mix) else np.random.default_rng([seed, epoch]).permutation(examples)
    order.flags.writeable = False
    return order
