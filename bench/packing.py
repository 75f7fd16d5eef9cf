"""How evenly an optimizer step's positions are spread over processes: python bench/packing.py

Lengths of real pairs (`bench/lengths/hh.json`), an epoch of steps in prefopt's own random order, cut for several processes.
For each step: the positions of the most loaded process over the mean, padding and the repeated examples of weight zero
included. Two sums are looked at:

    whole       over the step: what DDP waits for, because its processes meet at the end of the step
    lockstep    over the places of the plan: what FSDP waits for, because its processes meet in every forward pass

Rows of fork and plain are padded to the longest of their batch and cannot be cut finer than examples. So beside each stands what a
search finds: the cut whose most loaded process has least to do, among cuts of examples sorted by length into any number of batches, their
borders moved at random and the batches given to the emptiest process. Where that is above the bar too, a step counts as unavoidable:
a cut that is more even would only let the others wait for more padding. The search takes a tenth of a second for each step, several times
what the plan itself does, and counts nothing for a batch beyond its positions.

Nothing is computed but lengths, so it takes minutes.
"""

import argparse
import json
import platform
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from heapq import heapify, heapreplace
from itertools import pairwise
from pathlib import Path

import numpy as np

from prefopt.engine.batch import Sharing
from prefopt.engine.extent import Extent, num_positions
from prefopt.training.cut import cut
from prefopt.training.order import DataOrder
from prefopt.trees import Completion, PromptTree, token_ids

LENGTHS = Path(__file__).parent / "lengths" / "hh.json"
BAR = 1.05
"""Of the issue: the most loaded process has at most that many times the mean."""


@dataclass(frozen=True, slots=True)
class Evenness:
    """Over an epoch: the mean and the worst step, and the share of steps above the bar.

    Attributes:
        mean, worst: of the most loaded process over the mean of the processes, whole steps.
        above: share of the steps above 1.05.
        searched: mean of the same for the cuts that the search found.
        longer: mean of the most loaded process over that of the search.
        unavoidable: share of the steps in which the search's cut is above 1.05 too.
        lockstep: mean of the same with a meeting after every micro-batch.
        passes: mean micro-batches of a process per step.
    """

    mean: float
    worst: float
    above: float
    searched: float
    longer: float
    unavoidable: float
    lockstep: float
    passes: float


def trees_of(file: Path) -> list[PromptTree]:
    """Examples of the lengths in a file that `bench.versus --only lengths` wrote."""
    rows = json.loads(file.read_text(encoding="utf-8"))["lengths"]

    def ids(length: int) -> Completion:
        return Completion(token_ids(np.ones(length)))

    return [
        PromptTree(ids(prompt).ids, (ids(chosen), ids(rejected)), row_id=str(index))
        for index, (prompt, chosen, rejected) in enumerate(rows)
    ]


def evenness(trees: Sequence[PromptTree], *, batch_size: int, max_tokens: int, num_processes: int, sharing: Sharing) -> Evenness:
    """One epoch of steps, the short last one left out."""
    order = DataOrder(len(trees), batch_size, 0)
    whole, lockstep, passes, searched, longer = [], [], [], [], []
    for step in range(len(trees) // batch_size):
        own = [trees[index] for index in order.examples(step)]
        plan = cut(own, max_tokens=max_tokens, sharing=sharing, num_processes=num_processes)
        loads = np.array([[num_positions(batch.trees, sharing) for batch in part] for part in plan], dtype=float)
        whole.append(loads.sum(1).max() / loads.sum(1).mean())
        lockstep.append(loads.max(0).sum() / loads.sum(1).mean())
        passes.append(loads.shape[1])
        largest, mean = least(own, max_tokens=max_tokens, num_processes=num_processes, sharing=sharing, passes=loads.shape[1], seed=step)
        # What the plan itself is counts as found.
        better = largest < loads.sum(1).max()
        searched.append(largest / mean if better else whole[-1])
        longer.append(loads.sum(1).max() / min(largest, loads.sum(1).max()))
    return Evenness(
        mean=float(np.mean(whole)),
        worst=float(np.max(whole)),
        above=float(np.mean(np.array(whole) > BAR)),
        searched=float(np.mean(searched)),
        longer=float(np.mean(longer)),
        unavoidable=float(np.mean(np.array(searched) > BAR)),
        lockstep=float(np.mean(lockstep)),
        passes=float(np.mean(passes)),
    )


TRIES = 600
"""Random moves of a border, from each of the search's beginnings."""


def least(
    trees: Sequence[PromptTree], *, max_tokens: int, num_processes: int, sharing: Sharing, passes: int, seed: int
) -> tuple[float, float]:
    """Positions of the most loaded process, and of the mean one, of the best cut that is found.

    Args:
        trees: of the step.
        max_tokens, num_processes, sharing: as for `cut`.
        passes: micro-batches of a process in the plan; up to one more is tried.
        seed: of the random moves.
    """
    if sharing == "flat":  # no padding: nothing stands in the way but the largest example
        mean = sum(tree.num_tokens for tree in trees) / num_processes
        return max(mean, float(max(tree.num_tokens for tree in trees))), mean
    table = ranges(trees, sharing)
    rng = random.Random(seed)
    best: tuple[float, float] | None = None
    for count in range(num_processes, min(len(trees), num_processes * (passes + 1)) + 1):
        borders = evenest(table, count, max_tokens)
        if borders is None:
            continue
        found = moved(table, borders, max_tokens, num_processes, rng)
        best = found if best is None else min(best, found)
    assert best is not None
    return best


def ranges(trees: Sequence[PromptTree], sharing: Sharing) -> list[list[int]]:
    """Positions of a batch of the examples `begin` to `end`, longest first: `table[begin][end]`."""
    ordered = sorted(trees, key=lambda tree: -tree.longest)
    table = []
    for begin in range(len(ordered)):
        row, size = [0] * (begin + 1), Extent(sharing)
        for tree in ordered[begin:]:
            size = size.with_tree(tree)
            row.append(size.num_positions)
        table.append(row)
    return table


def evenest(table: Sequence[Sequence[int]], count: int, max_tokens: int) -> list[int] | None:
    """Borders of `count` batches, or fewer, whose largest is smallest; None: none of them fits."""
    low, high, found = max(row[begin + 1] for begin, row in enumerate(table)), max_tokens, None
    while low <= high:
        middle = (low + high) // 2
        borders = [0]
        while borders[-1] < len(table) and len(borders) <= count:
            begin = borders[-1]
            borders.append(max(end for end in range(begin + 1, len(table) + 1) if table[begin][end] <= middle))
        if borders[-1] == len(table):
            found, high = borders, middle - 1
        else:
            low = middle + 1
    return found


def moved(
    table: Sequence[Sequence[int]], borders: list[int], max_tokens: int, num_processes: int, rng: random.Random
) -> tuple[float, float]:
    """Borders are moved at random, and stay where that takes nothing from evenness; the largest load and the mean."""
    current = shared_out(table, borders, num_processes)
    for _ in range(TRIES if len(borders) > 2 else 0):
        place = rng.randrange(1, len(borders) - 1)
        tried = [*borders[:place], borders[place] + rng.choice((-2, -1, 1, 2)), *borders[place + 1 :]]
        if not tried[place - 1] < tried[place] < tried[place + 1]:
            continue
        if max(table[tried[place - 1]][tried[place]], table[tried[place]][tried[place + 1]]) > max_tokens:
            continue
        loads = shared_out(table, tried, num_processes)
        if loads <= current:
            borders, current = tried, loads
    return current


def shared_out(table: Sequence[Sequence[int]], borders: Sequence[int], num_processes: int) -> tuple[float, float]:
    """Largest first to the emptiest process: its load at the end, and the mean."""
    sizes = sorted((table[begin][end] for begin, end in pairwise(borders)), reverse=True)
    loads = [0] * num_processes
    heapify(loads)
    for size in sizes:
        heapreplace(loads, loads[0] + size)
    return float(max(loads)), sum(sizes) / num_processes


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=Path, default=LENGTHS, help="file of lengths, as `bench.versus --only lengths` writes it")
    parser.add_argument("--batch", type=int, default=64, help="examples of an optimizer step")
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--max-tokens", type=int, nargs="+", default=[2048, 8192])
    given = parser.parse_args(arguments)
    trees = trees_of(given.lengths)
    print(f"{date.today()}, python {platform.python_version()}, numpy {np.__version__}; no GPU and no model takes part\n")
    print(f"{len(trees):,} pairs, {given.batch} per step, {len(trees) // given.batch} steps; most loaded process over the mean\n")
    print(
        "| sharing | max_tokens | processes | mean | worst step | steps above 1.05 | unavoidable | best cut found, mean | "
        "ours over it | lockstep, mean | passes per process |"
    )
    print("|---" * 11 + "|")
    for sharing in ("flat", "fork", "plain"):
        for max_tokens in given.max_tokens:
            for count in given.processes:
                own = evenness(trees, batch_size=given.batch, max_tokens=max_tokens, num_processes=count, sharing=sharing)
                print(
                    f"| {sharing} | {max_tokens} | {count} | {own.mean:.3f} | {own.worst:.3f} | {own.above:.1%} | {own.unavoidable:.1%} | "
                    f"{own.searched:.3f} | {own.longer:.3f} | {own.lockstep:.3f} | {own.passes:.1f} |"
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
