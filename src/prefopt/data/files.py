"""Files and standard input as sources of rows: opened, unpacked, and read by the reader that their name asks for."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import file_digest, sha256
from pathlib import Path
from tempfile import gettempdir
from typing import IO

from prefopt.data.arrow import parquet
from prefopt.data.json_array import json_array
from prefopt.data.readers import json_lines
from prefopt.data.rows import Dropped, Row, clip
from prefopt.data.spreadsheet import spreadsheet
from prefopt.data.tables import csv_table, tsv_table
from prefopt.data.unpack import packing, unpacked
from prefopt.disk import Spool
from prefopt.errors import DataError

STDIN_HELD = 2**26
"""Bytes of standard input that are held in memory: 64 MiB."""

Reader = Callable[[IO[bytes], str], Iterable[Row | Dropped]]

READERS: dict[str, Reader] = {
    ".jsonl": json_lines,
    ".json": json_array,
    ".csv": csv_table,
    ".tsv": tsv_table,
    ".parquet": parquet,
    ".xlsx": spreadsheet,
}
"""How a file is read, by the end of its name; what packs it may stand behind that."""

NEVER_PACKED = (".xlsx",)
"""Packed by themselves."""


@dataclass(frozen=True, slots=True)
class Source:
    """One file, stream or dataset whose content is at hand, but not parsed yet.

    Attributes:
        name: short, for places and messages.
        digest: of its content: the same rows, the same digest.
        parse: its rows, good or broken, in order; as often as it is asked.
        data_format: of its rows, where it was given for this source.
        times: how often each of its examples comes in an epoch, on average.
    """

    name: str
    digest: str
    parse: Callable[[], Iterable[Row | Dropped]]
    data_format: str | None = None
    times: float = 1.0

    def stream(self) -> Iterator[Row | Dropped]:
        """All its rows, one after another.

        Raises:
            DataError: it is damaged, or has no rows.
        """
        is_empty = True
        for row in self.parse():
            is_empty = False
            yield row
        if is_empty:
            raise DataError(f"{self.name} has no rows. Give a file with at least one example.")

    def rows(self) -> list[Row | Dropped]:
        """All its rows at once.

        Raises:
            DataError: as `stream`.
        """
        return list(self.stream())


def data_suffix(path: Path) -> str | None:
    """The suffix that tells how to read a file, without that of its packing; None where it is not ours."""
    ending = packing(path.name)
    suffix = (Path(path.name[: -len(ending)]) if ending else path).suffix.lower()
    return suffix if suffix in READERS and not (ending and suffix in NEVER_PACKED) else None


def read_file(path: Path, suffix: str, name: str) -> Source:
    """All rows of a file, which is read once for its digest, and again for its rows.

    Raises:
        DataError: it cannot be read or is damaged.
    """
    try:
        with path.open("rb") as file:
            digest = file_digest(file, "sha256").hexdigest()
            state = state_of(file)
    except OSError as error:
        raise DataError(f"{clip(str(path))} cannot be read: {error.strerror}.") from None
    if not state[0]:
        raise DataError(f"{clip(str(path))} is empty. Give a file with at least one example.")
    return Source(name, digest, lambda: file_rows(path, suffix, name, state))


def file_rows(path: Path, suffix: str, name: str, state: tuple[int, int]) -> Iterator[Row | Dropped]:
    """The rows of a file that is still as it was.

    Raises:
        DataError: it is damaged, or has changed.
    """
    reader = READERS[suffix]
    try:
        with path.open("rb") as file:
            yield from reader(unpacked(file, str(path)), name)
            if state_of(file) != state:
                raise DataError(f"{clip(str(path))} was changed while it was read. Start again when it is whole.")
    except OSError as error:
        raise DataError(f"{clip(str(path))} cannot be read: {error.strerror}.") from None


def state_of(file: IO[bytes]) -> tuple[int, int]:
    """What changes with a file: its size, and when it was written to."""
    found = os.fstat(file.fileno())
    return found.st_size, found.st_mtime_ns


def read_stdin(name: str) -> Source:
    """JSON lines from standard input; what is long is kept on the disk meanwhile.

    Raises:
        DataError: nothing is piped in.
    """
    if sys.stdin is None or sys.stdin.isatty():
        raise DataError(
            "`-` reads JSON lines from standard input, and nothing is piped in. Try: cat pairs.jsonl | prefopt train dpo --data - ..."
        )
    kept = Spool(STDIN_HELD)
    digest = sha256()
    while part := sys.stdin.buffer.read(2**20):
        digest.update(part)
        try:
            kept.write(part)
        except OSError as error:
            raise DataError(
                f"standard input cannot be kept in {gettempdir()} ({error.strerror}). Write it to a file, and give that."
            ) from None
    if not kept.file.tell():
        raise DataError("standard input is empty. Pipe JSON lines into the command.")

    def rows() -> Iterator[Row | Dropped]:
        kept.file.seek(0)
        return json_lines(kept.file, name)

    return Source(name, digest.hexdigest(), rows)
