"""The settings of a method's run: what every run has, and what the method adds.

The command line, YAML files, `prefopt.train` and the settings page all read the class that is put together here.
"""

from functools import cache
from typing import Any

from pydantic import create_model

from prefopt.config import Settings, nearest, printable
from prefopt.data.settings import ConversationSettings, PairSettings
from prefopt.errors import ConfigError
from prefopt.methods.method import Method, MethodSettings, Needs
from prefopt.methods.table import ALSO_CALLED, METHODS
from prefopt.models.settings import ReferenceSettings
from prefopt.training.settings import RunSettings


def method_named(name: str) -> type[Method]:
    """The method of that name.

    Raises:
        ConfigError: there is none; names the nearest, and all.
    """
    for row in METHODS:
        if row.name == name:
            return row.load()
    names = [row.name for row in METHODS]
    if known := ALSO_CALLED.get(name.lower().replace("_", "-") if isinstance(name, str) else ""):
        raise ConfigError(f"{name}: is called {known} here. Methods: {', '.join(names)}.")
    raise ConfigError(f"{printable(name)}: no such method{nearest(name, names)}. Methods: {', '.join(names)}.")


def groups_for(needs: Needs) -> tuple[type[Settings], ...]:
    """The groups of settings that a method's needs bring along: one that nothing would read is not there to be given."""
    return (
        *((ReferenceSettings,) if needs.reference else ()),
        *((ConversationSettings,) if needs.completions == "demonstration" else ()),
        *((PairSettings,) if needs.completions == "pair" else ()),
    )


def reference_settings(settings: RunSettings) -> ReferenceSettings:
    """The run's settings about the reference; the defaults where it was started without."""
    return settings if isinstance(settings, ReferenceSettings) else ReferenceSettings()


def as_reference(settings: RunSettings, name: str) -> RunSettings:
    """The settings by which another model is loaded as the reference."""
    return settings.model_copy(update={"model": name, "adapter": None, "lora_rank": 0, "gradient_checkpointing": "off"})


def of_others(name: str) -> str:
    """' (a setting of …)' where runs of some methods have such a setting, else nothing."""
    having = [row.name for row in METHODS if name in settings_for(row.load()).model_fields]
    return f" (a setting of {', '.join(having)})" if having else ""


class _OfOneMethod(Settings):
    """Says of a setting that other methods have which these are."""

    @classmethod
    def hint(cls, name: str) -> str:
        """As of all settings, otherwise."""
        return of_others(name) or super().hint(name)


@cache
def settings_around(needs: Needs) -> type[RunSettings]:
    """The settings of a run whose method was made beforehand, with settings of its own."""
    bases: Any = (RunSettings, *groups_for(needs))
    around: type[RunSettings] = create_model("MethodRunSettings", __base__=bases, __doc__="Settings of a run, but for its method's own.")
    return around


@cache
def settings_for(method: type[Method]) -> type[RunSettings]:
    """The class of settings for runs of that method: a `RunSettings` with the method's own fields and checks.

    Raises:
        TypeError: the method has a setting whose name every run has already; one of the two would be silently ignored.
    """
    own = method.settings_class
    groups = groups_for(method.needs)
    shared: list[type[Settings]] = [RunSettings, *groups]
    taken = {name for group in shared for name in group.model_fields}
    if clash := sorted(own.model_fields.keys() & taken):
        raise TypeError(f"{method.__name__} has settings that every run has: {', '.join(clash)}. Give them other names.")
    bases: Any = (_OfOneMethod, RunSettings, *groups, own)
    combined: type[RunSettings] = create_model(
        f"{method.__name__}RunSettings", __base__=bases, __doc__=f"Settings of a run of {method.name}."
    )
    return combined


def own_settings(method: type[Method], settings: RunSettings) -> MethodSettings:
    """What belongs to the method among the settings of its run."""
    return method.settings_class.model_validate({name: getattr(settings, name) for name in method.settings_class.model_fields})
