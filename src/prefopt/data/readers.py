"""Bytes into rows: JSON lines, JSON arrays, CSV, parquet, each with the place of every row.

Lines end at `\\n` only: U+0085 and U+2028 occur inside text.
"""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from prefopt.data.rows import Dropped, Row, clip
from prefopt.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

BOM = b"\xef\xbb\xbf"
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


def json_lines(content: bytes, name: str) -> Iterator[Row | Dropped]:
    """One object per line; blank lines are no rows."""
    for number, line in enumerate(content.removeprefix(BOM).split(b"\n"), start=1):
        if line and not line.isspace():
            yield json_row(line, f"{name}:{number}")


def json_row(line: bytes, location: str) -> Row | Dropped:
    """The row that a line of JSON holds, or why it holds none."""
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        return Dropped(
            location, "not_utf8", f"byte {error.start + 1} is 0x{line[error.start]:02x}, which is not UTF-8 there", printable(line)
        )
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        return Dropped(location, "invalid_json", f"{json_fault(error)} in {clip(text[:60])}", text)
    return object_row(value, location)


def object_row(value: Any, location: str) -> Row | Dropped:
    """The row, if it is an object."""
    if isinstance(value, dict):
        return Row(location, value)
    return Dropped(location, "not_an_object", f"the row is {clip(value)}, and must be an object of columns", value)


def json_fault(error: Exception) -> str:
    """What a JSON parser found, in a line."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at character {error.pos + 1}"
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error).partition(";")[0]


def json_array(content: bytes, name: str) -> Iterator[Row | Dropped]:
    """An array of objects, located by their number; or, since some call them .json, lines of objects.

    Raises:
        DataError: it is neither.
    """
    try:
        value = json.loads(content.removeprefix(BOM).decode())
    except (ValueError, RecursionError) as error:
        first = next((line for line in content.removeprefix(BOM).split(b"\n") if line.strip()), b"")
        if isinstance(json_row(first, name), Row):
            yield from json_lines(content, name)
            return
        fault = f"it is not UTF-8 at byte {error.start + 1}" if isinstance(error, UnicodeDecodeError) else json_fault(error)
        raise DataError(f"{name} is not valid JSON: {fault}. Allowed are an array of objects, or one object per line.") from None
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise DataError(f"{name} holds {clip(value)}. Allowed are an array of objects, or one object per line.")
    for number, item in enumerate(value, start=1):
        yield object_row(item, f"{name}:item {number}")


def csv_table(content: bytes, name: str) -> Iterator[Row | Dropped]:
    """A header and rows, separated by commas (or tabs, where the header has tabs and no comma); quoted cells may hold line ends.

    Raises:
        DataError: no header, or a column named twice.
    """
    # Broken bytes become lone surrogates, so that the row they stand in can be named instead of the file.
    text = content.removeprefix(BOM).decode(errors="surrogateescape")
    header_end = text.find("\n") if "\n" in text else len(text)
    tabs = "\t" in text[:header_end] and "," not in text[:header_end]
    limit = csv.field_size_limit(CELL_LIMIT)
    try:
        lines = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if tabs else ",", strict=True)
        yield from csv_rows(lines, name)
    finally:
        csv.field_size_limit(limit)


def csv_rows(lines: Any, name: str) -> Iterator[Row | Dropped]:
    """The rows of an opened table.

    Raises:
        DataError: no header, or a column named twice.
    """
    try:
        header: list[str] = next(lines, [])
    except csv.Error as error:
        raise DataError(f"{name}: the header cannot be read: {error}. Give a first line of column names.") from None
    twice = {column for column in header if header.count(column) > 1}
    if not any(header) or twice:
        fault = f"the header names {', '.join(map(clip, sorted(twice)))} more than once" if any(header) else "there is no header"
        raise DataError(f"{name}: {fault}. Give a first line of distinct column names.")
    while True:
        location = f"{name}:{lines.line_num + 1}"
        try:
            cells = next(lines)
        except StopIteration:
            return
        except csv.Error as error:
            yield Dropped(location, "wrong_cells", f"{error} (up to line {lines.line_num})", None)
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


def parquet(content: bytes, name: str) -> Iterator[Row | Dropped]:
    """The rows of a parquet file, located by their number.

    Raises:
        DataError: it is damaged.
    """
    import pyarrow as pa
    from pyarrow import parquet as pq

    try:
        yield from table_rows(pq.ParquetFile(pa.BufferReader(content)).iter_batches(), name)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{name} is not a whole parquet file ({clip(str(error))}). Copy or write it again.") from None


def table_rows(batches: "Iterable[pa.RecordBatch]", name: str) -> Iterator[Row | Dropped]:
    """The rows of arrow batches, located by their number."""
    number = 0
    for batch in batches:
        for value in arrow_values(batch):
            number += 1
            if isinstance(value, dict):
                yield Row(f"{name}:row {number}", value)
            else:
                yield Dropped(f"{name}:row {number}", "not_utf8", value, None)


def arrow_values(batch: "pa.RecordBatch") -> Sequence[dict[str, Any] | str]:
    """The batch's rows; where a text in it is not UTF-8, row by row, with the fault in place of the row."""
    try:
        return list(batch.to_pylist())
    except UnicodeDecodeError:
        values: list[dict[str, Any] | str] = []
        for index in range(batch.num_rows):
            try:
                values += batch.slice(index, 1).to_pylist()
            except UnicodeDecodeError as error:
                values.append(f"byte {error.start + 1} of a text is not UTF-8")
        return values


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
