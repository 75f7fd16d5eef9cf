"""`prefopt methods`: the table of methods, or the page about one."""

from typing import Annotated

from cyclopts import App, Parameter
from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table

from prefopt.cli.method_page import arxiv, learns_from, page_of
from prefopt.methods.table import METHODS
from prefopt.training.assemble import method_named

app = App(name="methods", usage="Usage: prefopt methods [METHOD]")


@app.default
def methods(
    method: Annotated[
        str | None, Parameter(help="Print its page: what it computes, when to use it, its settings.", show_default=False)
    ] = None,
    /,
) -> None:
    """Print the data, the paper and the idea of each method, or all about one."""
    console = Console()
    if method is not None:
        method_named(method)  # is one, or the error says which there are
        console.print(Markdown(page_of(next(row for row in METHODS if row.name == method), in_docs=False)))
        return
    table = Table("method", "learns from", "reference", "paper", "what it does", box=None, pad_edge=False, header_style="bold")
    for row in METHODS:
        loaded = row.load()
        table.add_row(row.name, learns_from(loaded), "yes" if loaded.needs.reference else "no", loaded.paper, row.summary)
    console.print(table)
    console.print(f"\nPapers are {arxiv('NUMBER')}. `prefopt methods METHOD` says more about one.", markup=False, highlight=False)
