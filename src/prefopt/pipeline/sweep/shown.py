"""A sweep on the terminal: the table, what came of it, and which runs failed."""

import sys

from rich.console import Console
from rich.table import Table
from rich.text import Text

from prefopt.report.sweep.best import sentences
from prefopt.report.sweep.record import SweepRecord
from prefopt.report.sweep.table import Column, best_row, columns, fitting, reasons
from prefopt.report.text import UNIT, visible
from prefopt.training.terminal.narrator import console_on
from prefopt.training.terminal.outlet import Outlet


def show_sweep(record: SweepRecord, console: Console | None = None) -> None:
    """The table and the sentences; by default on standard output, where results belong.

    A terminal that is too narrow gets the columns that matter most; a file gets all.
    """
    console = console or console_on(Outlet(sys.stdout), soft_wrap=False)
    best = best_row(record)
    found = columns(record)
    if console.is_terminal:
        found = fitting(found, lambda kept: width(table_of(kept, best), console) <= console.width)
    table = table_of(found, best)
    if not console.is_terminal:  # a line of a file may be as long as it is
        console.width = max(console.width, width(table, console))
    console.print()
    console.print(table)
    console.print()
    for line in sentences(record):
        console.print(visible(line), markup=False, highlight=False, soft_wrap=not console.is_terminal)
    for label, reason in reasons(record):
        console.print(visible(f"{label}: {reason}"), markup=False, highlight=False, soft_wrap=not console.is_terminal)


def table_of(found: list[Column], best: int | None) -> Table:
    """The columns as rich draws them; the best run stands out, by more than its colour."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in found:
        table.add_column(column.title, justify="right" if column.is_number else "left", no_wrap=True)
    table.add_column("", no_wrap=True)
    for place in range(len(found[0].cells)):
        cells = [visible(column.cells[place]).replace(UNIT, " ") for column in found]
        table.add_row(*(Text(cell) for cell in cells), "<- best" if place == best else "", style="bold" if place == best else "")
    return table


def width(table: Table, console: Console) -> int:
    """How wide the table is, whatever the console has."""
    return console.measure(table, options=console.options.update(width=10_000)).maximum
