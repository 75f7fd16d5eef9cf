"""What the C library holds besides: holes in its heap, found by playing what a step asks for against glibc's rules.

What is freed is used again only where the next tensor fits: between two small things that stay, a hole of 3.9 MB does not hold a tensor
of 4.0 MB, and rows without padding have a new length in every batch. A run on a CPU keeps what is freed (`prefopt.machine`), so the
heap is as large as it ever was.

The rules are those of glibc 2.26 to 2.37: best fit among free chunks, neighbours that are both free grow together, seven small chunks of
each size are set aside and do not, and torch asks for chunks that begin at a multiple of 64, for which more is taken and the
rest given back. (Later versions first look for a free chunk that is aligned already, which leaves fewer holes.)
"""

import os
import sys
from bisect import bisect_left, insort
from collections.abc import Sequence
from statistics import mean

Event = tuple[int, int]
"""A piece of memory's number, and its bytes when it comes or -1 when it goes."""

PAGE = 4096
HEADER = 8
SMALLEST = 32
ALIGNMENT = 64
SET_ASIDE = 1040
"""Chunks up to this size are set aside when they are freed, seven of each size."""

FAST = 128
"""Chunks up to this size do not grow together with their neighbours before a larger one is asked for."""

LARGE = 1024
PAD = 2**26
"""Taken from the system beyond what is asked for."""

TRIM = 2**31 - 1
"""Free at the heap's end from which on it goes back to the system."""

TENSOR = 1024
"""From here on a piece is taken for the numbers of a tensor, whose chunk is aligned."""

LENGTHS = (1.0, 0.985, 1.01, 0.99, 1.02, 0.98)
"""How the positions of micro-batches vary, one after the other: they are filled, but not to the last token."""


SCALES = (0.92, 0.95, 0.98, 1.0, 1.03)
"""Of all lengths: what is looked at to tell what is usual."""


class Heap:
    """glibc's heap, from empty."""

    def __init__(self) -> None:
        self.by_size: list[tuple[int, int]] = []
        self.size_at: dict[int, int] = {}
        self.start_before: dict[int, int] = {}
        self.aside: dict[int, list[int]] = {}
        self.fast: dict[int, list[int]] = {}
        self.where: dict[int, tuple[int, int]] = {}
        self.top = self.end = self.touched = self.peak = 0

    def come(self, number: int, num_bytes: int) -> None:
        """A piece is asked for."""
        size = max(SMALLEST, (num_bytes + HEADER + 15) & ~15)
        if num_bytes < TENSOR:
            start, size = self._take(size)
        else:
            start, size = self._aligned(*self._take(size + ALIGNMENT + SMALLEST), size)
        self.where[number] = (start, size)
        self.touched = max(self.touched, start + size)
        self.peak = max(self.peak, self.touched)

    def go(self, number: int) -> None:
        """It is given back."""
        self._give(*self.where.pop(number))

    def _aligned(self, start: int, taken: int, size: int) -> tuple[int, int]:
        lead = -(start + 16) % ALIGNMENT
        if lead:
            lead += ALIGNMENT if lead < SMALLEST else 0
            self._give(start, lead)
            start, taken = start + lead, taken - lead
        if taken > size + SMALLEST:
            self._give(start + size, taken - size)
            taken = size
        return start, taken

    def _take(self, size: int) -> tuple[int, int]:
        for kept in (self.aside, self.fast):
            if stack := kept.get(size):
                return stack.pop(), size
        if size >= LARGE:
            self._grow_together()
        place = bisect_left(self.by_size, (size, -1))
        if place < len(self.by_size):
            found, start = self.by_size[place]
            self._unlist(start)
            if found - size < SMALLEST:
                return start, found
            self._list(start + size, found - size)
            return start, size
        if self.end - self.top < size + SMALLEST:
            more = size + SMALLEST + PAD - (self.end - self.top)
            self.end += -(-more // PAGE) * PAGE
        start = self.top
        self.top += size
        return start, size

    def _give(self, start: int, size: int) -> None:
        if size <= SET_ASIDE and len(self.aside.setdefault(size, [])) < 7:
            self.aside[size].append(start)
        elif size <= FAST:
            self.fast.setdefault(size, []).append(start)
        else:
            self._join(start, size)

    def _grow_together(self) -> None:
        kept, self.fast = self.fast, {}
        for size, starts in kept.items():
            for start in starts:
                self._join(start, size)

    def _join(self, start: int, size: int) -> None:
        if start in self.start_before:
            start = self.start_before[start]
            size += self._unlist(start)
        if start + size in self.size_at:
            size += self._unlist(start + size)
        if start + size != self.top:
            self._list(start, size)
            return
        self.top = start
        spare = self.end - self.top
        if size >= 2**16 and spare >= TRIM:
            self.end -= max(0, spare - PAD - 1) // PAGE * PAGE
            self.touched = min(self.touched, self.end)

    def _list(self, start: int, size: int) -> None:
        self.size_at[start] = size
        self.start_before[start + size] = start
        insort(self.by_size, (size, start))

    def _unlist(self, start: int) -> int:
        size = self.size_at.pop(start)
        del self.start_before[start + size]
        del self.by_size[bisect_left(self.by_size, (size, start))]
        return size


def has_holes() -> bool:
    """Whether this machine's C library keeps what is freed: glibc, unless it was told not to."""
    return sys.platform.startswith("linux") and not os.environ.get("MALLOC_MMAP_THRESHOLD_")


def heap_holes(events: Sequence[Event]) -> float:
    """Bytes that are held beyond what is needed at the fullest moment.

    What fits where turns on small differences, so several lengths are looked at, and the mean is taken.

    Args:
        events: what comes and goes in a micro-batch, gradients included. Others follow, a little longer or shorter.
    """
    return mean(_holes(events, scale) / scale for scale in SCALES)


def _holes(events: Sequence[Event], scale: float) -> int:
    heap, base = Heap(), 0
    now = fullest = 0
    sizes: dict[int, int] = {}
    for factor in LENGTHS:
        for number, num_bytes in events:
            own = base + number
            if num_bytes >= 0:
                sizes[own] = int(num_bytes * scale * factor) if num_bytes >= TENSOR else num_bytes
                now += sizes[own]
                fullest = max(fullest, now)
                heap.come(own, sizes[own])
            elif own in sizes:
                now -= sizes.pop(own)
                heap.go(own)
        base += 1 + max((number for number, _ in events), default=0)
        for own in list(sizes):  # the step is over
            now -= sizes.pop(own)
            heap.go(own)
    return heap.peak - fullest
