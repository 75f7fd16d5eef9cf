"""`prefopt train METHOD`: the settings of methods as flags, and what is done with them.

Apart from the group `train`, whose help needs none of the definitions that are imported here.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from cyclopts import App

from prefopt.cli.flags import Given, Panel, command, parse
from prefopt.config import Setting, Settings, underscored
from prefopt.data.settings import DataSettings
from prefopt.errors import ConfigError
from prefopt.methods.method import Method
from prefopt.methods.table import METHODS
from prefopt.models.settings import ModelSettings
from prefopt.training.assemble import groups_for, method_named, of_others, settings_for
from prefopt.training.record.again import Again, is_manifest, read_config
from prefopt.training.settings import RunSettings


class ConfigFlag(Settings):
    """The flag that is no key of the file."""

    config: Path | None = Setting(None, help="YAML file of settings, or manifest.json of a run, to run it again; flags beside it win.")


def shared_panels(defaults: Mapping[str, str] | None = None) -> list[Panel]:
    """The settings that every run has; help shows `defaults` in place of the definitions' own."""
    elsewhere = ModelSettings.model_fields.keys() | DataSettings.model_fields.keys()
    run = {name: info for name, info in RunSettings.model_fields.items() if name not in elsewhere}
    return [
        Panel("Model", ModelSettings.model_fields),
        Panel("Data", DataSettings.model_fields),
        Panel("Run", run | ConfigFlag.model_fields, defaults or {}),
    ]


def own_panel(method: type[Method]) -> Panel:
    """The settings that a method adds, or whose needs add them."""
    own = method.settings_class
    # What is the method's alone stands before the options that it shares with others, and beta before all.
    first = sorted(own.model_fields, key=lambda name: (name != "beta", name not in own.__annotations__))
    fields = {name: own.model_fields[name] for name in first}
    return Panel(
        method.name.upper(),
        fields | {name: info for group in groups_for(method.needs) for name, info in group.model_fields.items()},
        hint=of_others,
    )


def panels(method: type[Method]) -> list[Panel]:
    """The settings of that method's runs."""
    rates = f"{method.rates.full:g}, for an adapter {method.rates.adapter:g}; more for a model below 1e9 parameters"
    return [own_panel(method), *shared_panels({"learning_rate": rates})]


def method_app(name: str) -> App:
    """The command that trains with one method."""
    row = next(row for row in METHODS if row.name == name)
    usage = f"Usage: prefopt train {name} --model DIR_OR_NAME --data FILE... --out DIR [FLAGS]"
    app = App(name=name, help=row.summary, usage=usage, help_epilogue="")  # not the group's
    app.default(command(lambda given: train_with(name, given), panels(row.load())))
    return app


def train_with(name: str, given: Given) -> None:
    """Train with a method, by the flags and the file that they name."""
    given, again = over_file(name, given)
    settings = given.check(settings_for(method_named(name)))
    from prefopt.training.run import train  # loads torch, which takes seconds: only once the settings are right

    train(name, settings, again=again)


def over_file(name: str, given: Given, *, replaced: Collection[str] = (), is_sweep: bool = False) -> tuple[Given, Again | None]:
    """The flags on top of the file that `--config` names; and the run that is to be repeated, where that is a manifest.

    Args:
        name: of the method.
        given: the flags.
        replaced: settings that win over the file and are no flags.
        is_sweep: whether the file may say what is swept.

    Raises:
        ConfigError: the file cannot be read, or is for something else.
    """
    path = given.values.pop("config", None)
    if path is None:
        return given, None
    again = None
    in_file = read_config(Path(path))
    if is_manifest(in_file):
        again = Again(Path(path), in_file, frozenset({*given.values, *replaced}))
        resume = str(given.values.get("resume", "off")).lower() in ("on", "true", "yes", "1")
        in_file = again.settings(out=given.values.get("out"), resume=resume)
    if "stages" in in_file:
        what = "which cannot be swept" if is_sweep else f"not one method: prefopt train --config {path}"
        raise ConfigError(f"{path} runs stages, {what}")
    if "sweep" in in_file and not is_sweep:
        raise ConfigError(f"{path} is for a sweep, not for one run: prefopt sweep --config {path}")
    if (other := in_file.pop("method", name)) != name:
        raise ConfigError(f"{path} is for the method {other}, and the command says {name}. Leave one of the two out.")
    return given.over({key: value for key, value in in_file.items() if key not in replaced}, str(path)), again


def stages_with(values: Mapping[str, Any], words: Sequence[str], *, source: str) -> None:
    """Run the stages of a file, flags on top."""
    names = [str(name) for name in values["stages"]] if isinstance(values["stages"], list) else []
    given = parse(words, [*shared_panels(), *(own_panel(method_named(name)) for name in names)])
    given.refuse_mistakes()
    own = {name: underscored(values[name], source=f"{name} in {source}") for name in names if isinstance(values.get(name), dict)}
    from prefopt.pipeline.stages import run_stages

    run_stages({**values, **own}, given.values)
