"""What users give as data, found: files, folders, standard input, datasets, each as a source that yields rows.

Nothing is parsed here beyond telling what is what; `files` and `hub` read.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from prefopt.data.files import Source, data_suffix, read_file, read_stdin
from prefopt.data.given import MOST_TIMES, Given, is_there
from prefopt.data.hub import HUB_NAME, dataset_rows, is_saved, load_hub, load_saved
from prefopt.data.paths import ALLOWED, at_home, near_paths, why
from prefopt.data.readers import rows_digest
from prefopt.data.rows import ascii_controls, clip
from prefopt.errors import DataError


@dataclass(frozen=True, slots=True)
class Place:
    """Something to read: how to name it, how to get its content, and what was given about it."""

    name: str
    open: Callable[[str], Source]
    given: Given = field(default_factory=lambda: Given(""))


@dataclass(frozen=True, slots=True)
class Found:
    """What the given sources come to.

    Attributes:
        places: what to read, in order.
        ignored: what stands in the given folders and is not read, with the reason.
    """

    places: tuple[Place, ...]
    ignored: tuple[str, ...]


def find(given: Sequence[str]) -> Found:
    """What the given paths and names come to, in order.

    Raises:
        DataError: nothing given, a path that does not exist or cannot be looked at, a file of another kind, or a folder
            without data.
    """
    if not given or not all(item.strip() for item in given):
        raise DataError(f"no data was given, or a name that is empty. {ALLOWED}")
    if [item.partition(":")[0] for item in given].count("-") > 1:
        raise DataError("standard input (`-`) was given more than once, and can be read once only.")
    places: list[Place] = []
    ignored: list[str] = []
    for item in given:
        try:
            own = Given.of(item)
            found = find_one(own.name)
        except (OSError, ValueError) as error:  # no permission, too long for a name, a NUL character
            raise DataError(f"{clip(item)} cannot be looked at: {why(error)}. {ALLOWED}") from None
        places += [replace(place, given=own) for place in found.places]
        ignored += found.ignored
    return Found(tuple(with_distinct_names(places, list(given))), tuple(ignored))


def find_one(item: str) -> Found:
    """What one path or name comes to.

    Raises:
        DataError: as `find`.
        OSError, ValueError: the system cannot look at it.
    """
    path, split = saved_path(item)
    if item == "-":
        return Found((Place("stdin", read_stdin),), ())
    if is_saved(path):
        return Found((Place(ascii_controls(item), lambda name: from_dataset(name, load_saved(path, split))),), ())
    if path.is_dir():
        files, others = folder_files(path)
        return Found(tuple(file_place(file) for file in files), tuple(others))
    if path.exists():
        return Found((file_place(path),), ())
    if (match := HUB_NAME.fullmatch(item)) is not None and not looks_local(path):
        return Found((Place(item, lambda name: from_dataset(name, load_hub(match))),), ())
    before, _, behind = item.rpartition(":")
    if before and is_there(before):
        raise DataError(
            f"{clip(before)} is there, and {clip(behind)!r} behind its colon is neither a weight (a number above 0, up to {MOST_TIMES:g}) "
            "nor a format (format=NAME)."
        )
    raise DataError(f"{clip(item)} does not exist{near_paths(path)}. {ALLOWED}")


def read(place: Place) -> Source:
    """The content of one place.

    Raises:
        DataError: it cannot be read, or is empty.
    """
    return replace(place.open(place.name), data_format=place.given.data_format, times=place.given.times)


def folder_files(folder: Path) -> tuple[list[Path], list[str]]:
    """A folder's data files, sorted by name, and what else stands there; hidden files are none (editors and macOS leave them).

    Raises:
        DataError: it holds no data file.
    """
    entries = sorted(folder.iterdir())
    files = [entry for entry in entries if entry.is_file() and not entry.name.startswith(".") and data_suffix(entry) is not None]
    others = [ascii_controls(str(entry)) for entry in entries if entry not in files]
    if not files:
        seen = ", ".join(clip(entry.name) for entry in entries[:10]) or "nothing"
        raise DataError(f"the folder {clip(str(folder))} holds no data file (it holds {seen}). {ALLOWED}")
    return files, others


def file_place(path: Path) -> Place:
    """A file to read.

    Raises:
        DataError: its suffix is not ours, or it is a pipe or a device, which may never end.
    """
    suffix = data_suffix(path)
    if suffix is None:
        raise DataError(
            f"{clip(str(path))}: files that end in {clip(path.suffix) or 'nothing'} are not read. {ALLOWED} "
            "A file of JSON lines can be renamed to .jsonl."
        )
    if not path.is_file():
        raise DataError(f"{clip(str(path))} is a pipe or a device, not a file. Pipe JSON lines into the command, and give `-`.")
    return Place(ascii_controls(path.name), lambda name: read_file(path, suffix, name))


def with_distinct_names(places: list[Place], given: list[str]) -> Iterator[Place]:
    """The places under short names, numbered where two are called the same, so that a row's place is one place."""
    names = [place.name for place in places]
    seen: dict[str, int] = {}
    for place in places:
        seen[place.name] = seen.get(place.name, 0) + 1
        distinct = place.name if names.count(place.name) == 1 else f"{place.name}({seen[place.name]})"
        yield replace(place, name=distinct)


def saved_path(item: str) -> tuple[Path, str | None]:
    """A saved dataset's folder and the split asked for, from `folder` or `folder:split`."""
    folder, _, split = item.rpartition(":")
    path = at_home(item)
    return (at_home(folder), split) if folder and not path.exists() and is_saved(at_home(folder)) else (path, None)


def from_dataset(name: str, dataset: Any) -> Source:
    """All rows of an object of the `datasets` library, through arrow, so that images or audio are never decoded.

    Raises:
        DataError: it is damaged, or a column is there twice.
    """
    return Source(name, rows_digest(dataset_rows(name, dataset)), lambda: dataset_rows(name, dataset))


def looks_local(path: Path) -> bool:
    """Whether a name that is no file was rather meant as one than as a hub name: by its suffix, or by a close name beside it."""
    return data_suffix(path) is not None or (path.parent.is_dir() and "did you mean" in near_paths(path))
