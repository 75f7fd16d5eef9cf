"""What the `datasets` library holds: folders that it saved, and data sets of the hub."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefopt.data.arrow import AT_ONCE, table_rows
from prefopt.data.paths import ALLOWED, near_paths
from prefopt.data.rows import Dropped, Row, clip
from prefopt.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?::(?P<rest>[\w.:-]+))?")
SAVED_MARKS = ("state.json", "dataset_dict.json")
STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"
"""How a whole arrow stream ends."""


def dataset_rows(name: str, dataset: Any) -> Iterator[Row | Dropped]:
    """The rows of a dataset, some at a time.

    Raises:
        DataError: it is damaged, or a column is there twice.
    """
    return table_rows(dataset_batches(name, dataset), name)


def dataset_batches(name: str, dataset: Any) -> "Iterator[pa.RecordBatch]":
    """The batches of a dataset.

    Raises:
        DataError: it is damaged.
    """
    import pyarrow as pa

    try:
        for start in range(0, len(dataset), AT_ONCE):
            table = dataset.with_format("arrow")[start : start + AT_ONCE]
            table.validate(full=True)  # arrow trusts the lengths in a file: where they are wrong, reading a text ends the process
            yield from table.to_batches()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{name} is damaged: {first_line(error)}. Save or download it again.") from None


def is_saved(path: Path) -> bool:
    """Whether `datasets` wrote this folder."""
    return any((path / mark).is_file() for mark in SAVED_MARKS)


def load_saved(path: Path, split: str | None) -> Any:
    """The dataset in a folder written by `save_to_disk`.

    Raises:
        DataError: it is damaged, or has several splits and none was named.
    """
    from datasets import load_from_disk

    try:
        for file in sorted(path.rglob("*.arrow")):
            check_end(file)
        loaded = load_from_disk(str(path))
    except Exception as error:  # the library raises whatever its parts raise
        raise DataError(f"{path} looks like a saved dataset and cannot be read: {first_line(error)}.") from None
    return one_split(loaded, str(path), split)


def load_hub(match: re.Match[str]) -> Any:
    """A dataset of the hub, by `org/name`, `org/name:split` or `org/name:config:split`.

    Raises:
        DataError: there is none of that name, or the hub cannot be reached.
    """
    from datasets import load_dataset

    name = match["name"]
    *config, split = (match["rest"] or "").split(":")
    try:
        loaded = load_dataset(name, *config)
    except Exception as error:  # the library raises whatever its parts raise
        raise DataError(
            f"{match.string} is no file or folder here{near_paths(Path(match.string))}, and the hub gave no dataset of that name: "
            f"{first_line(error)}. Check the name and the network. {ALLOWED}"
        ) from None
    return one_split(loaded, name, split or None)


def check_end(file: Path) -> None:
    """Looks at the end of an arrow file: the library takes one that was cut between two batches for whole.

    Raises:
        OSError: it was cut short, or cannot be read.
    """
    with file.open("rb") as stream:
        stream.seek(-min(len(STREAM_END), file.stat().st_size), os.SEEK_END)
        if stream.read() != STREAM_END:
            raise OSError(f"{file.name} is cut short")


def one_split(loaded: Any, name: str, split: str | None) -> Any:
    """The split that was named, else the only one, else `train`.

    Raises:
        DataError: there is no such split; it lists those there are.
    """
    if not isinstance(loaded, dict):
        if split is not None:
            raise DataError(f"{name} has no splits, and {split} was asked for. Leave `:{split}` away.")
        return loaded
    wanted = split or ("train" if "train" in loaded else next(iter(loaded)) if len(loaded) == 1 else None)
    if wanted not in loaded:
        asked = f"has no split {wanted}" if wanted else "has several splits"
        raise DataError(f"{name} {asked}; there are {', '.join(loaded)}. Write {name}:{next(iter(loaded))}.")
    return loaded[wanted]


def first_line(error: Exception) -> str:
    """The error in a line."""
    return f"{type(error).__name__}: {clip(str(error).strip().partition(chr(10))[0]).rstrip('.')}"
