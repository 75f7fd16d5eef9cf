"""What the libraries below are told about this process."""

import ctypes
import logging
import os
import sys

ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32",
    "LRU_CACHE_CAPACITY": "32",
}
"""Variables that are set unless they are set already.

Threads that wait for work by spinning take the processor from those that have it, wherever there are more threads than cores.

On a CPU, oneDNN writes a kernel for every shape of a bf16 product, and torch keeps the last 1,024 of them, twice: some 0.8 MB each.
Rows without padding have a new length in every batch, so memory would grow by gigabytes over a run and serve nothing; and what each
kernel holds lies in the heap between tensors that come and go, so that holes are left. 32 are more than one micro-batch uses again in
every layer; with none it takes twice the time (docs/experiments.md).
"""

UNUSED_KERNEL = "bitsandbytes.backends.cpu.ops"
"""Who says on the terminal that a kernel is missing which nothing here uses: peft loads bitsandbytes wherever that is installed."""


def prepare_environment() -> None:
    """Sets what is not set. Without effect on libraries that are at work already."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.getLogger(UNUSED_KERNEL).setLevel(logging.ERROR)


M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
"""Numbers of glibc's malloc.h."""


def keep_freed_memory() -> bool:
    """Tells the C library to keep what is freed for what is asked for next. For training on a CPU.

    By itself glibc takes every tensor of 32 MB and more from the system and gives it back when it is freed, and what is free at the
    end of its heap too. Each step then waits for the system to clear the same pages again: turning 16 MB of bf16 into
    float32 takes 14 ms in place of 2 (docs/experiments.md). Without effect on other C libraries and allocators, and where the
    environment says how malloc behaves.

    Returns:
        whether it was told.
    """
    if not sys.platform.startswith("linux") or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is None:
        return False
    told = [mallopt(name, value) for name, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 2**26))]
    return all(told)


def give_freed_memory_back() -> None:
    """Lets the system have what is kept: before a run that follows another one in this process, and counts its own."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if trim is not None:
        trim(0)
