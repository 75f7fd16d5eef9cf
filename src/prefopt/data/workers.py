"""Many examples to trees: in this process, or in several where there is enough to do.

The tokenizers library already encodes a batch on all cores. Processes help with what is Python here
(templates, checks), and cost a second or two each to start, so they pay on large data only.
"""

import gc
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import chain

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from prefopt.data.examples import Example
from prefopt.data.tokenize import Grower, Grown
from prefopt.trees import PromptTree

CHUNK = 512
"""Examples per batch of the tokenizer."""

ENOUGH = 100_000
"""Examples from which on processes pay for their start."""


def grow_all(grower: Grower, batches: Iterable[Sequence[Example]], asked_workers: int) -> Iterator[list[Grown]]:
    """The trees of each batch, in order, with the number of examples done where there is a terminal.

    Args:
        grower: makes them.
        batches: of about `CHUNK` examples.
        asked_workers: processes; 1 is this one, 0 is as many as pay: this one at first, and one per core where much is left to do.
    """
    columns = (TextColumn("tokenizing"), SpinnerColumn(), TextColumn("{task.completed:,} examples"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("", total=None)
        for grown in grown_batches(grower, iter(batches), asked_workers):
            progress.advance(task, len(grown))
            yield grown


def grown_batches(grower: Grower, batches: Iterator[Sequence[Example]], asked_workers: int) -> Iterator[list[Grown]]:
    """The same without a word."""
    nested = multiprocessing.parent_process() is not None
    workers = asked_workers or (1 if nested else os.cpu_count() or 1)
    done = 0
    if workers == 1 or not asked_workers:
        for batch in batches:
            with collector_at_rest():
                grown = grower.grow(batch)
            yield grown
            done += len(batch)
            if workers > 1 and done >= ENOUGH:
                break
        else:
            return
    yield from in_processes(grower, batches, workers)


def in_processes(grower: Grower, batches: Iterator[Sequence[Example]], workers: int) -> Iterator[list[Grown]]:
    """The trees of each batch, grown side by side; as many batches are held as keep all processes at work."""
    others = set(multiprocessing.active_children())
    waiting: deque[tuple[Sequence[Example], Future[list[Grown]]]] = deque()
    with ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=begin_worker,
        initargs=(grower,),
    ) as pool:
        try:
            for batch in batches:
                with deaf_to_interrupts():  # which the processes inherit
                    waiting.append((batch, pool.submit(grow_batch, batch)))
                if len(waiting) > 2 * workers:
                    yield whole(waiting[0][1].result())
                    waiting.popleft()
            while waiting:
                yield whole(waiting[0][1].result())
                waiting.popleft()
            return
        except BrokenProcessPool:
            pass
        except BaseException:  # a Ctrl-C above all: nobody waits for what they are at
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()
            raise
    warnings.warn(
        "the processes that tokenize could not start or were killed; going on in one process. "
        "A script that calls prefopt needs "
        "`if __name__ == '__main__':` around the call, or data_workers: 1",
        stacklevel=2,
    )
    for batch in chain([batch for batch, _ in waiting], batches):
        yield grower.grow(batch)


def whole(grown: list[Grown]) -> list[Grown]:
    """What came from another process, as it was there."""
    for entry in grown:
        if isinstance(entry.tree, PromptTree):
            freeze(entry.tree)
    return grown


@contextmanager
def deaf_to_interrupts() -> Iterator[None]:
    """Processes that are started in the block never hear a Ctrl-C, which a terminal sends to all; this thread hears it at the end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def collector_at_rest() -> Iterator[None]:
    """No search for garbage in cycles: examples make none, and each search would look at a million objects that stay."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def begin_worker(grower: Grower) -> None:
    """What a process does first: its tokenizer starts no threads, the other cores are busy too; and it does not outlive its parent."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=end_with_parent, daemon=True).start()
    WORKING.append(grower)


WORKING: list[Grower] = []
"""In a process of its own: what it grows trees with, which learns from one batch to the next."""


def end_with_parent() -> None:
    """Wait for the parent's end, and end too. A parent that is killed tells nobody: its processes would wait for work for ever."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


def grow_batch(examples: Sequence[Example]) -> list[Grown]:
    """The trees of a batch, in a process of its own."""
    with collector_at_rest():
        return WORKING[0].grow(examples)


def freeze(tree: PromptTree) -> None:
    """Makes the tree's arrays read-only again, which they are not after a journey between processes."""
    tree.prompt_ids.flags.writeable = False
    for completion in tree.completions:
        completion.ids.flags.writeable = False
        if completion.scored is not None:
            completion.scored.flags.writeable = False
