"""Settings in words: types, choices, limits and defaults as users read them, in help pages and docs."""

from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo

METAVARS = {int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH", bool: "on|off"}
TYPES = {int: "whole number", float: "number", str: "text", Path: "path", bool: "on or off"}
LIMITS = {annotated_types.Gt: ">", annotated_types.Ge: "≥", annotated_types.Lt: "<", annotated_types.Le: "≤"}


def flag_of(name: str) -> str:
    """How a setting is written on the command line."""
    return "--" + name.replace("_", "-")


def plain_type(info: FieldInfo) -> Any:
    """The type of a setting, without the None that stands for its default."""
    annotation = info.annotation
    if get_origin(annotation) not in (Union, UnionType):
        return annotation
    given = [kind for kind in get_args(annotation) if kind is not NoneType]
    return given[0] if len(given) == 1 else annotation


def choices_of(info: FieldInfo) -> tuple[str, ...] | None:
    """The values that a setting may have, where they can be counted."""
    kind = plain_type(info)
    return tuple(str(choice) for choice in get_args(kind)) if get_origin(kind) is Literal else None


def choices_or_number(info: FieldInfo) -> tuple[str, ...]:
    """The words that a setting may have in place of a number; none where it is of another kind."""
    kind = plain_type(info)
    if get_origin(kind) not in (Union, UnionType):
        return ()
    words = [part for part in get_args(kind) if get_origin(part) is Literal]
    return tuple(map(str, get_args(words[0]))) if words else ()


def is_switch(info: FieldInfo) -> bool:
    """Whether the flag may stand alone, and then means on."""
    return plain_type(info) is bool or "on" in choices_or_number(info)


def metavar_of(info: FieldInfo) -> str:
    """What stands for a value after a flag."""
    kind = plain_type(info)
    if get_origin(kind) is dict:
        return "NAME=VALUE..."
    if get_origin(kind) is list:
        return f"{METAVARS.get(get_args(kind)[0], 'VALUE')}..."
    if mixed := choices_or_number(info):
        return f"{'|'.join(mixed)}|INT"
    return "CHOICE" if choices_of(info) else METAVARS.get(kind, "VALUE")


def type_of(info: FieldInfo) -> str:
    """The type of a setting, and its limits."""
    kind = plain_type(info)
    if mixed := choices_or_number(info):
        return f"{', '.join(mixed)} or a whole number"
    if choices := choices_of(info):
        return " or ".join([", ".join(choices[:-1]), choices[-1]]) if len(choices) > 1 else choices[0]
    if get_origin(kind) is dict:
        return "pairs of name and value"
    if get_origin(kind) is list and get_origin(get_args(kind)[0]) is Literal:
        return f"any of {', '.join(get_args(get_args(kind)[0]))}"
    if get_origin(kind) is list:
        return f"list of {TYPES.get(get_args(kind)[0], 'values')}s".replace("texts", "text")
    return " ".join([TYPES.get(kind, "value"), limits_of(info)]).strip()


def limits_of(info: FieldInfo) -> str:
    """The range of a number: `> 0, ≤ 1`."""
    limits = [
        (sign, getattr(bound, kind.__name__.lower())) for bound in info.metadata for kind, sign in LIMITS.items() if isinstance(bound, kind)
    ]
    return ", ".join(f"{sign} {number:g}" for sign, number in limits)


def default_of(info: FieldInfo) -> str:
    """The default of a setting as a user would write it; nothing where the help sentence has to tell."""
    default = info.default
    if info.is_required() or default is None or default in ([], {}):
        return ""
    if isinstance(default, bool):
        return "on" if default else "off"
    return f"{default:g}" if isinstance(default, float) else str(default)
