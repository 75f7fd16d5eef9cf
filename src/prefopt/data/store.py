"""Trees in one file, read one by one when they are asked for: what is larger than the memory can be trained on.

    MAGIC, the trees' records, the lines about dropped rows, the index, a JSON object, the footer, SHA-256 of all before it

A record holds all of a tree; the index holds, per tree, where its record ends and the few numbers that are asked about all
trees at once (lengths above all), so that nobody needs to read the records for them. Nothing is pickled.

Small data lies in memory as the same bytes, so that there is one way to read a tree. It costs some ten microseconds.
"""

import json
import os
import struct
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from prefopt.errors import DataError
from prefopt.trees import Completion, PromptTree

MAGIC = b"prefopt trees 5\n"
HEADER = struct.Struct("<IIdI")
"""Of a record: prompt tokens, completions, weight, bytes of what it opens with."""

BRANCH = struct.Struct("<IIidd")
"""Of a completion: tokens, flags, rank, reward, reference log-probability; −1 and NaN stand for None."""

FOOTER = struct.Struct("<5Q")
"""Trees, dropped rows, and where their lines, the index and the JSON object begin."""

LABELLED, POSITIVE, MASKED = 1, 2, 4

INDEX = np.dtype(
    [
        ("end", "<i8"),
        ("opening", "<u8"),
        ("prompt", "<i4"),
        ("answers", "<i4"),
        ("longest", "<i4"),
        ("branches", "<i4"),
        ("references", "<i4"),
        ("unused", "<i4"),
    ]
)
"""Of a tree: where its record ends, its opening as a number (0: look into the record), tokens of its prompt, of all its
completions and of the longest one, number of completions, and how many of them bring a reference log-probability."""

HELD = 2**24
"""Bytes of a file that is held in memory: 16 MiB."""

AT_ONCE = 2**20

Ids = npt.NDArray[np.int32]


def record_of(tree: PromptTree) -> tuple[bytes, bytes]:
    """A tree's record, in two parts: what it holds, and where its row stands."""
    assert tree.prompt_scored is None, "no format scores prompts"
    opening = tree.opening.encode()
    parts = [HEADER.pack(len(tree.prompt_ids), len(tree.completions), tree.weight, len(opening))]
    for one in tree.completions:
        flags = (0 if one.label is None else LABELLED | (POSITIVE if one.label else 0)) | (0 if one.scored is None else MASKED)
        given = (np.nan if value is None else value for value in (one.reward, one.reference_logp))
        parts.append(BRANCH.pack(len(one.ids), flags, -1 if one.rank is None else one.rank, *given))
    parts.append(tree.prompt_ids.tobytes())
    parts += [one.ids.tobytes() for one in tree.completions]
    parts += [one.scored.tobytes() for one in tree.completions if one.scored is not None]
    parts.append(opening)
    return b"".join(parts), tree.row_id.encode(errors="surrogatepass")


def tree_of_record(record: bytes) -> PromptTree:
    """The tree of a record; its arrays are views of it, and read-only as it is."""
    num_prompt, num_completions, weight, num_opening = HEADER.unpack_from(record)
    heads = [BRANCH.unpack_from(record, HEADER.size + number * BRANCH.size) for number in range(num_completions)]
    place = HEADER.size + num_completions * BRANCH.size
    prompt = np.frombuffer(record, np.int32, num_prompt, place)
    place += 4 * num_prompt
    ids = []
    for length, *_ in heads:
        ids.append(np.frombuffer(record, np.int32, length, place))
        place += 4 * length
    completions = []
    for own, (length, flags, rank, reward, logp) in zip(ids, heads, strict=True):
        scored = np.frombuffer(record, np.bool_, length, place) if flags & MASKED else None
        place += length if flags & MASKED else 0
        completions.append(
            Completion(
                own,
                scored,
                bool(flags & POSITIVE) if flags & LABELLED else None,
                None if rank < 0 else rank,
                None if reward != reward else reward,
                None if logp != logp else logp,
            )
        )
    opening = record[place : place + num_opening].decode()
    row_id = record[place + num_opening :].decode(errors="surrogatepass")
    return PromptTree(prompt, tuple(completions), weight=weight, row_id=row_id, opening=opening)


def index_row(tree: PromptTree, end: int) -> tuple[int, ...]:
    """A tree's row of the index."""
    lengths = [len(one.ids) for one in tree.completions]
    given = sum(one.reference_logp is not None for one in tree.completions)
    return end, opening_number(tree.opening), len(tree.prompt_ids), sum(lengths), max(lengths), len(lengths), given, 0


def opening_number(opening: str) -> int:
    """An opening as the index holds it, 0 where it is none of 16 digits."""
    try:
        number = int(opening, 16) if len(opening) == 16 else 0
    except ValueError:
        return 0
    return number if f"{number:016x}" == opening else 0


@dataclass(frozen=True, slots=True)
class Sizes:
    """The lengths of many trees, in tokens; arrays of one entry per tree.

    Attributes:
        prompt: of the prompt.
        answers: of all completions together.
        longest: of the longest completion.
        branches: number of completions.
        references: number of completions that bring a reference log-probability.
    """

    prompt: npt.NDArray[np.int64]
    answers: npt.NDArray[np.int64]
    longest: npt.NDArray[np.int64]
    branches: npt.NDArray[np.int64]
    references: npt.NDArray[np.int64]

    @classmethod
    def of(cls, trees: Sequence[PromptTree]) -> "Sizes":
        """Those of the trees: from the index where they have one."""
        if isinstance(trees, StoredTrees):
            rows = trees.rows
        elif isinstance(trees, JoinedTrees):
            parts = [cls.of(part) for part in trees.parts]
            return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in cls.__slots__))
        else:
            rows = np.array([index_row(tree, 0) for tree in trees], dtype=INDEX)
        return cls.of_index(rows)

    @classmethod
    def of_index(cls, rows: npt.NDArray[Any]) -> "Sizes":
        """Those of rows of an index."""
        return cls(*(rows[name].astype(np.int64) for name in cls.__slots__))


class TreeFile:
    """The trees of a file, or of the bytes of one.

    Args:
        read: gives the bytes from a place up to another.
        index: of the trees.
    """

    def __init__(self, read: Callable[[int, int], bytes], index: npt.NDArray[Any]) -> None:
        self.read = read
        self.index = index

    def tree(self, place: int) -> PromptTree:
        """The tree at a place."""
        start = int(self.index["end"][place - 1]) if place else len(MAGIC)
        return tree_of_record(self.read(start, int(self.index["end"][place])))


class StoredTrees(Sequence[PromptTree]):
    """Trees of a file, all or some of them, each made when it is asked for.

    Args:
        file: that holds them.
        places: which of them, in order; None: all.
    """

    def __init__(self, file: TreeFile, places: npt.NDArray[np.int64] | None = None) -> None:
        self.file = file
        self.places = places

    def __len__(self) -> int:
        return len(self.file.index) if self.places is None else len(self.places)

    @overload
    def __getitem__(self, place: int) -> PromptTree: ...

    @overload
    def __getitem__(self, place: slice) -> "StoredTrees": ...

    def __getitem__(self, place: int | slice) -> "PromptTree | StoredTrees":
        if isinstance(place, slice):
            return self.choose(np.arange(len(self), dtype=np.int64)[place])
        if not -len(self) <= place < len(self):
            raise IndexError(f"there are {len(self)} trees, and {place} was asked for")
        place = place % len(self)
        return self.file.tree(place if self.places is None else int(self.places[place]))

    @property
    def rows(self) -> npt.NDArray[Any]:
        """The rows of the index that belong to them."""
        return self.file.index if self.places is None else self.file.index[self.places]

    def choose(self, places: npt.NDArray[np.int64]) -> "StoredTrees":
        """Those at these places."""
        return StoredTrees(self.file, places if self.places is None else self.places[places])

    def openings(self) -> Iterator[str]:
        """What each opens with."""
        for place, number in enumerate(self.rows["opening"].tolist()):
            yield f"{number:016x}" if number else self[place].opening


class JoinedTrees(Sequence[PromptTree]):
    """Several sequences of trees as one."""

    def __init__(self, *parts: Sequence[PromptTree]) -> None:
        self.parts = [part for part in parts if len(part)]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    @overload
    def __getitem__(self, place: int) -> PromptTree: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[PromptTree]: ...

    def __getitem__(self, place: int | slice) -> PromptTree | Sequence[PromptTree]:
        if isinstance(place, slice):
            return [self[index] for index in range(len(self))[place]]
        place = range(len(self))[place]
        for part in self.parts:
            if place < len(part):
                return part[place]
            place -= len(part)
        raise IndexError(place)


def choose(trees: Sequence[PromptTree], places: npt.NDArray[np.int64]) -> Sequence[PromptTree]:
    """Those at these places; read when they are asked for, where the trees are."""
    return trees.choose(places) if isinstance(trees, StoredTrees) else tuple(trees[place] for place in places.tolist())


class DroppedRows(Sequence[Mapping[str, Any]]):
    """Rows that were left out, as lines of JSON, read when they are asked for.

    Args:
        lines: gives the lines, from the first on.
        number: how many there are.
    """

    def __init__(self, lines: Callable[[], Iterable[bytes]], number: int) -> None:
        self._lines = lines
        self._number = number

    def __len__(self) -> int:
        return self._number

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for line in self._lines():
            yield json.loads(line)

    @overload
    def __getitem__(self, place: int) -> Mapping[str, Any]: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[Mapping[str, Any]]: ...

    def __getitem__(self, place: int | slice) -> Mapping[str, Any] | Sequence[Mapping[str, Any]]:
        if isinstance(place, slice):
            return list(self)[place]
        return next(islice(self, range(self._number)[place], None))


@dataclass(frozen=True, slots=True)
class Stored:
    """What a file holds.

    Attributes:
        trees: all of them.
        dropped_rows: rows that were left out.
        about: a JSON object about them.
    """

    trees: StoredTrees
    dropped_rows: DroppedRows
    about: dict[str, Any]


class Damaged(Exception):
    """A file is not what was written; caught by whoever can make it anew."""


def open_file(path: Path, *, trusted: bool = False) -> Stored:
    """What a file holds; a small one is read into memory.

    Args:
        path: of the file.
        trusted: it was written a moment ago, and a large one is not compared with its digest.

    Raises:
        OSError: it cannot be read.
        Damaged: it is not what was written.
    """
    size = path.stat().st_size
    if size <= HELD:
        return opened(path.read_bytes())
    reader = Reader(path)
    if not trusted:
        check_digest(path, size)
    num_trees, num_dropped, dropped, index, about = FOOTER.unpack(reader(size - 32 - FOOTER.size, size - 32))
    rows = np.memmap(path, dtype=INDEX, mode="r", offset=index, shape=(num_trees,))

    def lines() -> Iterator[bytes]:
        with path.open("rb") as again:
            again.seek(dropped)
            yield from islice(again, num_dropped)

    return Stored(StoredTrees(TreeFile(reader, rows)), DroppedRows(lines, num_dropped), json.loads(reader(about, size - 32 - FOOTER.size)))


class Reader:
    """Reads parts of a file, which may be removed meanwhile.

    By calls, not by mapping it into memory: what was read does not count as this process's memory then.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def __call__(self, start: int, end: int) -> bytes:
        """The bytes from a place up to another.

        Raises:
            DataError: the disk does not give them.
        """
        try:
            part = os.pread(self._descriptor, end - start, start)
            while len(part) < end - start and (more := os.pread(self._descriptor, end - start - len(part), start + len(part))):
                part += more
        except OSError as error:
            raise DataError(f"the tokens in {self.path} cannot be read any more: {error.strerror}. Look after the disk.") from None
        if len(part) < end - start:
            raise DataError(f"{self.path} became shorter while it was in use. Leave the files of the cache alone while a run goes on.")
        return part


def opened(content: bytes) -> Stored:
    """What the bytes of a file hold.

    Raises:
        Damaged: they are not what was written.
    """
    end = len(content) - 32 - FOOTER.size
    if end < 0 or sha256(memoryview(content)[:-32]).digest() != content[-32:] or not content.startswith(MAGIC):
        raise Damaged
    num_trees, num_dropped, dropped, index, about = FOOTER.unpack_from(content, end)
    rows = np.frombuffer(content, INDEX, num_trees, index)
    lines = content[dropped:index].split(b"\n")[:num_dropped]
    trees = StoredTrees(TreeFile(lambda start, stop: content[start:stop], rows))
    return Stored(trees, DroppedRows(lambda: lines, num_dropped), json.loads(content[about:end]))


def check_digest(path: Path, size: int) -> None:
    """Compare what a file holds with what was written.

    Raises:
        Damaged: they differ.
    """
    digest = sha256()
    with path.open("rb") as file:
        begins = file.read(len(MAGIC))
        digest.update(begins)
        left = size - 32 - len(begins)
        while left > 0 and (part := file.read(min(AT_ONCE, left))):
            digest.update(part)
            left -= len(part)
        if begins != MAGIC or file.read(32) != digest.digest():
            raise Damaged
