"""What the libraries below are told about this process, before they are loaded."""

import logging
import os

ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128",
    "LRU_CACHE_CAPACITY": "128",
}
"""Variables that are set unless they are set already.

Threads that wait for work by spinning take the processor from those that have it, wherever there are more threads than cores.

On a CPU, oneDNN writes a kernel for every shape of a bf16 product, and torch keeps the last 1,024 of them, twice: some 0.8 MB each.
Rows without padding have a new length in every batch, so memory would grow by gigabytes over a run and serve nothing. 128 are what
one step uses again in every layer; with none it takes twice the time (docs/experiments.md).
"""

UNUSED_KERNEL = "bitsandbytes.backends.cpu.ops"
"""Who says on the terminal that a kernel is missing which nothing here uses: peft loads bitsandbytes wherever that is installed."""


def prepare_environment() -> None:
    """Sets what is not set. Without effect on libraries that are at work already."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.getLogger(UNUSED_KERNEL).setLevel(logging.ERROR)
