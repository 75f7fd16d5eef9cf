"""Settings: one definition from which the command line, YAML keys, Python arguments and the docs come.

A group of settings is a class that derives from `Settings`; each field is made by `Setting`, with the
sentence that users read. `check` turns loose values into such a class and reports every mistake at once.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping
from difflib import get_close_matches
from os import PathLike, fspath
from pathlib import Path
from typing import Any, TypeVar, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from prefopt.errors import ConfigError

REQUIRED: Any = ...
"""Marks a setting without a default."""

MUST_BE = {
    "bool": "must be on or off",
    "dict": "must be pairs of a name and a value",
    "finite": "must be a finite number",
    "float": "must be a number",
    "int": "must be a whole number",
    "list": "must be a list",
    "path": "must be a path",
    "string": "must be text",
}
"""What is wrong, by the first word of pydantic's error type: shorter and without its vocabulary."""


def Setting(default: Any, *, help: str, **constraints: Any) -> Any:  # noqa: N802 (reads as a field's type)
    """A field of a `Settings` class.

    Args:
        default: its value when nothing is given, or `REQUIRED`.
        help: what it does, in a sentence; shown by `--help` and in the docs.
        constraints: what pydantic's `Field` takes: gt, ge, lt, le, min_length, ...
    """
    return Field(default, description=help, **constraints)


class Settings(BaseModel):
    """Base of all groups of settings: frozen, unknown keys fail, and so do numbers that are not finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, protected_namespaces=(), allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, values: Any) -> Any:
        """Takes one text where a list is meant (`data: pairs.jsonl`), and path objects where a text is."""
        if not isinstance(values, dict):
            return values
        plain = {name: _text(value) for name, value in values.items()}
        lists = {name for name, field in cls.model_fields.items() if get_origin(field.annotation) is list}
        return {name: [value] if name in lists and isinstance(value, str) else value for name, value in plain.items()}


def _text(value: Any) -> Any:
    """A path object as text, also in a list; anything else as it is."""
    if isinstance(value, list | tuple):
        return [_text(item) for item in value]
    return fspath(value) if isinstance(value, PathLike) else value


S = TypeVar("S", bound=Settings)


def check(
    kind: type[S],
    values: Mapping[str, Any],
    *,
    source: str = "the settings",
    spelled: Mapping[str, str] | None = None,
    mistakes: Mapping[str, str] | None = None,
) -> S:
    """The values as settings of that kind.

    Args:
        kind: the class of settings.
        values: name -> value, as text or already of the right type.
        source: where the values come from, for the error's first line.
        spelled: how the user wrote a name, where not as it is: `--batch-size` for `batch_size`.
        mistakes: name -> what the caller already found wrong with it, reported with the others.

    Raises:
        ConfigError: names every mistake with its dotted path, and the nearest key where one is unknown.
    """
    spelled, mistakes = spelled or {}, mistakes or {}
    lines = [f"{spelled.get(name, name)}: {message}" for name, message in mistakes.items()]
    try:
        settings = kind.model_validate({name: value for name, value in values.items() if name not in mistakes})
    except ValidationError as error:
        details = [detail for detail in error.errors(include_url=False) if not detail["loc"] or detail["loc"][0] not in mistakes]
        lines = [describe(detail, kind, spelled) for detail in details] + lines
    else:
        if not lines:
            return settings
    raise ConfigError(report(lines, source))


def report(lines: list[str], source: str) -> str:
    """The message about mistakes: their count, then one line each."""
    count = "1 mistake" if len(lines) == 1 else f"{len(lines)} mistakes"
    return f"{count} in {source}:\n" + "\n".join(f"  {line}" for line in lines)


def describe(detail: ErrorDetails, kind: type[Settings], spelled: Mapping[str, str]) -> str:
    """One mistake as a line: path, what is wrong, what was given, the nearest key."""
    if not detail["loc"]:
        return detail["msg"].removeprefix("Value error, ")
    name, *inner = (str(part) for part in detail["loc"])
    path = ".".join([spelled.get(name, name), *inner])
    if detail["type"] == "extra_forbidden":
        return f"{path}: no such setting{nearest(name, kind.model_fields)}"
    if detail["type"] == "missing":
        field = kind.model_fields.get(name)
        return f"{path}: is required, and was not given" + (f" ({field.description})" if field else "")
    return f"{path}: {wrong(detail)} (given: {shown(detail['input'])})"


def wrong(detail: ErrorDetails) -> str:
    """What is wrong with a value, as the end of a sentence that its name begins."""
    if detail["type"] == "literal_error":
        return f"must be {detail['ctx']['expected'].replace(chr(39), '')}"
    kind, _, rest = detail["type"].partition("_")
    if kind in MUST_BE and rest in ("type", "parsing", "from_float", "number"):
        return MUST_BE[kind]
    message = detail["msg"].removeprefix("Value error, ").replace("Input should", "must")
    message = message.replace("List should", "must").partition(" after validation")[0]
    return message[:1].lower() + message[1:]


def shown(value: Any) -> str:
    """A value as it is quoted in a message: words and numbers bare, the rest as Python writes it, not too long."""
    text = value if isinstance(value, str) and value and value.isprintable() and " " not in value else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def nearest(name: str, known: Iterable[str], written: Callable[[str], str] = str) -> str:
    """' (did you mean …?)' where a known name is close, else nothing; `written` says how names are spelled."""
    close = get_close_matches(name, list(known), n=1)
    return f" (did you mean {written(close[0])}?)" if close else ""


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds, its keys written with underscores.

    Raises:
        ConfigError: the file is missing, not YAML, not a mapping of settings, or gives a key twice.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_OneValuePerKey)
    except OSError as error:
        raise ConfigError(f"cannot read the config {path}: {error.strerror}. Give the path of a YAML file.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"{path} must hold settings as `name: value` lines, and holds {shown(values)}.")
    return underscored(values, source=str(path))


def underscored(values: Mapping[str, Any], *, source: str) -> dict[str, Any]:
    """The values with `batch-size` written as `batch_size`.

    Raises:
        ConfigError: a key is there in both spellings.
    """
    renamed: dict[str, Any] = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name in renamed:
            raise ConfigError(f"{source} gives {name} twice: once with _ and once with -. Keep one.")
        renamed[name] = value
    return renamed


class _OneValuePerKey(yaml.SafeLoader):
    """YAML's safe loader, but a key given twice fails, where YAML lets the last one win without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                raise yaml.constructor.ConstructorError(None, None, f"{key} is given twice", node.value[index][0].start_mark)
        return super().construct_mapping(node, deep=deep)
