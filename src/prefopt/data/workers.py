"""Many examples to trees: in this process, or in several where there is enough to do.

The tokenizers library already encodes a batch on all cores. Processes help with what is Python here
(templates, checks), and cost a second or two each to start, so they pay on large data only.
"""

import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from prefopt.data.examples import Example
from prefopt.data.tokenize import Grower, Grown
from prefopt.trees import PromptTree

CHUNK = 512
"""Examples per batch of the tokenizer."""

ENOUGH = 100_000
"""Examples from which on processes pay for their start."""


def num_workers(asked: int, num_examples: int) -> int:
    """How many processes to use; 1 is this one."""
    if asked:
        return min(asked, max(1, num_examples))
    nested = multiprocessing.parent_process() is not None
    return 1 if nested or num_examples < ENOUGH else os.cpu_count() or 1


def grow_all(grower: Grower, examples: Sequence[Example], asked_workers: int) -> list[Grown]:
    """Each example's tree, in order, with a progress bar where there is a terminal."""
    workers = num_workers(asked_workers, len(examples))
    columns = (TextColumn("tokenizing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("", total=len(examples))
        if workers > 1:
            try:
                grown = []
                for part in in_processes(grower, examples, workers):
                    grown += part
                    progress.advance(task, len(part))
                return grown
            except BrokenProcessPool:
                warnings.warn(
                    "the processes that tokenize could not start or were killed; going on in one process. "
                    "A script that calls prefopt needs "
                    "`if __name__ == '__main__':` around the call, or data_workers: 1",
                    stacklevel=2,
                )
                progress.reset(task)
        grown = []
        for start in range(0, len(examples), CHUNK):
            grown += grower.grow(examples[start : start + CHUNK])
            progress.advance(task, min(CHUNK, len(examples) - start))
        return grown


def in_processes(grower: Grower, examples: Sequence[Example], workers: int) -> Iterator[list[Grown]]:
    """The trees of consecutive slices, grown side by side."""
    size = max(1, -(-len(examples) // (workers * 4)))
    slices = [examples[start : start + size] for start in range(0, len(examples), size)]
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=begin_worker,
    ) as pool:
        try:
            with deaf_to_interrupts():  # which the processes inherit
                futures = [pool.submit(grow_slice, grower, part) for part in slices]
            for future in futures:
                part = future.result()
                for grown in part:
                    if isinstance(grown.tree, PromptTree):
                        freeze(grown.tree)
                yield part
        except BaseException:  # a Ctrl-C above all: nobody waits for what they are at
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()
            raise


@contextmanager
def deaf_to_interrupts() -> Iterator[None]:
    """Processes that are started in the block never hear a Ctrl-C, which a terminal sends to all; this thread hears it at the end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def begin_worker() -> None:
    """What a process does first: its tokenizer starts no threads, the other cores are busy too; and it does not outlive its parent."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """Wait for the parent's end, and end too. A parent that is killed tells nobody: its processes would wait for work for ever."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


def grow_slice(grower: Grower, examples: Sequence[Example]) -> list[Grown]:
    """The trees of a slice, in a process of its own."""
    return [grown for start in range(0, len(examples), CHUNK) for grown in grower.grow(examples[start : start + CHUNK])]


def freeze(tree: PromptTree) -> None:
    """Makes the tree's arrays read-only again, which they are not after a journey between processes."""
    tree.prompt_ids.flags.writeable = False
    for completion in tree.completions:
        completion.ids.flags.writeable = False
        if completion.scored is not None:
            completion.scored.flags.writeable = False
