"""The reference's values of a run: in memory while they are few, else read from their cache as they are asked for."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import overload

import numpy as np
import numpy.typing as npt

from prefopt.models.reference_cache import ReferenceCache

HELD = 2**28
"""Bytes of values that are held in memory: 256 MiB, some million answers."""

ENTRY = 300
"""Bytes that a value in memory takes beside its numbers."""

AT_ONCE = 4096

Array = npt.NDArray[np.float32]
KEY = np.dtype("S16")


class ReferenceValues:
    """Values per token by their key.

    Args:
        cache: that keeps them too; None: memory alone does.
        values: the first ones.
    """

    def __init__(self, cache: ReferenceCache | None = None, values: Mapping[bytes, Array] | None = None) -> None:
        self.cache = cache
        self._held: dict[bytes, Array] = dict(values or {})
        self._size = sum(ENTRY + value.nbytes for value in self._held.values())
        self._keys: list[npt.NDArray[np.bytes_]] = []

    @property
    def are_held(self) -> bool:
        """Whether they are in memory."""
        return not self._keys

    def add(self, values: Mapping[bytes, Array]) -> None:
        """More of them, which the cache has by now, if it can be used."""
        self._size += sum(ENTRY + value.nbytes for key, value in values.items() if key not in self._held)
        if self._size > HELD and self.cache is not None and self._leave_to(self.cache, values):
            self._keys.append(sorted_keys([*self._held, *values]))
            self._held.clear()
        else:
            self._held.update(values)

    def get(self, keys: Iterable[bytes]) -> Mapping[bytes, Array]:
        """Those of these keys that are there."""
        if self.are_held:
            return self._held
        wanted = list(keys)
        found = {key: self._held[key] for key in wanted if key in self._held}
        assert self.cache is not None
        return found | self.cache.get(key for key in wanted if key not in found)

    def keys(self) -> Sequence[bytes]:
        """All keys, in order."""
        if self.are_held:
            return sorted(self._held)
        return Keys(np.unique(np.concatenate([*self._keys, sorted_keys(self._held)])))

    def in_order(self) -> Iterator[tuple[bytes, Array]]:
        """All of them, by key."""
        keys = self.keys()
        for start in range(0, len(keys), AT_ONCE):
            part = keys[start : start + AT_ONCE]
            found = self.get(part)
            yield from ((key, found[key]) for key in part)

    def _leave_to(self, cache: ReferenceCache, values: Mapping[bytes, Array]) -> bool:
        """Whether the cache really has all that would be given up here."""
        return all(len(cache.get(part)) == len(part) for own in (self._held, values) for part in portions(list(own)))


class Keys(Sequence[bytes]):
    """Keys in an array, sixteen bytes each."""

    def __init__(self, array: npt.NDArray[np.bytes_]) -> None:
        self._array = array

    def __len__(self) -> int:
        return len(self._array)

    @overload
    def __getitem__(self, place: int) -> bytes: ...

    @overload
    def __getitem__(self, place: slice) -> list[bytes]: ...

    def __getitem__(self, place: int | slice) -> bytes | list[bytes]:
        if isinstance(place, slice):
            return [self[index] for index in range(len(self))[place]]
        return bytes(self._array[place]).ljust(KEY.itemsize, b"\0")  # numpy leaves out zeros at the end


def sorted_keys(keys: Iterable[bytes]) -> npt.NDArray[np.bytes_]:
    """Keys as an array, in order, each once."""
    return np.unique(np.array(list(keys), dtype=KEY))


def portions(keys: Sequence[bytes]) -> Iterator[Sequence[bytes]]:
    """The keys, some at a time."""
    for start in range(0, len(keys), AT_ONCE):
        yield keys[start : start + AT_ONCE]
