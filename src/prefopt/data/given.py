"""What users write for a source: its name, how often its examples come in an epoch, and its format.

    b.jsonl                        each example once
    b.jsonl:0.3                    three in ten of them, drawn anew for each epoch
    b.jsonl:2.5:format=hh          each twice, and half of them once more; the format is not looked for
    {path: b.jsonl, weight: 0.3}   the same in YAML, where `format` may be there too

A path that is there as it is written is just that, whatever it ends in.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt.config import printable
from prefopt.data.paths import at_home

NUMBER = r"[+-]?(?:(?:\d+(?:\.\d*)?|\.\d+)(?:e[+-]?\d+)?|nan|inf)"
"""All that reads as a number: what is none that a weight can be is refused as a weight, and not sought as a file."""

WRITTEN = re.compile(rf"(?P<name>.+?)(?::(?P<times>(?i:{NUMBER})))?(?::format=(?P<format>\w+))?", re.DOTALL)
KEYS = ("path", "weight", "format")
MOST_TIMES = 1000.0


@dataclass(frozen=True, slots=True)
class Given:
    """A source as it was given.

    Attributes:
        name: of the file, folder, stream or dataset.
        times: how often each of its examples comes in an epoch, on average.
        data_format: of its rows; None: as for all sources.
    """

    name: str
    times: float = 1.0
    data_format: str | None = None

    @classmethod
    def of(cls, text: str) -> "Given":
        """What a text says.

        Raises:
            ValueError: a weight that is not above 0, or too large.
        """
        found = WRITTEN.fullmatch(text)
        if found is None or is_there(text) or not (found["times"] or found["format"]):
            return cls(text)
        times = float(found["times"] or 1)
        if not 0 < times <= MOST_TIMES:
            raise ValueError(f"its weight is {found['times']}, and must be above 0, up to {MOST_TIMES:g}")
        return cls(found["name"], times, found["format"])

    def __str__(self) -> str:
        times = "" if self.times == 1 else f":{self.times:g}"
        return self.name + times + (f":format={self.data_format}" if self.data_format else "")


def is_there(text: str) -> bool:
    """Whether there is a file or a folder of that very name."""
    try:
        return at_home(text).exists()
    except (OSError, ValueError):  # too long for a path
        return False


def as_text(value: Any) -> Any:
    """An entry of a YAML list as the text that says the same; what is no mapping stays as it is.

    Raises:
        ValueError: a key that is not known, no path, or a weight that is no number.
    """
    if not isinstance(value, Mapping):
        return value
    if unknown := [printable(key) for key in value if key not in KEYS]:
        raise ValueError(f"a source has no {', '.join(unknown)}: give {', '.join(KEYS)}")
    path, weight, data_format = (value.get(key) for key in KEYS)
    if not isinstance(path, str | Path) or not str(path).strip():
        raise ValueError("a source given by its parts needs a path")
    if isinstance(weight, bool) or not isinstance(weight, int | float | None) or not 0 < (1 if weight is None else weight) <= MOST_TIMES:
        raise ValueError(f"the weight of {path} must be a number above 0, up to {MOST_TIMES:g} (given: {weight})")
    if data_format is not None and not (isinstance(data_format, str) and data_format.isidentifier()):
        raise ValueError(f"the format of {path} must be the name of one (given: {data_format})")
    return str(path) + ("" if weight is None else f":{weight:.15g}") + (f":format={data_format}" if data_format else "")


def path_and_rest(text: str) -> tuple[str, str]:
    """The path in a text about a source, and what stands behind it: a weight, a format, the split of a saved dataset."""
    if is_there(text):
        return text, ""
    try:
        name = Given.of(text).name
    except ValueError:
        name = text
    folder = name.rpartition(":")[0]
    name = folder if folder and not is_there(name) and is_there(folder) else name
    return name, text[len(name) :]
