"""`prefopt train`: one command per row of the method table; without a method, what a YAML file says."""

from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from prefopt.errors import ConfigError
from prefopt.methods.table import METHODS

ABOUT = """`prefopt train METHOD --help` lists the settings of a method. Each flag is also a key of the YAML file, there
written with underscores; a flag given beside the file wins. Without METHOD the file names one, `method: dpo`, or several
that follow each other, `stages: [sft, dpo]`, where a stage's own settings stand under its name."""


def by_file(
    *words: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    config: Annotated[
        Path | None,
        Parameter(
            help="YAML file that names a method or stages, or manifest.json of a run, to run it again; flags beside it win.", negative=()
        ),
    ] = None,
) -> None:
    """Run what a YAML file says: one method, or several stages."""
    from prefopt.cli.flags import parse  # the group's help needs none of this
    from prefopt.cli.train_method import panels, stages_with, train_with
    from prefopt.training.assemble import method_named
    from prefopt.training.record.again import read_config

    if config is None:
        if words and not words[0].startswith("-"):
            method_named(words[0])  # is no method, and says so
        names = ", ".join(row.name for row in METHODS)
        raise ConfigError(f"name a method ({names}) or a YAML file: prefopt train METHOD ..., prefopt train --config run.yaml")
    values = read_config(config)
    if "sweep" in values:
        raise ConfigError(f"{config} is for a sweep, not for one run: prefopt sweep --config {config}")
    if ("method" in values) == ("stages" in values):
        raise ConfigError(f"{config} must say what to run: either `method: dpo`, or `stages: [sft, dpo]`.")
    if "method" in values:
        name = str(values["method"])
        train_with(name, parse(["--config", str(config), *words], panels(method_named(name))))
    else:
        stages_with(values, words, source=str(config))


def __getattr__(name: str) -> Any:
    """A method's command, by the method's name: cyclopts imports it from here when that method is asked for."""
    if any(row.name == name for row in METHODS):
        from prefopt.cli.train_method import method_app

        return method_app(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


app = App(name="train", help_epilogue=ABOUT, usage="Usage: prefopt train METHOD [FLAGS]\n       prefopt train --config run.yaml [FLAGS]")
app.default(by_file)
for place, row in enumerate(METHODS):
    app.command(f"{__name__}:{row.name}", name=row.name, help=row.summary, sort_key=place)
