"""The processes of a run: one, or as many as torchrun (or any launcher that sets its variables) started."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from prefopt.errors import RunError


@dataclass(frozen=True, slots=True)
class Processes:
    """This process among those of the run."""

    rank: int
    count: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this one writes files and speaks."""
        return self.rank == 0

    def add_up(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all processes, in place."""
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            dist.barrier()

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The main process does the work, then the others, who find its results in a cache."""
        if not self.is_main:
            self.wait()
        yield
        if self.is_main:
            self.wait()


@contextmanager
def join(device: str) -> Iterator[Processes]:
    """Take part in the run, on the device that was asked for.

    Raises:
        RunError: the device is not there.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise RunError("device: cuda was asked for, and this machine has no usable GPU. Use device: auto or cpu.")
    kind = "cuda" if device == "cuda" or (device == "auto" and torch.cuda.is_available()) else "cpu"
    count = int(os.environ.get("WORLD_SIZE", "1"))
    place = torch.device(kind, int(os.environ.get("LOCAL_RANK", "0"))) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(place)
    if count == 1:
        yield Processes(0, 1, place)
        return
    started_here = not dist.is_initialized()
    if started_here:
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=timedelta(minutes=30))
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), place)
    finally:
        if started_here:
            dist.destroy_process_group()
