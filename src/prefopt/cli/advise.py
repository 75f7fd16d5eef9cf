"""`prefopt advise`: look at data, and say which method, with which settings, and why."""

from prefopt.cli.flags import settings_app
from prefopt.pipeline.advise.settings import AdviseSettings

NARROWEST = 60
"""Columns that lines are wrapped to at least."""


def run(settings: AdviseSettings) -> None:
    """Look, decide and say it."""
    import sys

    from rich.text import Text

    from prefopt.errors import PrefoptError
    from prefopt.pipeline.advise.page import WIDTH
    from prefopt.pipeline.advise.run import find
    from prefopt.report.text import visible
    from prefopt.training.terminal.narrator import console_on
    from prefopt.training.terminal.outlet import Outlet

    advice, unwritten = find(settings), None
    try:
        advice = advice.write()
    except PrefoptError as error:  # the advice took long, and is told all the same
        unwritten = error
    console = console_on(Outlet(sys.stdout))
    for line in advice.lines(max(NARROWEST, min(WIDTH, console.width)) if console.is_terminal else WIDTH):
        console.print(Text(visible(line), style="" if line.startswith(" ") else "bold"))
    if unwritten is not None:
        raise unwritten


app = settings_app(
    "advise",
    AdviseSettings,
    run,
    usage="advise FILE... [--model MODEL] [--write advice.yaml] [FLAGS]",
    positional="data",
    without=("on_bad_row",),
)
