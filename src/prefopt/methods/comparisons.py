"""Which completion of a batch is compared with which: the chosen of a pair with the rejected, or all pairs of a ranking.

Shapes: B trees, C completions, P comparisons (P = B for pairs).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    from prefopt.engine.batch import TreeBatch
    from prefopt.trees import PromptTree


def ranks_of(tree: PromptTree) -> list[int]:
    """Ranks of a tree's completions, 0 for the best; where none is given, the order of the data."""
    return [place if completion.rank is None else completion.rank for place, completion in enumerate(tree.completions)]


def best_of(tree: PromptTree) -> int:
    """Place of the best completion; the first of several that share the rank."""
    ranks = ranks_of(tree)
    return ranks.index(min(ranks))


def has_order(tree: PromptTree) -> bool:
    """Whether two of a tree's completions differ in rank, so that there is something to compare."""
    return len(set(ranks_of(tree))) > 1


def pairs_of(tree: PromptTree) -> list[tuple[int, int]]:
    """Places of a better and a worse completion, for all pairs of a ranking; those of one rank are not compared."""
    ranks = ranks_of(tree)
    return [(better, worse) for better in range(len(ranks)) for worse in range(len(ranks)) if ranks[better] < ranks[worse]]


@dataclass(frozen=True, slots=True)
class Comparisons:
    """The comparisons of a batch.

    Attributes:
        better_P, worse_P: places of the two among the C completions, int64.
        num_B: comparisons of each tree, int64.
        best_B: place of each tree's best completion, int64.
        of_pairs: each tree is a pair, the chosen completion first; else rankings.
    """

    better_P: Tensor
    worse_P: Tensor
    num_B: Tensor
    best_B: Tensor
    of_pairs: bool

    @classmethod
    def of(cls, batch: TreeBatch, *, all_pairs: bool) -> Comparisons:
        """Those of the batch.

        Args:
            batch: of pairs, or of rankings.
            all_pairs: all pairs of each ranking; else each tree is a pair, the chosen first.
        """
        if not all_pairs:
            assert all(len(tree.completions) == 2 for tree in batch.trees), "a pair has two completions"
            return cls._at(batch, [[(0, 1)]] * len(batch.trees), [0] * len(batch.trees), of_pairs=True)
        return cls._at(batch, [pairs_of(tree) for tree in batch.trees], [best_of(tree) for tree in batch.trees], of_pairs=False)

    @classmethod
    def _at(cls, batch: TreeBatch, places: Sequence[Sequence[tuple[int, int]]], best: Sequence[int], *, of_pairs: bool) -> Comparisons:
        from torch import from_numpy

        starts = np.cumsum([0, *(len(tree.completions) for tree in batch.trees)])[:-1]
        pairs = [(start + better, start + worse) for start, own in zip(starts, places, strict=True) for better, worse in own]
        table = np.array(pairs, dtype=np.int64).reshape(-1, 2)
        counts = np.array([len(own) for own in places], dtype=np.int64)
        columns = (np.ascontiguousarray(table[:, 0]), np.ascontiguousarray(table[:, 1]), counts, starts + np.array(best, dtype=np.int64))
        better_P, worse_P, num_B, best_B = (from_numpy(column).to(batch.input_ids.device, non_blocking=True) for column in columns)
        return cls(better_P, worse_P, num_B, best_B, of_pairs)

    def sides(self, values_C: Tensor) -> tuple[Tensor, Tensor]:
        """Values of the better and of the worse completion of each comparison, [P] each."""
        return values_C[self.better_P], values_C[self.worse_P]

    def best(self, values_C: Tensor) -> Tensor:
        """Values of each tree's best completion, [B]."""
        return values_C[self.best_B]

    def of_trees(self, values_P: Tensor) -> Tensor:
        """The mean of each tree's comparisons, [B]; 0 where it has none."""
        from torch import segment_reduce

        return segment_reduce(values_P, "sum", lengths=self.num_B, unsafe=True, initial=0.0) / self.num_B.clamp(min=1)
