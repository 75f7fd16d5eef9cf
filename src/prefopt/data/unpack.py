"""Packed files, unpacked as they are read: gzip and zstandard."""

import gzip
import io
import zlib
from collections.abc import Callable
from typing import IO, Any

from prefopt.errors import DataError

AT_ONCE = 2**16


def gunzipped(file: IO[bytes]) -> Callable[[int], bytes]:
    """Gives the content of a gzip file, at most so many bytes at a time."""
    return gzip.GzipFile(fileobj=file).read1


def unzstd(file: IO[bytes]) -> Callable[[int], bytes]:
    """The same of a zstandard file, of one frame or several."""
    import pyarrow as pa  # which brings zstandard along

    stream = pa.CompressedInputStream(Left(file), "zstd")

    def read(size: int) -> bytes:
        return bytes(stream.read(size))

    return read


class Left(io.RawIOBase):
    """A file that is left open by who reads it: arrow closes what it was given."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def readable(self) -> bool:
        """It can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer, as far as there is anything."""
        part = self._file.read(len(buffer))
        buffer[: len(part)] = part
        return len(part)


PACKED: dict[str, tuple[str, Callable[[IO[bytes]], Callable[[int], bytes]]]] = {
    ".gz": ("gzip", gunzipped),
    ".zst": ("zstandard", unzstd),
}
"""How the names of packed files end, what packed them, and how they are read."""


def packing(name: str) -> str | None:
    """The ending of a packed file's name; None where it is not packed."""
    return next((ending for ending in PACKED if name.lower().endswith(ending)), None)


def unpacked(file: IO[bytes], name: str) -> IO[bytes]:
    """The content of a file, which its name says is packed or not, read as it is asked for.

    Where a packed file is damaged, reading raises a `DataError`.
    """
    ending = packing(name)
    return file if ending is None else io.BufferedReader(Unpacked(file, name, ending), buffer_size=AT_ONCE)


def unpacked_bytes(content: bytes, name: str) -> bytes:
    """The same at once.

    Raises:
        DataError: it is not what its name says, or cut short or damaged.
    """
    return unpacked(io.BytesIO(content), name).read()


class Unpacked(io.RawIOBase):
    """A packed file whose damage is told as users can mend it.

    Args:
        file: as it stands on the disk.
        name: of the file.
        ending: of its name, one of `PACKED`.
    """

    def __init__(self, file: IO[bytes], name: str, ending: str) -> None:
        self._name = name
        self._packer, read = PACKED[ending]
        self._read = read(file)

    def readable(self) -> bool:
        """It can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer, as far as there is anything.

        Raises:
            DataError: it is not what its name says, or cut short or damaged.
        """
        try:
            part = self._read(len(buffer))
        except (EOFError, OSError, zlib.error) as error:
            raise DataError(f"{self._name} is not a whole {self._packer} file ({error}). Copy or pack it again.") from None
        buffer[: len(part)] = part
        return len(part)
