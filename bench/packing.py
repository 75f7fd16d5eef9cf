"""How evenly an optimizer step's positions are spread over processes: python bench/packing.py

Lengths of real pairs (`bench/lengths/hh.json`), an epoch of steps in prefopt's own random order, cut for several processes.
For each step: the positions of the most loaded process over the mean, padding and the repeated examples of weight zero
included. Two sums are looked at:

    whole       over the step: what DDP waits for, because its processes meet at the end of the step
    lockstep    over the places of the plan: what FSDP waits for, because its processes meet in every forward pass

Nothing is computed but lengths, so it takes seconds.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from prefopt.engine.batch import Sharing
from prefopt.training.cut import cut, num_positions
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
        unavoidable: share of the steps in which one example alone, or too few examples for the processes, exceed the bar.
        lockstep: mean of the same with a meeting after every micro-batch.
        passes: mean micro-batches of a process per step.
    """

    mean: float
    worst: float
    above: float
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
    whole, lockstep, passes, unavoidable = [], [], [], 0
    for step in range(len(trees) // batch_size):
        own = [trees[index] for index in order.examples(step)]
        plan = cut(own, max_tokens=max_tokens, sharing=sharing, num_processes=num_processes)
        loads = np.array([[num_positions(batch.trees, sharing) for batch in part] for part in plan], dtype=float)
        whole.append(loads.sum(1).max() / loads.sum(1).mean())
        lockstep.append(loads.max(0).sum() / loads.sum(1).mean())
        passes.append(loads.shape[1])
        unavoidable += max(tree.num_tokens for tree in own) > BAR * loads.sum() / num_processes
    return Evenness(
        mean=float(np.mean(whole)),
        worst=float(np.max(whole)),
        above=float(np.mean(np.array(whole) > BAR)),
        unavoidable=unavoidable / len(whole),
        lockstep=float(np.mean(lockstep)),
        passes=float(np.mean(passes)),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=Path, default=LENGTHS, help="file of lengths, as `bench.versus --only lengths` writes it")
    parser.add_argument("--batch", type=int, default=64, help="examples of an optimizer step")
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--max-tokens", type=int, nargs="+", default=[2048, 8192])
    given = parser.parse_args(arguments)
    trees = trees_of(given.lengths)
    print(f"{len(trees):,} pairs, {given.batch} per step, {len(trees) // given.batch} steps; most loaded process over the mean\n")
    print("| sharing | max_tokens | processes | mean | worst step | steps above 1.05 | unavoidable | lockstep, mean | passes per process |")
    print("|---|---|---|---|---|---|---|---|---|")
    for sharing in ("flat", "fork", "plain"):
        for max_tokens in given.max_tokens:
            for count in given.processes:
                own = evenness(trees, batch_size=given.batch, max_tokens=max_tokens, num_processes=count, sharing=sharing)
                print(
                    f"| {sharing} | {max_tokens} | {count} | {own.mean:.3f} | {own.worst:.3f} | {own.above:.1%} | {own.unavoidable:.1%} | "
                    f"{own.lockstep:.3f} | {own.passes:.1f} |"
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
