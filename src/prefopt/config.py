"""Settings: one definition from which the command line, YAML keys, Python arguments and the docs come.

A group of settings is a class that derives from `Settings`; each field is made by `Setting`, with the
sentence that users read. `check` turns loose values into such a class and reports every mistake at once.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from os import PathLike, fspath
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator
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

NOT_UNICODE = "must be UTF-8: it holds bytes or surrogates that are no characters"

MOST_VALUES = 100_000
"""Values that a YAML text may come to once its aliases are written out: a config holds hundreds, a malicious one billions."""


def Setting(default: Any, *, help: str, reads: str = "", **constraints: Any) -> Any:  # noqa: N802 (reads as a field's type)
    """A field of a `Settings` class.

    Args:
        default: its value when nothing is given, or `REQUIRED`.
        help: what it does, in a sentence; shown by `--help` and in the docs.
        reads: of a switch, the kind of data that a method reads while it is on, in the place of its own.
        constraints: what pydantic's `Field` takes: gt, ge, lt, le, min_length, ...
    """
    return Field(default, description=help, json_schema_extra={"reads": reads} if reads else None, **constraints)


def readings(kind: type[BaseModel]) -> dict[str, Any]:
    """The switches with which a method reads another kind of data, each with that kind (`Setting`)."""
    extras = {name: field.json_schema_extra for name, field in kind.model_fields.items()}
    return {name: extra["reads"] for name, extra in extras.items() if isinstance(extra, dict) and "reads" in extra}


class Settings(BaseModel):
    """Base of all groups of settings: frozen; unknown keys fail, and so does what would be taken for something else."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, protected_namespaces=(), allow_inf_nan=False)

    @classmethod
    def hint(cls, name: str) -> str:
        """What to say of a name that is no setting here, as the end of a sentence."""
        return nearest(name, cls.model_fields)

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, values: Any) -> Any:
        """Takes one text where a list is meant (`data: pairs.jsonl`), and path objects where a text is."""
        if not isinstance(values, dict):
            return values
        plain = {name: _text(value) for name, value in values.items()}
        lists = {name for name, field in cls.model_fields.items() if get_origin(field.annotation) is list}
        return {name: [value] if name in lists and isinstance(value, str) else value for name, value in plain.items()}

    @field_validator("*", mode="before")
    @classmethod
    def _means_what_it_says(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuses a switch where a number is meant (it would count as 0 or 1), and texts that name nothing."""
        kind = _kind(cls.model_fields[str(info.field_name)].annotation)
        if isinstance(value, bool) and kind in (int, float):
            raise ValueError(MUST_BE[kind.__name__])
        if kind in (str, Path) or get_origin(kind) is list:
            for text in value if isinstance(value, list) else [value]:
                if isinstance(text, str):
                    _check_text(text, is_path=kind is Path)
        if isinstance(value, dict):
            for text in (*value, *value.values()):
                if isinstance(text, str) and not is_unicode(text):
                    raise ValueError(NOT_UNICODE)
        return value


def _text(value: Any) -> Any:
    """A path object as text, also in a list; anything else as it is."""
    if isinstance(value, list | tuple):
        return [fspath(item) if isinstance(item, PathLike) else item for item in value]
    return fspath(value) if isinstance(value, PathLike) else value


def _kind(annotation: Any) -> Any:
    """The type of a setting, without the None that stands for its default."""
    given = [kind for kind in get_args(annotation) if kind is not NoneType]
    return given[0] if NoneType in get_args(annotation) and len(given) == 1 else annotation


def _check_text(text: str, *, is_path: bool) -> None:
    """Refuses texts that name nothing.

    Raises:
        ValueError: empty (it would be taken for the current folder, as from an unset variable of a shell), a NUL character,
            broken characters, or a path in a home folder that is not there.
    """
    if not text.strip():
        raise ValueError("must not be empty")
    if "\0" in text:
        raise ValueError("must not hold a NUL character")
    if not is_unicode(text):
        raise ValueError(NOT_UNICODE)
    if is_path:
        try:
            Path(text).expanduser()
        except RuntimeError:
            raise ValueError("must not begin with ~ and a name that is no user of this machine") from None


def is_unicode(text: str) -> bool:
    """Whether the text has no lone surrogates, which cannot be written to a file."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


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
    if broken := [name for name in values if not isinstance(name, str) or not is_unicode(name)]:
        raise ConfigError(report([f"{printable(name)}: no such setting" for name in broken], source))
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
    if inner[-1:] == ["[key]"]:  # pydantic's mark of a name in a dict, behind that name
        return f"{spelled.get(name, name)}: a name must be text (given: {shown(detail['input'])})"
    path = ".".join(printable(part) for part in [spelled.get(name, name), *inner])
    if detail["type"] == "extra_forbidden":
        return f"{path}: no such setting{kind.hint(name)}"
    if detail["type"] == "missing":
        field = kind.model_fields.get(name)
        return f"{path}: is required, and was not given" + (f" ({field.description})" if field else "")
    hint = "; YAML reads yes, no, on and off as true and false: put them in quotes" if isinstance(detail["input"], bool) else ""
    return f"{path}: {wrong(detail)} (given: {shown(detail['input'])}{hint})"


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
    """A value as it is quoted in a message: words, numbers and switches bare, the rest as Python writes it, not too long."""
    if isinstance(value, bool):
        return str(value).lower()
    try:
        text = value if isinstance(value, str) and value and value.isprintable() and " " not in value else repr(value)
    except RecursionError:
        text = f"a {type(value).__name__} that is nested too deeply"
    return text if len(text) <= 80 else text[:77] + "..."


def printable(name: Any) -> str:
    """A name as it is written in a message: bare, unless a terminal would not show it as it is."""
    return name if isinstance(name, str) and name.isprintable() and 0 < len(name) <= 80 else shown(name)


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
        values = from_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the config {path}: {error.strerror}. Give the path of a YAML file.") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold settings as `name: value` lines, and holds {shown(values)}.")
    return underscored(values, source=str(path))


def underscored(values: Mapping[Any, Any], *, source: str) -> dict[str, Any]:
    """The values with `batch-size` written as `batch_size`.

    Raises:
        ConfigError: a key is not text, or is there in both spellings.
    """
    renamed: dict[str, Any] = {}
    for key, value in values.items():
        if not isinstance(key, str):
            raise ConfigError(f"{source} must hold settings as `name: value` lines, and one of its names is {shown(key)}.")
        name = key.replace("-", "_")
        if name in renamed:
            raise ConfigError(f"{source} gives {printable(name)} twice: once with _ and once with -. Keep one.")
        renamed[name] = value
    return renamed


def from_yaml(text: str) -> Any:
    """What a YAML text holds: texts, numbers, switches, lists and mappings of them, each being what it looks like.

    YAML 1.1 takes 010 for 8, 1:30 for 90 and 2024-01-01 for a date, and 1e-3 for text. Here numbers are decimal (or 0x...),
    and what is no number is text.

    Raises:
        ValueError: not YAML, a key given twice, a tag (!!python/..., !!set, ...), a value that holds itself, nesting too deep,
            or aliases that come to more than `MOST_VALUES` values.
    """
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            _count_values(node, {})
            return None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except yaml.YAMLError as error:  # it quotes the text as it stands there
        raise ValueError("".join(char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in str(error))) from None
    except Exception as error:  # the library's own words are for YAML only: `!!bool maybe` is a KeyError, `!!int` an IndexError
        raise ValueError(f"a value does not fit its tag ({shown(str(error))})") from None


def to_yaml(values: Mapping[str, Any]) -> str:
    """The values as a YAML text from which `from_yaml` reads the same, and so does any other YAML library."""
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


YAML_TAG = "tag:yaml.org,2002:"
PLAIN_FORMS = (
    ("null", "~|null|Null|NULL|", ("~", "n", "N", "")),
    ("bool", "yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF", tuple("yYnNtTfFoO")),
    ("int", "[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F]+", tuple("-+0123456789")),
    (
        "float",
        r"[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)",
        tuple("-+0123456789."),
    ),
    ("merge", "<<", ("<",)),
)
"""What a word without quotes is, if not text: the tag, the form, and the characters that it may begin with."""

PLAIN_TAGS = {YAML_TAG + name for name in ("str", "map", "seq", *(name for name, _, _ in PLAIN_FORMS))}


class _Loader(yaml.SafeLoader):
    """YAML's safe loader with plain forms of our own."""

    yaml_implicit_resolvers = {}


class _Dumper(yaml.SafeDumper):
    """YAML's safe dumper, which puts in quotes what our loader or its own would not read as text."""

    def represent_str(self, text: str) -> yaml.ScalarNode:
        """The text; the line ends that YAML would read as others are escaped."""
        return self.represent_scalar(YAML_TAG + "str", text, style='"' if re.search("[\x85\u2028\u2029]", text) else None)


_Dumper.add_representer(str, _Dumper.represent_str)
for _name, _form, _first in PLAIN_FORMS:
    for _kind_of_yaml in (_Loader, _Dumper):
        _kind_of_yaml.add_implicit_resolver(YAML_TAG + _name, re.compile(f"(?:{_form})$"), _first)


def _count_values(node: yaml.Node | None, known: dict[int, int | None]) -> int:
    """How many values the node comes to, each alias counted as what it stands for.

    Args:
        node: of the text as it was composed, so that an alias is the very node that it stands for.
        known: counts of the nodes seen, by identity; None while a node is being counted.

    Raises:
        yaml.YAMLError: a key given twice, where YAML lets the last one win without a word; a tag; a value that holds itself;
            too many values.
    """
    if node is None:
        return 0
    if id(node) in known:
        if (count := known[id(node)]) is None:
            raise yaml.MarkedYAMLError(problem="a value holds itself", problem_mark=node.start_mark)
        return count
    if node.tag not in PLAIN_TAGS:
        problem = f"the tag {printable(node.tag.replace(YAML_TAG, '!!'))} is not read"
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
    known[id(node)] = None
    count = 1
    keys = set()
    for child in node.value if isinstance(node, yaml.CollectionNode) else ():
        key, *parts = child if isinstance(node, yaml.MappingNode) else (None, child)
        if isinstance(key, yaml.ScalarNode):
            if (key.tag, key.value) in keys:
                raise yaml.MarkedYAMLError(problem=f"{printable(key.value)} is given twice", problem_mark=key.start_mark)
            keys.add((key.tag, key.value))
        count += sum(_count_values(part, known) for part in (key, *parts))
    if count > MOST_VALUES:
        problem = f"it comes to more than {MOST_VALUES:,} values once its aliases are written out"
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
    known[id(node)] = count
    return count
