"""Bytes into rows: what all readers of text share, and JSON lines; each row has its place.

Lines end at `\n` only: U+0085 and U+2028 occur inside text.
"""

import codecs
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from hashlib import sha256
from typing import IO, Any

from prefopt.data.rows import Dropped, Row, Unreadable, clip
from prefopt.errors import DataError

BOM = b"\xef\xbb\xbf"
OTHER_MARKS = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}
"""How files in other encodings begin; that of UTF-32 first, whose beginning is UTF-16's."""

OTHER_KINDS = {
    b"\x1f\x8b": "packed by gzip: let its name end in .gz",
    b"\x28\xb5\x2f\xfd": "packed by zstandard: let its name end in .zst",
    b"PAR1": "parquet: let its name end in .parquet",
    b"PK\x03\x04": "a zip archive or a spreadsheet: unpack it, or let the name of a spreadsheet end in .xlsx",
}
"""How files begin that hold no text, and what to do with them."""
LONGEST_MARK = 4


def text_of(file: IO[bytes], name: str) -> IO[bytes]:
    """The file behind the mark that some programs put before UTF-8.

    Raises:
        DataError: the mark is that of another encoding, or of a file that holds no text.
    """
    begins = file.read(LONGEST_MARK)
    return io.BufferedReader(Joined(without_mark(begins, name), file), buffer_size=2**16)


class Joined(io.RawIOBase):
    """What was taken from a file, and the rest of it."""

    def __init__(self, begins: bytes, file: IO[bytes]) -> None:
        self._begins = begins
        self._file = file

    def readable(self) -> bool:
        """It can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer, as far as there is anything."""
        part, self._begins = (self._begins[: len(buffer)], self._begins[len(buffer) :]) if self._begins else (b"", b"")
        part = part or self._file.read(len(buffer))
        buffer[: len(part)] = part
        return len(part)


def without_mark(content: bytes, name: str) -> bytes:
    """The text behind the mark that some programs put before UTF-8.

    Raises:
        DataError: the mark is that of another encoding, or of a file that holds no text.
    """
    for mark, advice in OTHER_KINDS.items():
        if content.startswith(mark):
            raise DataError(f"{name} is not text but {advice}.")
    for mark, encoding in OTHER_MARKS.items():
        if content.startswith(mark):
            raise DataError(f"{name} is written in {encoding}, and only UTF-8 is read. Save it as UTF-8.")
    return content.removeprefix(BOM)


def json_lines(file: IO[bytes], name: str) -> Iterator[Row | Dropped]:
    """One object per line; blank lines are no rows.

    Raises:
        DataError: it is in another encoding.
    """
    yield from line_rows(text_of(file, name), name)


def line_rows(lines: Iterable[bytes], name: str, first: int = 1) -> Iterator[Row | Dropped]:
    """The rows of these lines, the first of which has that number."""
    for number, line in enumerate(lines, start=first):
        if not line.isspace():
            yield json_row(line.removesuffix(b"\n"), f"{name}:{number}")


def json_row(line: bytes, location: str) -> Row | Dropped:
    """The row that a line of JSON holds, or why it holds none."""
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        return Dropped(
            location, "not_utf8", f"byte {error.start + 1} is 0x{line[error.start]:02x}, which is not UTF-8 there", printable(line)
        )
    try:
        value = parsed(text)
    except (ValueError, RecursionError) as error:
        return Dropped(location, "invalid_json", f"{json_fault(error)} in {clip(text[:60])}", text)
    return object_row(value, location)


def parsed(text: str) -> Any:
    """The JSON value; an object that gives a key twice is `Unreadable`, where Python's reader lets the last one win.

    Raises:
        ValueError, RecursionError: it is not JSON, or nested too deeply.
    """
    return DECODER.decode(text)


def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any] | Unreadable:
    """The object of these keys and values."""
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
    return Unreadable(f"an object that gives `{clip(twice)}` more than once", [list(pair) for pair in pairs])


DECODER = json.JSONDecoder(object_pairs_hook=object_of)
"""Made once: it costs more than a short line does."""


def object_row(value: Any, location: str) -> Row | Dropped:
    """The row, if it is an object."""
    if isinstance(value, dict):
        return Row(location, value)
    if isinstance(value, Unreadable):
        return Dropped(location, "invalid_json", f"the row is {value.why}", value)
    return Dropped(location, "not_an_object", f"the row is {clip(value)}, and must be an object of columns", value)


def json_fault(error: Exception) -> str:
    """What a JSON parser found, in a line."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at character {error.pos + 1}"
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error).partition(";")[0]


def rows_digest(rows: Iterable[Row | Dropped]) -> str:
    """A digest of rows that have no file."""
    digest = sha256()
    for row in rows:
        value = row.value if isinstance(row, Row) else row.detail
        digest.update(json.dumps(value, sort_keys=True, default=repr).encode())
        digest.update(b"\n")
    return digest.hexdigest()


def encodable(text: str) -> bool:
    """Whether the text has no lone surrogates."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def printable(line: bytes) -> str:
    """Bytes as text, the broken ones escaped."""
    return line.decode(errors="backslashreplace")


def escaped(text: str) -> str:
    """Text with lone surrogates escaped back to the bytes that they stand for."""
    return printable(text.encode(errors="surrogateescape"))
