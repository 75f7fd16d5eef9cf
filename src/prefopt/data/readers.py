"""Bytes into rows: JSON lines, JSON arrays, CSV, parquet, each with the place of every row.

Lines end at `\\n` only: U+0085 and U+2028 occur inside text.
"""

import codecs
import csv
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from itertools import chain
from typing import IO, TYPE_CHECKING, Any

from prefopt.data.rows import Dropped, Row, Unreadable, clip
from prefopt.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

BOM = b"\xef\xbb\xbf"
OTHER_MARKS = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}
"""How files in other encodings begin; that of UTF-32 first, whose beginning is UTF-16's."""

OTHER_KINDS = {
    b"\x1f\x8b": "packed by gzip: let its name end in .gz",
    b"PAR1": "parquet: let its name end in .parquet",
    b"PK\x03\x04": "a zip archive or a spreadsheet: unpack it, or save the sheet as CSV",
}
"""How files begin that hold no text, and what to do with them."""
LONGEST_MARK = 4

AT_ONCE = 1024
"""Rows of a table that are held in memory at a time, beside the part of the file that they stand in."""

CELL_LIMIT = 2**31 - 1
"""Longest CSV cell; the csv module's own limit of 128 KiB is too short for conversations."""


def gunzip(content: bytes, name: str) -> bytes:
    """The unpacked content.

    Raises:
        DataError: it is not gzip, or cut short or damaged.
    """
    try:
        return gzip.decompress(content)
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{name} is not a whole gzip file ({error}). Copy or pack it again.") from None


def unzipped(file: IO[bytes], name: str) -> IO[bytes]:
    """The unpacked content of a gzip file, read as it is asked for; where it is damaged, reading raises a `DataError`."""
    return io.BufferedReader(Unzipped(file, name), buffer_size=2**16)


class Unzipped(io.RawIOBase):
    """A gzip file whose damage is told as users can mend it.

    Args:
        file: as it stands on the disk.
        name: of the file.
    """

    def __init__(self, file: IO[bytes], name: str) -> None:
        self._content = gzip.GzipFile(fileobj=file)
        self._name = name

    def readable(self) -> bool:
        """It can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer, as far as there is anything.

        Raises:
            DataError: it is not gzip, or cut short or damaged.
        """
        try:
            part = self._content.read1(len(buffer))
        except (EOFError, OSError, zlib.error) as error:
            raise DataError(f"{self._name} is not a whole gzip file ({error}). Copy or pack it again.") from None
        buffer[: len(part)] = part
        return len(part)


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
    for number, line in enumerate(text_of(file, name), start=1):
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


def json_array(file: IO[bytes], name: str) -> Iterator[Row | Dropped]:
    """An array of objects, located by their number; or, since some call them .json, lines of objects. All of it is held in memory.

    Raises:
        DataError: it is neither, or in another encoding.
    """
    content = text_of(file, name).read()
    try:
        value = parsed(content.decode())
    except (ValueError, RecursionError) as error:
        first = next((line for line in content.split(b"\n") if line.strip()), b"")
        if isinstance(json_row(first, name), Row):
            yield from json_lines(io.BytesIO(content), name)
            return
        fault = f"it is not UTF-8 at byte {error.start + 1}" if isinstance(error, UnicodeDecodeError) else json_fault(error)
        raise DataError(f"{name} is not valid JSON: {fault}. Allowed are an array of objects, or one object per line.") from None
    if isinstance(value, dict | Unreadable):
        value = [value]
    if not isinstance(value, list):
        raise DataError(f"{name} holds {clip(value)}. Allowed are an array of objects, or one object per line.")
    for number, item in enumerate(value, start=1):
        yield object_row(item, f"{name}:item {number}")


def csv_table(file: IO[bytes], name: str) -> Iterator[Row | Dropped]:
    """A header and rows; quoted cells may hold line ends. Commas separate cells; tabs or semicolons where the header has no comma.

    Raises:
        DataError: no header, a column named twice, or another encoding.
    """
    # Broken bytes become lone surrogates, so that the row they stand in can be named instead of the file.
    text = io.TextIOWrapper(text_of(file, name), encoding="utf-8", errors="surrogateescape", newline="")
    header = text.readline()
    separator = next((mark for mark in ",\t;" if mark in header), ",")
    limit = csv.field_size_limit(CELL_LIMIT)
    taken: list[str] = []
    try:
        lines = csv.reader(noted(chain([header] if header else [], text), taken), delimiter=separator, strict=True)
        yield from csv_rows(lines, taken, name)
    finally:
        csv.field_size_limit(limit)


def noted(lines: Iterable[str], taken: list[str]) -> Iterator[str]:
    """The lines, each also put into `taken`."""
    for line in lines:
        taken.append(line)
        yield line


def csv_rows(lines: Any, taken: list[str], name: str) -> Iterator[Row | Dropped]:
    """The rows of an opened table.

    Args:
        lines: a csv reader.
        taken: the lines of the file that it has taken; emptied before each row.
        name: of the file.

    Raises:
        DataError: no header, or a column named twice.
    """
    try:
        header: list[str] = next(lines, [])
    except csv.Error as error:
        raise DataError(f"{name}: the header cannot be read: {clip(str(error))}. Give a first line of column names.") from None
    twice = {column for column in header if header.count(column) > 1}
    if not any(header) or twice:
        fault = f"the header names {', '.join(map(clip, sorted(twice)))} more than once" if any(header) else "there is no header"
        raise DataError(f"{name}: {fault}. Give a first line of distinct column names.")
    while True:
        location = f"{name}:{lines.line_num + 1}"
        taken.clear()
        try:
            cells = next(lines)
        except StopIteration:
            return
        except csv.Error as error:
            yield Dropped(location, "wrong_cells", f"{clip(str(error))} (up to line {lines.line_num})", escaped("".join(taken)))
            continue
        if not cells:
            continue
        row = dict(zip(header, cells, strict=False))
        broken = next((column for column, cell in row.items() if not encodable(cell)), None)
        if len(cells) != len(header):
            yield Dropped(location, "wrong_cells", f"{len(cells)} cells under {len(header)} columns", [escaped(cell) for cell in cells])
        elif broken is not None:
            yield Dropped(
                location, "not_utf8", f"`{clip(broken)}` holds bytes that are not UTF-8", {key: escaped(cell) for key, cell in row.items()}
            )
        else:
            yield Row(location, row)


def parquet(file: IO[bytes], name: str) -> Iterator[Row | Dropped]:
    """The rows of a parquet file, located by their number.

    Raises:
        DataError: it is damaged.
    """
    return table_rows(parquet_batches(file, name), name)


def parquet_batches(file: IO[bytes], name: str) -> "Iterator[pa.RecordBatch]":
    """The batches of a parquet file; checksums are compared where it has any.

    Raises:
        DataError: it is damaged.
    """
    import pyarrow as pa
    from pyarrow import parquet as pq

    try:
        table = pq.ParquetFile(file if file.seekable() else pa.BufferReader(file.read()), page_checksum_verification=True)
        num_rows = 0
        for batch in table.iter_batches(AT_ONCE):
            batch.validate(full=False)
            num_rows += batch.num_rows
            yield batch
        if num_rows != table.metadata.num_rows:
            raise OSError(f"it holds {num_rows} rows, and says that it holds {table.metadata.num_rows}")
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # the last from a broken name of a column
        raise DataError(f"{name} is not a whole parquet file ({clip(str(error))}). Copy or write it again.") from None


def table_rows(batches: "Iterable[pa.RecordBatch]", name: str) -> Iterator[Row | Dropped]:
    """The rows of arrow batches, located by their number.

    Raises:
        DataError: a column is there twice.
    """
    number = 0
    for batch in batches:
        names = batch.schema.names
        if twice := sorted({column for column in names if names.count(column) > 1}):
            raise DataError(f"{name} has {', '.join(map(clip, twice))} more than once. Give each column a name of its own.")
        for value in arrow_values(batch):
            number += 1
            if isinstance(value, dict):
                yield Row(f"{name}:row {number}", value)
            else:
                yield Dropped(f"{name}:row {number}", "not_utf8", value, None)


def arrow_values(batch: "pa.RecordBatch") -> Sequence[dict[str, Any] | str]:
    """The batch's rows; where one cannot be had as it is, row by row, with the fault in place of a row that is not UTF-8."""
    import pyarrow as pa

    try:
        return list(batch.to_pylist())
    except (ValueError, OverflowError, pa.ArrowException):
        return [arrow_row(batch.slice(index, 1)) for index in range(batch.num_rows)]


def arrow_row(batch: "pa.RecordBatch") -> dict[str, Any] | str:
    """The only row of a batch, or why a text in it cannot be read; cells that Python has no value for are `Unreadable`."""
    import pyarrow as pa

    row: dict[str, Any] = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            row[name] = column[0].as_py()
        except UnicodeDecodeError as error:
            return f"byte {error.start + 1} of `{clip(name)}` is not UTF-8"
        except (ValueError, OverflowError, pa.ArrowException) as error:  # a date beyond the year 9999, an unknown time zone
            row[name] = Unreadable(f"a {column.type} that cannot be read ({clip(str(error))})")
    return row


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
