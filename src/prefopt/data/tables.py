"""Tables as text: commas, semicolons or tabs between cells, a header above them.

Cells between commas or semicolons may be quoted. Between tabs there are two customs: the registered type of such files knows no
quotes, and spreadsheets write them. Which of the two a file keeps is told by its first lines.
"""

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import IO, Any

from prefopt.data.readers import encodable, escaped, text_of
from prefopt.data.rows import Dropped, Row, clip
from prefopt.errors import DataError

CELL_LIMIT = 2**31 - 1
"""Longest cell; the csv module's own limit of 128 KiB is too short for conversations."""

LOOKED_AT = 100
"""Lines that tell whether cells between tabs are quoted."""


def csv_table(file: IO[bytes], name: str) -> Iterator[Row | Dropped]:
    """A header and rows. Commas separate cells; tabs or semicolons where the header has no comma.

    Raises:
        DataError: no header, a column named twice, or another encoding.
    """
    text = as_text(file, name)
    header = text.readline()
    separator = next((mark for mark in ",\t;" if mark in header), ",")
    if separator == "\t":
        return tab_rows(header, text, name, quoted=True)
    return cell_rows(chain([header] if header else [], text), name, separator)


def tsv_table(file: IO[bytes], name: str) -> Iterator[Row | Dropped]:
    """A header and rows, their cells between tabs.

    Raises:
        DataError: as `csv_table`.
    """
    text = as_text(file, name)
    return tab_rows(text.readline(), text, name, quoted=False)


def as_text(file: IO[bytes], name: str) -> io.TextIOWrapper:
    """The file as text. Broken bytes become lone surrogates, so that the row they stand in can be named instead of the file.

    Raises:
        DataError: it is in another encoding.
    """
    return io.TextIOWrapper(text_of(file, name), encoding="utf-8", errors="surrogateescape", newline="")


def tab_rows(header: str, text: Iterable[str], name: str, *, quoted: bool) -> Iterator[Row | Dropped]:
    """The rows of a table with tabs between its cells.

    Args:
        header: its first line.
        text: the other lines.
        name: of the file.
        quoted: whether cells may be quoted where the first lines do not tell.

    Raises:
        DataError: no header, or a column named twice.
    """
    lines = iter(text)
    first = list(islice(lines, LOOKED_AT))
    quoted = is_quoted([header, *first], otherwise=quoted)
    return cell_rows(chain([header] if header else [], first, lines), name, "\t", quoted=quoted)


def is_quoted(lines: Sequence[str], *, otherwise: bool) -> bool:
    """Whether quotes hold the cells of a table with tabs together, or are characters like others.

    They hold cells together where fewer rows are of another length than the header then; or else where more cells stand in a pair
    of quotes than only begin with one.

    Args:
        lines: the header and the first lines.
        otherwise: what it is where no cell begins with a quote.
    """
    as_plain = [plain_cells(line) for line in lines if line.strip("\r\n")]
    num_columns = len(plain_cells(lines[0]))
    if num_wrong(as_plain, num_columns) > num_wrong(quoted_cells(lines), num_columns):
        return True
    begun = [cell for cells in as_plain for cell in cells if cell.startswith('"')]
    whole = sum(is_quoted_cell(cell) for cell in begun)
    return 2 * whole > len(begun) if begun else otherwise


def num_wrong(rows: Iterable[Sequence[str]], num_columns: int) -> int:
    """How many rows do not have that many cells."""
    return sum(len(cells) != num_columns for cells in rows)


def quoted_cells(lines: Sequence[str]) -> Iterator[list[str]]:
    """The rows of lines whose cells may be quoted; one that breaks the rules of quoting has none."""
    reader = csv.reader(lines, delimiter="\t", strict=True)
    while True:
        try:
            if cells := next(reader):
                yield cells
        except StopIteration:
            return
        except csv.Error:
            yield []


def is_quoted_cell(cell: str) -> bool:
    """Whether quotes hold a whole cell together."""
    return len(cell) > 1 and cell.endswith('"') and '"' not in cell[1:-1].replace('""', "")


def plain_cells(line: str) -> list[str]:
    """The cells of a line without quotes."""
    return line.rstrip("\r\n").split("\t")


class PlainLines:
    """Reads cells between tabs as the csv module reads quoted ones."""

    def __init__(self, lines: Iterable[str]) -> None:
        self._lines = iter(lines)
        self.line_num = 0

    def __iter__(self) -> "PlainLines":
        return self

    def __next__(self) -> list[str]:
        line = next(self._lines)
        self.line_num += 1
        return plain_cells(line) if line.strip("\r\n") else []


def cell_rows(lines: Iterable[str], name: str, separator: str, *, quoted: bool = True) -> Iterator[Row | Dropped]:
    """The rows of lines, the header among them.

    Raises:
        DataError: no header, or a column named twice.
    """
    limit = csv.field_size_limit(CELL_LIMIT)
    taken: list[str] = []
    try:
        noting = noted(lines, taken)
        yield from csv_rows(csv.reader(noting, delimiter=separator, strict=True) if quoted else PlainLines(noting), taken, name)
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
        lines: a csv reader, or one like it.
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
