"""The generated pages of the docs: `python -m prefopt.cli.pages` writes them, with `--check` it only compares.

docs/settings.md   every setting of every method
docs/cli.md        what `--help` shows, command by command
docs/choosing.md   the rules by which a method is advised
docs/methods/      a page about every method, and the list of them
"""

import sys
from collections.abc import Callable
from functools import partial
from io import StringIO
from pathlib import Path

from rich.console import Console

from prefopt.cli.choosing_page import choosing_page
from prefopt.cli.entry import COMMANDS, main
from prefopt.cli.method_page import index_page, page_of, settings_table
from prefopt.cli.train_method import ConfigFlag, own_panel, shared_panels
from prefopt.methods.table import METHODS, MethodRow

WIDTH = 100
ABOUT = """Each is a key of the YAML file, an argument of `prefopt.train` and a flag: `batch_size` is `--batch-size` on the command
line. A setting that has no default and is not required says what happens when it is left out.
"""
MADE = "<!-- Written by `make docs` from the definitions in src/; change those, not this page. -->\n"


def settings_page() -> str:
    """Every setting: of all runs, then of each method."""
    parts = [
        MADE,
        "# Settings\n",
        ABOUT,
    ]
    for panel in shared_panels():
        fields = {name: info for name, info in panel.fields.items() if name not in ConfigFlag.model_fields}
        parts += [f"## {panel.title}\n", settings_table(fields)]
    parts.append("## Methods\n\nWhat each method adds to the settings above.\n")
    for row in METHODS:
        method = row.load()
        rates = (
            f"Learning rate, where none is given: {method.rates.full:g}, for an adapter {method.rates.adapter:g}; "
            "more for a model below 1e9 parameters.\n"
        )
        fields = dict(own_panel(method).fields)
        parts += [
            f"### {row.name}\n",
            f"{row.summary} [More](methods/{row.name}.md).\n",
            rates,
            settings_table(fields) if fields else "No settings of its own.\n",
        ]
    return "\n".join(parts)


def cli_page() -> str:
    """The help of every command."""
    commands = [(), *((name,) for name in COMMANDS), *(("train", row.name) for row in METHODS)]
    parts = [MADE, "# Command line\n"]
    for words in commands:
        parts += [f"## `{' '.join(['prefopt', *words])}`\n", f"```text\n{help_of(*words)}\n```\n"]
    return "\n".join(parts)


def help_of(*words: str) -> str:
    """What `prefopt ... --help` prints, at the pages' width and without colours."""
    page = StringIO()
    console = Console(file=page, width=WIDTH, color_system=None, force_terminal=False, legacy_windows=False)
    if main([*words, "--help"], console=console):
        raise RuntimeError(f"prefopt {' '.join(words)} --help failed")
    return "\n".join(line.rstrip() for line in page.getvalue().strip().splitlines())


def makers() -> dict[Path, Callable[[], str]]:
    """Every generated page: its path in the checkout, and what makes it (the help of all commands takes seconds)."""
    return {
        Path("docs/settings.md"): settings_page,
        Path("docs/cli.md"): cli_page,
        Path("docs/choosing.md"): lambda: f"{MADE}\n{choosing_page()}",
        Path("docs/methods/README.md"): lambda: f"{MADE}\n{index_page()}",
        **{Path(f"docs/methods/{row.name}.md"): partial(method_page, row) for row in METHODS},
    }


def method_page(row: MethodRow) -> str:
    """The page about one method."""
    return f"{MADE}\n{page_of(row)}"


def write(*, only_check: bool) -> int:
    """Write the pages that differ from what they should hold, or only name them; the exit code."""
    made = {path: make() for path, make in makers().items()}
    stale = [path for path, text in made.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        if not only_check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(made[path], encoding="utf-8")
        print(f"{path} {'is stale: run make docs' if only_check else 'written'}")
    return 1 if only_check and stale else 0


if __name__ == "__main__":
    sys.exit(write(only_check="--check" in sys.argv[1:]))
