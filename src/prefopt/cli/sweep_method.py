"""`prefopt sweep METHOD`: the words that say what is swept, and what is done with them.

Apart from the group `sweep`, whose help needs none of the definitions that are imported here.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cyclopts import App

from prefopt.cli.flags import Given, Panel, command, parse
from prefopt.cli.train_method import over_file, panels
from prefopt.config import Setting, Settings, printable, shown, underscored
from prefopt.errors import ConfigError
from prefopt.methods.table import METHODS
from prefopt.pipeline.sweep.plan import SweepSettings, plan_sweep
from prefopt.training.assemble import method_named, settings_for
from prefopt.training.record.again import read_config


class SweepWords(Settings):
    """What is swept, as words."""

    sweep: list[str] = Setting([], help="A setting and its values, as beta=0.05,0.1,0.3; of several settings, every combination.")


def sweep_panels(name: str) -> list[Panel]:
    """The settings of sweeps with that method."""
    most = {"max_runs": SweepSettings.model_fields["max_runs"]}
    return [Panel("Sweep", SweepWords.model_fields | most), *panels(method_named(name))]


def method_app(name: str) -> App:
    """The command that sweeps over settings of one method."""
    row = next(row for row in METHODS if row.name == name)
    usage = f"Usage: prefopt sweep {name} NAME=VALUE,VALUE... --model DIR_OR_NAME --data FILE... --out DIR [FLAGS]"
    app = App(name=name, help=row.summary, usage=usage, help_epilogue="")  # not the group's
    app.default(command(lambda given: sweep_with(name, given), sweep_panels(name), positional="sweep", word="NAME=VALUE,VALUE..."))
    return app


def without_method(words: Sequence[str]) -> None:
    """A sweep whose method is that of the file, else dpo."""
    if words and not words[0].startswith("-") and "=" not in words[0]:
        method_named(words[0])  # is no method, and says so
    path = parse(words, sweep_panels("dpo"), positional="sweep").values.get("config")
    name = str(read_config(Path(path)).get("method", "dpo")) if path else "dpo"
    sweep_with(name, parse(words, sweep_panels(name), positional="sweep"))


def sweep_with(name: str, given: Given) -> None:
    """Sweep with a method, by the words, the flags and the file that they name."""
    swept, mistakes = assignments(given.values.pop("sweep", []), given.values)
    given, again = over_file(
        name, Given(given.values, given.mistakes | mistakes, given.spelled, given.source), replaced=swept, is_sweep=True
    )
    swept = in_file(given.values.pop("sweep", {}), given.source) | swept
    spelled = {key: flag for key, flag in given.spelled.items() if key not in swept or key in given.values}
    plan = plan_sweep(name, swept, given.values, source=given.source, spelled=spelled, mistakes=given.mistakes)
    from prefopt.pipeline.sweep.run import run_sweep  # loads torch, which takes seconds: only once the settings are right

    run_sweep(plan, again=again)


def in_file(swept: Any, source: str) -> dict[str, Any]:
    """What a file says is swept.

    Raises:
        ConfigError: it is no mapping.
    """
    if not isinstance(swept, dict):
        raise ConfigError(f"sweep: must hold settings and their values, as {{beta: [0.05, 0.1]}} (given: {shown(swept)})")
    return underscored(swept, source=f"sweep in {source}")


def assignments(words: Sequence[str], flags: Mapping[str, Any]) -> tuple[dict[str, list[str]], dict[str, str]]:
    """What the words say is swept, by setting; and what is wrong with words.

    A shell cuts `beta=0.05, 0.1` in two: what stands beside a comma belongs together.

    Args:
        words: those that belong to no flag.
        flags: what the flags were given: one that takes several words may have taken what was meant for the sweep.
    """
    whole: list[str] = []
    for word in words:
        if whole and (whole[-1].endswith(",") or word.startswith(",")):
            whole[-1] += word
        else:
            whole.append(word)
    swept: dict[str, list[str]] = {}
    mistakes: dict[str, str] = {}
    for word in whole:
        key, equals, values = word.partition("=")
        name = key.strip().replace("-", "_")
        if not equals or not name:
            is_method = any(row.name == word for row in METHODS)
            mistakes[shown(word)] = (
                "stands first: prefopt sweep METHOD ..." if is_method else "says nothing to sweep, as beta=0.05,0.1 does"
            )
        elif name in swept:
            mistakes[printable(name)] = "is swept twice: give all values at once"
        else:
            swept[name] = [value.strip() for value in values.split(",")]
    for flag, taken in flags.items():
        for word in taken if isinstance(taken, list) else ():
            if is_assignment(word):
                mistakes[shown(word)] = f"stands behind --{flag.replace('_', '-')}, which takes all words up to the next flag: put it first"
    return swept, mistakes


def is_assignment(word: str) -> bool:
    """Whether a word that a flag has taken was meant for the sweep: it names a setting, and no file."""
    key, equals, _ = word.partition("=")
    known = any(key.replace("-", "_") in settings_for(row.load()).model_fields for row in METHODS)
    return bool(equals) and known and not Path(word).exists()
