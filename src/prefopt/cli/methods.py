"""`prefopt methods`: the table of methods."""

from cyclopts import App
from rich.console import Console
from rich.table import Table

from prefopt.methods.table import METHODS

app = App(name="methods", usage="Usage: prefopt methods")


@app.default
def methods() -> None:
    """Print the name, the data and the idea of each method."""
    table = Table("method", "learns from", "reference", "what it does", box=None, pad_edge=False, header_style="bold")
    for row in METHODS:
        needs = row.load().needs
        table.add_row(row.name, f"{needs.completions}s", "yes" if needs.reference else "no", row.summary)
    Console().print(table)
