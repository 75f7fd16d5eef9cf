"""`prefopt sweep`: one method over several values of its settings."""

from typing import Annotated, Any

from cyclopts import App, Parameter

from prefopt.methods.table import METHODS

ABOUT = """`prefopt sweep METHOD --help` lists the settings of a method: all that take one value can be swept but for those that would
leave nothing to compare (the data, the model). Flags and files are those of `prefopt train`; in a file, `sweep: {beta: [0.05, 0.1]}`
says what is swept. Without METHOD it is that of the file, else dpo. A sweep that was interrupted goes on with the same command and
--resume."""


def __getattr__(name: str) -> Any:
    """A method's command, by the method's name, and the one without a method: cyclopts imports them when they are asked for."""
    if any(row.name == name for row in METHODS):
        from prefopt.cli.sweep_method import method_app

        return method_app(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def by_words(
    *words: Annotated[
        str,
        Parameter(
            name="NAME=VALUE,VALUE...",
            metavar="",
            allow_leading_hyphen=True,
            help="A setting and its values, as beta=0.05,0.1,0.3; of several settings, every combination.",
        ),
    ],
) -> None:
    """Train with several values of a setting, and compare the runs on the same held-out examples."""
    from prefopt.cli.sweep_method import without_method  # the group's help needs none of this

    without_method(words)


USAGE = "Usage: prefopt sweep [METHOD] NAME=VALUE,VALUE... --model DIR_OR_NAME --data FILE... --out DIR [FLAGS]"

app = App(name="sweep", help_epilogue=ABOUT, usage=USAGE)
app.default(by_words)
for place, row in enumerate(METHODS):
    app.command(f"{__name__}:{row.name}", name=row.name, help=row.summary, sort_key=place)
