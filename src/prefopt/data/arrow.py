"""Arrow batches into rows: parquet files, and what the `datasets` library holds."""

from collections.abc import Iterable, Iterator, Sequence
from typing import IO, TYPE_CHECKING, Any

from prefopt.data.rows import Dropped, Row, Unreadable, clip
from prefopt.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

AT_ONCE = 1024
"""Rows of a table that are held in memory at a time, beside the part of the file that they stand in."""


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
