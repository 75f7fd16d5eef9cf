"""How an optimizer step is cut into micro-batches, for all processes at once.

Every process makes the same plan and takes its part. All get the same number of micro-batches (FSDP2 hangs on unequal
numbers); where there is nothing left to do, a micro-batch repeats an example with weight zero.

Flat rows are filled by size, largest first, into the emptiest row, which keeps rows even. Plain and forked batches take
examples of similar length, because the longest one sets the width of all; for several processes the borders between them are
drawn where the largest batch is smallest. `python bench/packing.py` measures how even that is.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapreplace

import numpy as np
import numpy.typing as npt

from prefopt.data.store import Sizes
from prefopt.engine.batch import Sharing, cost
from prefopt.engine.extent import Extent, num_positions
from prefopt.errors import RunError
from prefopt.trees import PromptTree


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The trees of one forward pass.

    Attributes:
        trees: in the order of the step; of weight zero where `places` is empty.
        places: where in the step's examples each of them stands; empty where the micro-batch only fills up a process's number.
    """

    trees: tuple[PromptTree, ...]
    places: tuple[int, ...]

    @property
    def counts(self) -> bool:
        """Whether it adds anything to the step."""
        return bool(self.places)


def cut(trees: Sequence[PromptTree], *, max_tokens: int, sharing: Sharing, num_processes: int = 1) -> list[list[MicroBatch]]:
    """The micro-batches of each process.

    Args:
        trees: the examples of the step.
        max_tokens: positions that a forward pass may compute, padding included.
        sharing: how they will be packed.
        num_processes: how many take part.

    Raises:
        RunError: an example alone is larger than `max_tokens`.
    """
    check_fits(trees, max_tokens=max_tokens, sharing=sharing)
    if sharing == "flat":
        groups = _fill_rows(trees, max_tokens, num_processes)
    else:
        groups = _similar_lengths(trees, max_tokens, sharing, num_processes)
    plan = [
        [MicroBatch(tuple(trees[index] for index in places), places) for places in (tuple(sorted(group)) for group in part)]
        for part in _share_out(groups, [num_positions([trees[index] for index in group], sharing) for group in groups], num_processes)
    ]
    most = max(len(part) for part in plan)
    spare = MicroBatch((min(trees, key=lambda tree: cost(tree, sharing)).with_weight(0.0),), places=())
    return [part + [spare] * (most - len(part)) for part in plan]


def check_fits(trees: Sequence[PromptTree], *, max_tokens: int, sharing: Sharing) -> None:
    """Every example must fit into a micro-batch.

    Raises:
        RunError: names the first one that does not, and the setting to change.
    """
    needed_E = needed_positions(Sizes.of(trees), sharing)
    for place in np.flatnonzero(needed_E > max_tokens)[:1].tolist():
        needed = int(needed_E[place])
        raise RunError(
            f"example {trees[place].row_id} takes {needed} tokens, and a micro-batch may hold max_tokens = {max_tokens}. "
            f"Raise max_tokens to {needed} or more, or lower max_length."
        )


def needed_positions(sizes: Sizes, sharing: Sharing) -> npt.NDArray[np.int64]:
    """Positions of a micro-batch that holds an example alone, for each."""
    if sharing == "plain":
        return sizes.branches * (sizes.prompt + sizes.longest)
    return sizes.prompt + (sizes.branches * sizes.longest if sharing == "fork" else sizes.answers)


def _share_out(groups: Sequence[list[int]], sizes: Sequence[int], num_processes: int) -> list[list[list[int]]]:
    """Groups to processes, largest first in rounds of one for each; in a round the process with least so far gets the largest.

    So the processes' n-th groups are of like size too, which is what FSDP2 waits for: it meets in every forward pass.
    """
    shared: list[list[list[int]]] = [[] for _ in range(num_processes)]
    loads = [0] * num_processes
    largest_first = sorted(range(len(groups)), key=lambda index: -sizes[index])
    for start in range(0, len(groups), num_processes):
        emptiest_first = sorted(range(num_processes), key=loads.__getitem__)
        for process, index in zip(emptiest_first, largest_first[start : start + num_processes], strict=False):
            shared[process].append(groups[index])
            loads[process] += sizes[index]
    return shared


def _fill_rows(trees: Sequence[PromptTree], max_tokens: int, num_processes: int) -> list[list[int]]:
    sizes = [tree.num_tokens for tree in trees]
    largest_first = sorted(range(len(trees)), key=lambda index: (-sizes[index], index))
    num_rows = max(1, -(-sum(sizes) // max_tokens))
    while True:
        num_rows = min(-(-num_rows // num_processes) * num_processes, len(trees))
        rows: list[list[int]] = [[] for _ in range(num_rows)]
        loads = [(0, row) for row in range(num_rows)]  # a heap: the emptiest row first
        for index in largest_first:
            load, row = loads[0]
            rows[row].append(index)
            heapreplace(loads, (load + sizes[index], row))
        if max(loads)[0] <= max_tokens:
            return rows
        num_rows += max(1, num_rows // 50)


MOST_EVENED = 8
"""Micro-batches of a process beyond which their borders are left as they fall: so many even out by themselves, and a whole data
set (the reference pass) would take long."""


MORE_PASSES = 3
"""Micro-batches of a process beyond the fewest that are tried: more of them are padded less and evened better, and each costs a pass."""


def _similar_lengths(trees: Sequence[PromptTree], max_tokens: int, sharing: Sharing, num_processes: int) -> list[list[int]]:
    """Neighbours by length together, in as many groups as fit, and as can be shared out evenly where there are few."""
    longest_first = sorted(range(len(trees)), key=lambda index: (-trees[index].longest, index))
    cheapest = _cheapest(trees, longest_first, max_tokens, sharing)
    if num_processes == 1 or len(cheapest) > MOST_EVENED * num_processes:
        return cheapest
    fewest = _neighbours(trees, longest_first, max_tokens, sharing)
    passes = -(-len(fewest) // num_processes)
    most = max(passes, min(passes + MORE_PASSES, len(trees) // num_processes))
    tried = [_evened(trees, longest_first, max_tokens, sharing, each * num_processes) or fewest for each in range(passes, most + 1)]

    def waited_for(groups: list[list[int]]) -> int:
        sizes = [num_positions([trees[index] for index in group], sharing) + PASS for group in groups]
        shared = _share_out([[place] for place in range(len(groups))], sizes, num_processes)
        return max(sum(sizes[place] for (place,) in part) for part in shared)

    return min(tried, key=waited_for)


def _evened(
    trees: Sequence[PromptTree], longest_first: Sequence[int], max_tokens: int, sharing: Sharing, most_groups: int
) -> list[list[int]] | None:
    """At most that many groups of neighbours, the largest of which is as small as can be; None where so few do not fit."""
    groups = None
    low, high = max(num_positions([tree], sharing) for tree in trees), max_tokens
    while low <= high:
        middle = (low + high) // 2
        tried = _neighbours(trees, longest_first, middle, sharing)
        if len(tried) <= most_groups:
            groups, high = tried, middle - 1
        else:
            low = middle + 1
    return groups


PASS = 256
"""What a forward and backward pass costs beside its positions, in positions: reading and converting weights, starting kernels.
Between what a small model takes on a CPU (some 50) and a large one on a GPU (some 1,000)."""


def _cheapest(trees: Sequence[PromptTree], longest_first: Sequence[int], max_tokens: int, sharing: Sharing) -> list[list[int]]:
    """Neighbours by length, cut where padding and passes together cost least.

    best(e) = min over b < e of best(b) + positions(b..e) + PASS, where positions(b..e) is at most `max_tokens`.
    """
    best, begin = [0], [0]
    for end in range(1, len(longest_first) + 1):
        size, costs = Extent(sharing), []
        for start in range(end - 1, -1, -1):
            size = size.with_tree(trees[longest_first[start]])
            if size.num_positions > max_tokens:
                break
            costs.append((best[start] + size.num_positions + PASS, start))
        least, start = min(costs)
        best.append(least)
        begin.append(start)
    groups, end = [], len(longest_first)
    while end:
        groups.append(list(longest_first[begin[end] : end]))
        end = begin[end]
    return groups[::-1]


def _neighbours(trees: Sequence[PromptTree], longest_first: Sequence[int], max_tokens: int, sharing: Sharing) -> list[list[int]]:
    groups: list[list[int]] = []
    size = Extent(sharing)
    for index in longest_first:
        size = size.with_tree(trees[index])
        if not groups or size.num_positions > max_tokens:
            groups.append([])
            size = Extent(sharing).with_tree(trees[index])
        groups[-1].append(index)
    return groups


def fullest_row(mean: float, spread: float, longest: int, *, count: float, max_tokens: int) -> int:
    """Positions of the largest micro-batch of a run, about: rows are filled evenly, and hardly ever to the last token.

    Args:
        mean, spread: positions of an example, and their standard deviation.
        longest: of the largest example.
        count: examples of a step, on one process.
        max_tokens: positions that a micro-batch may have.
    """
    step, around = mean * count, 2.5 * spread * math.sqrt(count)
    sizes = [max(mean, step + share * around) for share in (-1.0, -0.5, 0.0, 0.5, 1.0)]
    largest = max(size / math.ceil(size / max_tokens) for size in sizes)
    return min(max_tokens, max(longest, math.ceil(largest)))
