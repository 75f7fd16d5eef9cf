"""Spreadsheets (.xlsx): the cells as they were last saved, a header above them. Nothing in a file is computed or run."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from datetime import date, datetime, time
from importlib import import_module
from typing import IO, Any

from prefopt.data.readers import encodable
from prefopt.data.rows import Dropped, Row, clip
from prefopt.errors import DataError

INSTALL = 'pip install "prefopt[xlsx]"'


def spreadsheet(file: IO[bytes], name: str) -> Iterator[Row | Dropped]:
    """The rows of a workbook's only sheet with rows, located by their number there; blank rows are none.

    Raises:
        DataError: the library that reads it is missing, it is damaged, or several of its sheets hold rows.
    """
    library = openpyxl()
    try:
        with closing(library.load_workbook(file, read_only=True, data_only=True, keep_links=False)) as book:
            sheets = [sheet for sheet in book.worksheets if next(filled_rows(sheet), None) is not None]
            if len(sheets) > 1:
                names = ", ".join(clip(sheet.title) for sheet in sheets)
                raise DataError(f"{name} has several sheets with rows ({names}). Save the one that you mean as a file of its own.")
            if sheets:
                yield from sheet_rows(filled_rows(sheets[0]), name)
    except DataError:
        raise
    except Exception as error:  # the library raises whatever its parts raise: zip, XML, numbers, missing keys
        fault = clip(str(error).strip().partition("\n")[0]) or type(error).__name__
        raise DataError(f"{name} is not a whole spreadsheet of the kind .xlsx ({fault}). Copy or save it again.") from None


def openpyxl() -> Any:
    """The library.

    Raises:
        DataError: it is not installed; names the command.
    """
    try:
        return import_module("openpyxl")
    except ImportError:
        raise DataError(f"reading .xlsx needs openpyxl, which is not installed: {INSTALL}, or save the sheet as CSV.") from None


def filled_rows(sheet: Any) -> Iterator[tuple[int, Sequence[Any]]]:
    """The number and the cells of each row that holds anything."""
    for number, cells in enumerate(sheet.iter_rows(values_only=True), start=1):
        if any(cell is not None for cell in cells):
            yield number, cells


def sheet_rows(rows: Iterator[tuple[int, Sequence[Any]]], name: str) -> Iterator[Row | Dropped]:
    """The rows below the header; cells behind the last column that has a name must be empty.

    Raises:
        DataError: a column is named twice.
    """
    _, first = next(rows)
    header = ["" if cell is None else str(cell) for cell in first]
    while not header[-1]:
        header.pop()
    if twice := sorted({column for column in header if header.count(column) > 1}):
        raise DataError(f"{name}: the header names {', '.join(map(clip, twice))} more than once. Give distinct column names.")
    for number, cells in rows:
        location = f"{name}:row {number}"
        values = [value_of(cell) for cell in cells]
        if any(value is not None for value in values[len(header) :]):
            yield Dropped(location, "wrong_cells", f"a cell has a value behind the {len(header)} columns of the header", values)
            continue
        row = dict(zip(header, [*values, *[None] * len(header)], strict=False))
        broken = next((column for column, value in row.items() if isinstance(value, str) and not encodable(value)), None)
        if broken is not None:
            yield Dropped(location, "not_utf8", f"`{clip(broken)}` holds a lone surrogate", row)
        else:
            yield Row(location, row)


def value_of(cell: Any) -> Any:
    """A cell in terms of JSON: whole numbers as such (a sheet knows only floats), dates as text."""
    if isinstance(cell, float) and cell.is_integer() and abs(cell) < 2**53:
        return int(cell)
    return cell.isoformat() if isinstance(cell, datetime | date | time) else cell
