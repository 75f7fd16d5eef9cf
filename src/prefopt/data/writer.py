"""Writes trees as they come, into the file that `prefopt.data.store` reads.

The first 16 MiB stay in memory, so that small data needs no disk; what comes then goes to a draft in the cache's folder,
which takes its name when all is written.
"""

import json
import os
import tempfile
import time
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from prefopt.data import store
from prefopt.data.store import FOOTER, INDEX, MAGIC, Sizes, Stored, index_row, record_of
from prefopt.errors import DataError
from prefopt.trees import PromptTree

DRAFT = ".partial"


class TreeWriter:
    """A file of trees in the making.

    Args:
        folder: of the cache.
        name: of the file, in it.

    `close` it whatever happens: what is not finished goes away.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.name = name
        self._held = bytearray(MAGIC)
        self._file: BinaryIO | None = None
        self._draft: Path | None = None
        self._has_folder = True
        self._size = len(MAGIC)
        self._whole = sha256()
        self._content = sha256()
        self._index = bytearray()
        self.first: PromptTree | None = None

    def __len__(self) -> int:
        return len(self._index) // INDEX.itemsize

    @property
    def fingerprint(self) -> str:
        """A digest of what the trees hold but for where their rows stand: the same data, the same digest."""
        return self._content.hexdigest()[:40]

    @property
    def sizes(self) -> Sizes:
        """Of the trees so far."""
        return Sizes.of_index(np.frombuffer(bytes(self._index), INDEX))

    def add(self, trees: Iterable[PromptTree]) -> None:
        """Write trees behind those before.

        Raises:
            DataError: the disk is full, or fails.
        """
        rows = []
        for tree in trees:
            self.first = self.first or tree
            content, place = record_of(tree)
            self._content.update(content)
            self._write(content + place)
            rows.append(index_row(tree, self._size))
        self._index += np.array(rows, dtype=INDEX).tobytes()

    def finish(self, about: Mapping[str, Any], dropped_lines: Iterable[bytes] = ()) -> Stored:
        """The trees, read from the finished file; from memory where a small one cannot be written, which costs a warning.

        Args:
            about: a JSON object about them.
            dropped_lines: JSON about rows that were left out, with line ends.

        Raises:
            DataError: the disk is full, or fails, and the trees are too many to be held in memory.
        """
        dropped = self._size
        num_dropped = 0
        for line in dropped_lines:
            self._write(line)
            num_dropped += 1
        self._write(bytes(-self._size % 16))
        index = self._size
        self._write(bytes(self._index))
        described = self._size
        self._write(json.dumps(about, default=str).encode())
        self._write(FOOTER.pack(len(self), num_dropped, dropped, index, described))
        if self._file is None:
            self._whole.update(self._held)
            content = bytes(self._held) + self._whole.digest()
            self._keep(content)
            return store.opened(content)
        self._write(self._whole.digest())
        with self._complaining():
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            assert self._draft is not None
            path = self._draft.replace(self.folder / self.name)
            self._draft = None
            return store.open_file(path, trusted=True)

    def close(self) -> None:
        """Leave nothing behind that is not finished."""
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
        if self._draft is not None:
            self._draft.unlink(missing_ok=True)

    def _write(self, part: bytes) -> None:
        self._size += len(part)
        if self._file is None:
            self._held += part
            if len(self._held) <= store.HELD or not self._has_folder:
                return
            if not self._begin_file():
                return
            part, self._held = bytes(self._held), bytearray()
        self._whole.update(part)
        assert self._file is not None
        with self._complaining():
            self._file.write(part)

    def _begin_file(self) -> bool:
        """Go on in a file; where the folder takes none, in memory as before."""
        try:
            self._file, self._draft = draft_in(self.folder)
        except OSError as error:
            self._has_folder = False
            warn_uncached(self.folder, error)
        return self._file is not None

    def _keep(self, content: bytes) -> None:
        if not self._has_folder:
            return
        draft: Path | None = None
        try:
            file, draft = draft_in(self.folder)
            with file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(self.folder / self.name)
        except OSError as error:
            if draft is not None:
                draft.unlink(missing_ok=True)
            warn_uncached(self.folder, error)

    def _complaining(self) -> "Complaint":
        return Complaint(self.folder, self._size)


class Complaint:
    """Makes an error of a disk that is full, or fails, one that a user can mend."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder = folder
        self.size = size

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            raise DataError(
                f"the tokens of the data cannot be written to {self.folder}: {error.strerror or error}, after {self.size / 1e9:.2f} GB. "
                "They are too many to be held in memory. Free space there (`prefopt cache --prune` removes old entries), or set cache_dir "
                "to a folder on a larger disk."
            ) from None


def draft_in(folder: Path) -> tuple[BinaryIO, Path]:
    """A new file to write to; drafts that killed processes left behind go away.

    Raises:
        OSError: the folder takes none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_drafts(folder)
    handle, name = tempfile.mkstemp(dir=folder, suffix=DRAFT)
    return os.fdopen(handle, "wb", buffering=store.AT_ONCE), Path(name)


def remove_drafts(folder: Path) -> None:
    """Clear away what processes that were killed while writing left behind: what nobody has written to for a day."""
    for left in folder.glob(f"*{DRAFT}"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > 24 * 3600:
                left.unlink()


def warn_uncached(folder: Path, error: OSError) -> None:
    """Say that the next run will have to read all anew."""
    warnings.warn(
        f"tokens cannot be cached in {folder} ({error.strerror}); going on without. Set cache_dir to another folder.", stacklevel=2
    )
