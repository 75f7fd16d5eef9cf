"""Activations that wait for the backward pass in the machine's memory, so that a GPU need not hold them.

What autograd keeps of the forward pass is copied out while the next layers compute, and fetched back, a little ahead, while the
backward pass comes down to it. Copies run on a stream of their own beside the computation. Weights stay where they are, and so do
small tensors, whose copies would cost more than they free.

Storages are moved, not tensors: a tensor and a view of it that are both kept are copied once.
"""

import weakref
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

Waits = Callable[[], None]
"""Makes the computation wait until a copy is whole."""

SMALLEST = 2**20
"""Bytes below which a storage stays: 1 MiB takes 40 µs over a bus of 25 GB/s, about what starting the copy takes."""

UNDER_WAY = 2**30
"""Bytes that may still be on their way out before the computation waits, and that are fetched ahead in the backward pass."""


class Copies(Protocol):
    """How storages travel. All of it is asynchronous on a GPU; a copy is there when it has been waited for."""

    def out(self, tensor: Tensor) -> tuple[Tensor, Waits]:
        """Begin to copy a flat tensor to the machine's memory; gives the copy, and what waits until it is whole."""

    def back(self, tensor: Tensor, device: torch.device) -> tuple[Tensor, Waits]:
        """Begin to copy it to the device; gives the copy, and what waits until it is whole."""


class CudaCopies:
    """Copies between a GPU and pinned memory on a stream of their own.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)

    def out(self, tensor: Tensor) -> tuple[Tensor, Waits]:
        """The copy begins when what the computation has been given so far is done."""
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return self._copy(host, tensor)

    def back(self, tensor: Tensor, device: torch.device) -> tuple[Tensor, Waits]:
        """Its room belongs to the computation's stream: what lay there before is used up when the copy begins."""
        return self._copy(torch.empty(tensor.shape, dtype=tensor.dtype, device=device), tensor)

    def _copy(self, to: Tensor, given: Tensor) -> tuple[Tensor, Waits]:
        computing = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(computing)
        with torch.cuda.stream(self.stream):
            to.copy_(given, non_blocking=True)
            done = self.stream.record_event()
        return to, lambda: torch.cuda.current_stream(self.stream.device).wait_event(done)


@dataclass(slots=True, weakref_slot=True, eq=False)
class Moved:
    """A storage that was copied out.

    Attributes:
        host: its bytes, uint8.
        device: where it was.
        place: how many storages were copied out before it.
        left: how it was left on the device and what waits for its copy, as long as that is on its way; the last ones are used from here.
        fetched: its bytes back on the device and what waits for them, when they were asked for ahead.
        used: its bytes on the device as long as somebody has them.
        to_come: tensors of it that the backward pass has not asked for yet.
        held: its bytes on the device between the first of them and the last.
    """

    host: Tensor
    device: torch.device
    place: int
    left: tuple[torch.UntypedStorage, Waits] | None
    fetched: tuple[Tensor, Waits] | None = None
    used: "weakref.ref[torch.UntypedStorage] | None" = None
    to_come: int = 0
    held: torch.UntypedStorage | None = None


@dataclass(frozen=True, slots=True)
class Kept:
    """What autograd holds in place of a tensor."""

    moved: Moved
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


@dataclass(slots=True)
class Counts:
    """What a forward pass and its backward pass moved and left.

    Attributes:
        num_moved, bytes_moved: storages that were copied out.
        num_shared: tensors whose storage was copied already.
        num_left: tensors that stay: weights, small ones.
        num_back, bytes_back: storages that were fetched back; the last ones need not be.
    """

    num_moved: int = 0
    bytes_moved: int = 0
    num_shared: int = 0
    num_left: int = 0
    num_back: int = 0
    bytes_back: int = 0


@dataclass(slots=True, eq=False)
class Offload:
    """Moves what autograd keeps: `with offload.during(policy):` around its forward pass.

    Attributes:
        copies: how.
        smallest, under_way: limits in bytes.
        counts: of the newest forward pass.
    """

    copies: Copies
    smallest: int = SMALLEST
    under_way: int = UNDER_WAY
    counts: Counts = field(default_factory=Counts)

    def during(self, module: nn.Module) -> AbstractContextManager[None]:
        """For one forward pass of the module, whose weights stay where they are."""
        self.counts = Counts()
        one = _Pass(self, (*module.parameters(), *module.buffers()))
        return torch.autograd.graph.saved_tensors_hooks(one.pack, one.unpack)


class _Pass:
    """The state of one forward pass and its backward pass."""

    def __init__(self, offload: Offload, weights: Iterable[Tensor]) -> None:
        self.copies, self.counts = offload.copies, offload.counts
        self.smallest, self.under_way = offload.smallest, offload.under_way
        self.weights = {tensor.untyped_storage()._cdata for tensor in weights}
        self.known: dict[tuple[int, int], tuple[weakref.ref[torch.UntypedStorage], weakref.ref[Moved]]] = {}
        self.order: list[weakref.ref[Moved]] = []
        self.leaving: deque[Moved] = deque()
        self.bytes_leaving = self.bytes_ahead = 0

    def pack(self, tensor: Tensor) -> Tensor | Kept:
        """Begin to copy the storage out, unless that has begun before or it stays."""
        storage = tensor.untyped_storage()
        if storage.nbytes() < self.smallest or storage._cdata in self.weights or _is_weight(tensor):
            self.counts.num_left += 1
            return tensor
        # What is written into a storage between two uses of it makes it another one.
        key = (storage._cdata, tensor._version)
        of_storage, of_moved = self.known.get(key, (None, None))
        moved = of_moved() if of_storage is not None and of_moved is not None and of_storage() is storage else None
        if moved is None:
            moved = self._move(storage, tensor.device)
            self.known[key] = (weakref.ref(storage), weakref.ref(moved))
        else:
            self.counts.num_shared += 1
        moved.to_come += 1
        return Kept(moved, tensor.dtype, tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    def unpack(self, kept: Tensor | Kept) -> Tensor:
        """The tensor on its device; those that were copied out before it are fetched meanwhile."""
        if isinstance(kept, Tensor):
            return kept
        storage = self._on_device(kept.moved)
        kept.moved.to_come -= 1
        kept.moved.held = storage if kept.moved.to_come > 0 else None
        self._fetch_before(kept.moved.place)
        return torch.empty(0, dtype=kept.dtype, device=kept.moved.device).set_(storage, kept.offset, kept.size, kept.stride)

    def _move(self, storage: torch.UntypedStorage, device: torch.device) -> Moved:
        num_bytes = storage.nbytes()
        host, wait = self.copies.out(_flat(storage, device))
        moved = Moved(host, device, len(self.order), (storage, wait))
        self.order.append(weakref.ref(moved))
        self.leaving.append(moved)
        self.bytes_leaving += num_bytes
        self.counts.num_moved += 1
        self.counts.bytes_moved += num_bytes
        # The room of what has left is given to later layers, so they must begin when it is empty. Far ahead of the copies the
        # computation would fill the device with what is still to leave.
        while self.bytes_leaving > self.under_way:
            self._let_go(self.leaving.popleft())
        return moved

    def _let_go(self, moved: Moved) -> None:
        if moved.left is not None:
            storage, wait = moved.left
            wait()
            self.bytes_leaving -= storage.nbytes()
            moved.left = None

    def _on_device(self, moved: Moved) -> torch.UntypedStorage:
        storage = moved.used() if moved.used is not None else None
        if storage is not None:
            return storage
        if moved.left is not None:
            storage = moved.left[0]
            self._let_go(moved)
        else:
            tensor, wait = moved.fetched or self._fetch(moved)
            if moved.fetched is not None:
                self.bytes_ahead -= tensor.nbytes
            wait()
            moved.fetched = None
            storage = tensor.untyped_storage()
        moved.used = weakref.ref(storage)
        return storage

    def _fetch(self, moved: Moved) -> tuple[Tensor, Waits]:
        self.counts.num_back += 1
        self.counts.bytes_back += moved.host.nbytes
        return self.copies.back(moved.host, moved.device)

    def _fetch_before(self, place: int) -> None:
        while place and self.bytes_leaving + self.bytes_ahead < self.under_way:
            place -= 1
            moved = self.order[place]()
            if (
                moved is None
                or moved.left is not None
                or moved.fetched is not None
                or (moved.used is not None and moved.used() is not None)
            ):
                continue
            moved.fetched = self._fetch(moved)
            self.bytes_ahead += moved.host.nbytes


def _flat(storage: torch.UntypedStorage, device: torch.device) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage, 0, (storage.nbytes(),), (1,))


def _is_weight(tensor: Tensor) -> bool:
    """Of a model that is cut among processes the weights are gathered while it runs, and are others than those that it was given."""
    return isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)
