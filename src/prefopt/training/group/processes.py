"""The processes of a run: one, or as many as a launcher started (torchrun, `accelerate launch`, anything that sets its variables).

Tensors go through torch's collectives, everything else through its store. No process reads another one's disk.
"""

import json
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store
from torch.distributed.rendezvous import rendezvous

from prefopt.errors import RunError
from prefopt.training.group.lifeline import Lifeline, wait_until

COME_TOGETHER = timedelta(minutes=15)
"""Within which all processes must have started."""

BEGIN_TO_WATCH = timedelta(minutes=2)
"""Within which all must be ready to watch over each other, once they have started."""

COLLECTIVE = timedelta(hours=12)
"""Within which all must have come to a collective operation. Long, because one process may have work of its own (a callback, an
evaluation on an uneven share): that others are alive is the lifeline's to say."""

RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK")
SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE")
LOCAL_RANKS = ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK")
"""Variables in which launchers say which process this is: torchrun and `accelerate launch`, Intel MPI, Open MPI."""

TAKEN_OVER = ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING")
"""Switches of `accelerate launch` that other libraries read on their own: some versions of transformers then load weights on one
process of a machine only, and leave those of the others empty."""

ACCELERATE_SETTINGS = (
    ("ACCELERATE_USE_FSDP", ("false", "0"), "FSDP: use `--parallel fsdp`"),
    ("ACCELERATE_USE_DEEPSPEED", ("false", "0"), "DeepSpeed: use `--parallel fsdp`"),
    ("ACCELERATE_USE_MEGATRON_LM", ("false", "0"), "Megatron: use `--parallel fsdp`"),
    ("ACCELERATE_MIXED_PRECISION", ("no",), "mixed precision: use `--precision`"),
    ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", ("1",), "gradient accumulation: use `--batch-size`, and `--max-tokens` for memory"),
)
"""What else a configuration of accelerate may ask for: the variable, its values that ask for nothing, and our setting."""


class Board:
    """Where processes leave each other short texts.

    Args:
        store: torch's.
        count: of the processes.
        lifeline: ends a wait for a process that is gone.
    """

    def __init__(self, store: Store, count: int, lifeline: Lifeline) -> None:
        self.store, self.count, self.lifeline = store, count, lifeline
        self.num_meetings = 0

    def post(self, key: str, text: str) -> None:
        """Leave a text."""
        self.store.set(key, text)

    def read(self, key: str) -> str:
        """A text, as soon as it is there.

        Raises:
            RunError: another process is gone.
        """
        wait_until(lambda: bool(self.store.check([key])), self.lifeline.check)
        return str(self.store.get(key).decode())

    def meet(self, *, longest: timedelta | None = None) -> None:
        """Wait for all, however long they take, or so long.

        Raises:
            RunError: another process is gone, or does not come.
        """
        self.num_meetings += 1
        name = f"meeting {self.num_meetings}"
        self.store.add(name, 1)
        longest_s = None if longest is None else longest.total_seconds()
        if not wait_until(lambda: self.store.add(name, 0) == self.count, self.lifeline.check, longest_s=longest_s):
            raise RunError(
                f"{self.store.add(name, 0)} of {self.count} processes came within {longest}: look at what the others say, and start "
                "them all with the same number of processes and the same address."
            )

    def leave(self, *, last: bool) -> None:
        """Nobody looks at the board after this; one process, which may keep it, leaves last."""
        self.store.add("left", 1)
        if last:
            wait_until(lambda: self.store.add("left", 0) == self.count, lambda: None, longest_s=10)


@dataclass(frozen=True, slots=True)
class Processes:
    """This process among those of the run.

    Attributes:
        rank, count: which it is, of how many.
        device: where it computes.
        local_rank: which it is on its machine.
        board: for words; None where there is one process.
    """

    rank: int
    count: int
    device: torch.device
    local_rank: int = 0
    board: Board | None = None

    @property
    def is_main(self) -> bool:
        """Whether this one writes files and speaks."""
        return self.rank == 0

    @property
    def lifeline(self) -> Lifeline | None:
        """What ends this process when another one is gone."""
        return None if self.board is None else self.board.lifeline

    def add_up(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all processes, in place."""
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def collect(self, values: torch.Tensor) -> torch.Tensor:
        """The tensors of all processes, of the same shape, one above the other: [count, ...]."""
        if self.count == 1:
            return values[None]
        own = values.to(self.device).contiguous()
        found = own.new_empty((self.count, *own.shape))
        dist.all_gather(list(found), own)
        return found

    def send(self, values: torch.Tensor, source: int) -> torch.Tensor:
        """One process's tensor on all; those of the others give its shape and type."""
        if self.count == 1:
            return values
        sent = values.to(self.device).contiguous()
        dist.broadcast(sent, source)
        return sent

    def wait(self) -> None:
        """Until all are here, however long one of them has work of its own."""
        if self.board is not None:
            self.board.meet()
        elif self.count > 1:
            dist.barrier()

    def share(self, value: Any) -> Any:
        """The main process's value (of JSON) on all; the others' own is not looked at."""
        if self.board is None:
            return value
        self.board.num_meetings += 1
        key = f"shared {self.board.num_meetings}"
        if self.is_main:
            self.board.post(key, json.dumps(value))
        return json.loads(self.board.read(key))

    def agree(self, facts: Mapping[str, str]) -> None:
        """All processes must have found the same.

        Args:
            facts: what was found, by a name that a sentence can begin with ("the data", "the model"); same names everywhere.

        Raises:
            RunError: names the first thing that is not the same, and the process where.
        """
        if self.board is None:
            return
        self.board.num_meetings += 1
        key = f"facts {self.board.num_meetings}"
        self.board.post(f"{key} of {self.rank}", json.dumps(dict(facts)))
        found = [json.loads(self.board.read(f"{key} of {rank}")) for rank in range(self.count)]
        for name in found[0]:
            for rank, other in enumerate(found):
                if other[name] != found[0][name]:
                    raise RunError(
                        f"{name}: process {rank} of {self.count} found {other[name]}, process 0 {found[0][name]}. Give all processes the "
                        "same command, files and versions."
                    )

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The main process does the work, then the others, who find its results in a cache where they share a disk."""
        if not self.is_main:
            self.wait()
        yield
        if self.is_main:
            self.wait()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """What is written in here is finished first when another process is gone."""
        if self.lifeline is None:
            yield
            return
        with self.lifeline.writing:
            yield


ALONE = Processes(0, 1, torch.device("cpu"))
"""A run of one process, for whoever reads and writes what runs write."""


@contextmanager
def join(device: str) -> Iterator[Processes]:
    """Take part in the run, on the device that was asked for. Whatever ends one of several processes ends all of them.

    Raises:
        RunError: the device is not there, the launcher's variables make no sense, or another process is gone.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise RunError("device: cuda was asked for, and this machine has no usable GPU. Use device: auto or cpu.")
    kind = "cuda" if device == "cuda" or (device == "auto" and torch.cuda.is_available()) else "cpu"
    rank, count, local_rank = place(os.environ)
    if kind == "cuda" and local_rank >= torch.cuda.device_count():
        raise RunError(
            f"process {local_rank} of this machine finds {torch.cuda.device_count()} GPUs. Start one process per GPU, or use device: cpu."
        )
    where = torch.device(kind, local_rank) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(where)
    if count == 1:
        yield Processes(0, 1, where)
        return
    with (
        launcher_settings(speaks=rank == 0),
        # A launcher sends it when a process has died: this one must end in a way of which the others hear.
        raising_at_sigterm(lambda number: SystemExit(128 + number)),
        group("nccl" if kind == "cuda" else "gloo", rank, count, local_rank) as board,
    ):
        yield Processes(rank, count, where, local_rank, board)


@contextmanager
def group(backend: str, rank: int, count: int, local_rank: int) -> Iterator[Board]:
    """Torch's process group with a lifeline; what goes wrong in it becomes an error of the run."""
    lifeline = Lifeline(rank, count, local_rank)
    started_here = not dist.is_initialized()
    try:
        store = own_part(launcher_store(rank, count) if started_here else _get_default_store(), rank)
        board = Board(store, count, lifeline)
        board.meet(longest=COME_TOGETHER)
        watch_over(board, lifeline)
        if started_here:
            dist.init_process_group(backend, store=PrefixStore("group", store), rank=rank, world_size=count, timeout=COLLECTIVE)
        yield board
        board.leave(last=rank == 0)
    except BaseException as error:
        reason = lifeline.explain(error)
        deaf_for_a_moment()
        if reason is error:
            raise
        raise reason from None
    finally:
        if started_here and dist.is_initialized():
            with suppress(Exception):  # whatever it is, the reason why the run ends has been found
                dist.destroy_process_group()
        lifeline.close()


def watch_over(board: Board, lifeline: Lifeline) -> None:
    """Begin to watch. Where one process cannot (no network but that of the collectives), none does, and the run goes on."""
    host = os.environ.get("MASTER_ADDR", "")
    problem = lifeline.start(lambda text: board.post("lifeline", text), lambda: board.read("lifeline"), host)
    if problem:
        board.post("problem", problem)
    board.meet(longest=BEGIN_TO_WATCH)
    if board.store.check(["problem"]):
        lifeline.close()
        if lifeline.rank == 0:
            warnings.warn(
                f"the processes of this run cannot watch over each other ({board.read('problem')}): when one dies or hangs, the others "
                "may wait for hours",
                stacklevel=2,
            )


def place(variables: Mapping[str, str]) -> tuple[int, int, int]:
    """Rank, number of processes, and rank on this machine, as the launcher says.

    Raises:
        RunError: the variables are incomplete or at odds with each other.
    """
    found = [next((variables[name] for name in names if variables.get(name)), None) for names in (RANKS, SIZES, LOCAL_RANKS)]
    if found[1] is None or found[1] == "1":
        return 0, 1, 0
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not variables.get(name)]
    missing += [names[0] for names, value in ((RANKS, found[0]), (LOCAL_RANKS, found[2])) if value is None]
    if missing:
        raise RunError(f"WORLD_SIZE says {found[1]} processes, and {', '.join(missing)} is not set. Start them with torchrun.")
    try:
        rank, count, local_rank = (int(value or "") for value in found)
    except ValueError:
        raise RunError(
            f"the launcher's variables are no numbers: {', '.join(map(str, found))} for {RANKS[0]}, {SIZES[0]}, {LOCAL_RANKS[0]}"
        ) from None
    if not 0 <= rank < count:
        raise RunError(f"the launcher says that this is process {rank} of {count}. Start the processes with torchrun.")
    return rank, count, local_rank


@cache  # it serves all runs of this process, one after the other: a second server could not have the first one's port
def launcher_store(rank: int, count: int) -> Store:
    """The store at the launcher's address.

    Raises:
        RunError: it cannot be reached, or some processes did not come.
    """
    try:
        store: Store = next(rendezvous("env://", rank, count, timeout=COME_TOGETHER))[0]
    except (dist.DistError, RuntimeError, ValueError) as error:
        first_line = str(error).strip().split("\n")[0][:300]
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise RunError(f"the {count} processes of the run did not come together at {address}: {first_line}") from None
    return store


def own_part(store: Store, rank: int) -> Store:
    """A part of the store that earlier runs of the same processes did not write to."""
    return PrefixStore(f"prefopt {store.add(f'prefopt runs of {rank}', 1)}", store)


@contextmanager
def launcher_settings(*, speaks: bool) -> Iterator[None]:
    """`accelerate launch` is a launcher here and nothing more: its settings are not read, which is said where they ask for something."""
    if speaks:
        for sentence in ignored(os.environ):
            warnings.warn(sentence, stacklevel=2)
    taken = {name: os.environ.pop(name) for name in TAKEN_OVER if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(taken)


def ignored(variables: Mapping[str, str]) -> list[str]:
    """What `accelerate launch` was asked for and prefopt does not read, each with our setting for it."""
    asked = [text for name, off, text in ACCELERATE_SETTINGS if variables.get(name, "").lower() not in ("", *off)]
    return [f"accelerate's configuration asks for {text}. Here accelerate only starts the processes." for text in asked]


@contextmanager
def raising_at_sigterm(error: Callable[[int], BaseException]) -> Iterator[None]:
    """SIGTERM becomes an exception in the block; the handler before is put back at the end.

    Args:
        error: makes it of the signal's number.
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return

    def end(number: int, _frame: FrameType | None) -> None:
        raise error(number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is end:  # else a process that is ending has something to say first
            signal.signal(signal.SIGTERM, before)


def deaf_for_a_moment(seconds: float = 10.0) -> None:
    """This process is ending and about to say why; a launcher that ends it now, because another one died, must not cut that short."""
    if threading.current_thread() is not threading.main_thread():
        return
    until = time.monotonic() + seconds

    def ignore(number: int, _frame: FrameType | None) -> None:
        if time.monotonic() > until:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    signal.signal(signal.SIGTERM, ignore)
