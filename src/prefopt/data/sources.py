"""What users give as data, made into sources that yield rows: files, folders, standard input, datasets.

Nothing is parsed here beyond telling what is what; `readers` turns bytes into rows.
"""

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from hashlib import file_digest, sha256
from pathlib import Path
from tempfile import gettempdir
from typing import IO, TYPE_CHECKING, Any

from prefopt.data import readers
from prefopt.data.rows import Dropped, Row, ascii_controls, clip
from prefopt.disk import Spool
from prefopt.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

STDIN_HELD = 2**26
"""Bytes of standard input that are held in memory: 64 MiB."""

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?::(?P<rest>[\w.:-]+))?")
SAVED_MARKS = ("state.json", "dataset_dict.json")
STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"
"""How a whole arrow stream ends."""
ALLOWED = (
    "Give a file (.jsonl, .json, .csv, .parquet, each also .gz), a folder of such files, a folder written by datasets' save_to_disk, "
    "`-` for JSON lines on standard input, or a hub name like org/name or org/name:split."
)


@dataclass(frozen=True, slots=True)
class Source:
    """One file, stream or dataset whose content is at hand, but not parsed yet.

    Attributes:
        name: short, for places and messages.
        digest: of its content: the same rows, the same digest.
        parse: its rows, good or broken, in order; as often as it is asked.
    """

    name: str
    digest: str
    parse: Callable[[], Iterable[Row | Dropped]]

    def stream(self) -> Iterator[Row | Dropped]:
        """All its rows, one after another.

        Raises:
            DataError: it is damaged, or has no rows.
        """
        is_empty = True
        for row in self.parse():
            is_empty = False
            yield row
        if is_empty:
            raise DataError(f"{self.name} has no rows. Give a file with at least one example.")

    def rows(self) -> list[Row | Dropped]:
        """All its rows at once.

        Raises:
            DataError: as `stream`.
        """
        return list(self.stream())


@dataclass(frozen=True, slots=True)
class Place:
    """Something to read: how to name it, and how to get its content."""

    name: str
    open: Callable[[str], Source]


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
    if list(given).count("-") > 1:
        raise DataError("standard input (`-`) was given more than once, and can be read once only.")
    places: list[Place] = []
    ignored: list[str] = []
    for item in given:
        try:
            found = find_one(item)
        except (OSError, ValueError) as error:  # no permission, too long for a name, a NUL character
            raise DataError(f"{clip(item)} cannot be looked at: {why(error)}. {ALLOWED}") from None
        places += found.places
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
    raise DataError(f"{clip(item)} does not exist{near_paths(path)}. {ALLOWED}")


def why(error: OSError | ValueError) -> str:
    """What the system says, in a few words."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def read(place: Place) -> Source:
    """The content of one place.

    Raises:
        DataError: it cannot be read, or is empty.
    """
    return place.open(place.name)


def data_suffix(path: Path) -> str | None:
    """The suffix that tells how to read a file, without `.gz`; None where it is not ours."""
    suffix = Path(path.name[: -len(".gz")]).suffix if path.name.lower().endswith(".gz") else path.suffix
    return suffix.lower() if suffix.lower() in SUFFIXES else None


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
        yield Place(distinct, place.open)


def read_file(path: Path, suffix: str, name: str) -> Source:
    """All rows of a file, which is read once for its digest, and again for its rows.

    Raises:
        DataError: it cannot be read or is damaged.
    """
    try:
        with path.open("rb") as file:
            digest = file_digest(file, "sha256").hexdigest()
            state = state_of(file)
    except OSError as error:
        raise DataError(f"{clip(str(path))} cannot be read: {error.strerror}.") from None
    if not state[0]:
        raise DataError(f"{clip(str(path))} is empty. Give a file with at least one example.")
    return Source(name, digest, lambda: file_rows(path, suffix, name, state))


def file_rows(path: Path, suffix: str, name: str, state: tuple[int, int]) -> Iterator[Row | Dropped]:
    """The rows of a file that is still as it was.

    Raises:
        DataError: it is damaged, or has changed.
    """
    reader = READERS[suffix]
    try:
        with path.open("rb") as file:
            packed = path.name.lower().endswith(".gz")
            yield from reader(readers.unzipped(file, str(path)) if packed else file, name)
            if state_of(file) != state:
                raise DataError(f"{clip(str(path))} was changed while it was read. Start again when it is whole.")
    except OSError as error:
        raise DataError(f"{clip(str(path))} cannot be read: {error.strerror}.") from None


READERS = {".jsonl": readers.json_lines, ".json": readers.json_array, ".csv": readers.csv_table, ".parquet": readers.parquet}


def state_of(file: IO[bytes]) -> tuple[int, int]:
    """What changes with a file: its size, and when it was written to."""
    found = os.fstat(file.fileno())
    return found.st_size, found.st_mtime_ns


def read_stdin(name: str) -> Source:
    """JSON lines from standard input; what is long is kept on the disk meanwhile.

    Raises:
        DataError: nothing is piped in.
    """
    if sys.stdin is None or sys.stdin.isatty():
        raise DataError(
            "`-` reads JSON lines from standard input, and nothing is piped in. Try: cat pairs.jsonl | prefopt train dpo --data - ..."
        )
    kept = Spool(STDIN_HELD)
    digest = sha256()
    while part := sys.stdin.buffer.read(2**20):
        digest.update(part)
        try:
            kept.write(part)
        except OSError as error:
            raise DataError(
                f"standard input cannot be kept in {gettempdir()} ({error.strerror}). Write it to a file, and give that."
            ) from None
    if not kept.file.tell():
        raise DataError("standard input is empty. Pipe JSON lines into the command.")

    def rows() -> Iterator[Row | Dropped]:
        kept.file.seek(0)
        return readers.json_lines(kept.file, name)

    return Source(name, digest.hexdigest(), rows)


def from_dataset(name: str, dataset: Any) -> Source:
    """All rows of an object of the `datasets` library, through arrow, so that images or audio are never decoded.

    Raises:
        DataError: it is damaged, or a column is there twice.
    """
    return Source(name, readers.rows_digest(dataset_rows(name, dataset)), lambda: dataset_rows(name, dataset))


def dataset_rows(name: str, dataset: Any) -> Iterator[Row | Dropped]:
    """The rows of a dataset, some at a time.

    Raises:
        DataError: it is damaged, or a column is there twice.
    """
    return readers.table_rows(dataset_batches(name, dataset), name)


def dataset_batches(name: str, dataset: Any) -> "Iterator[pa.RecordBatch]":
    """The batches of a dataset.

    Raises:
        DataError: it is damaged.
    """
    import pyarrow as pa

    try:
        for start in range(0, len(dataset), readers.AT_ONCE):
            table = dataset.with_format("arrow")[start : start + readers.AT_ONCE]
            table.validate(full=True)  # arrow trusts the lengths in a file: where they are wrong, reading a text ends the process
            yield from table.to_batches()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{name} is damaged: {first_line(error)}. Save or download it again.") from None


def saved_path(item: str) -> tuple[Path, str | None]:
    """A saved dataset's folder and the split asked for, from `folder` or `folder:split`."""
    folder, _, split = item.rpartition(":")
    path = at_home(item)
    return (at_home(folder), split) if folder and not path.exists() and is_saved(at_home(folder)) else (path, None)


def at_home(item: str) -> Path:
    """The path, with ~ as the home folder: a shell writes that itself, a YAML file does not."""
    try:
        return Path(item).expanduser()
    except RuntimeError:  # ~ and a name that is no user: then it is a name like another
        return Path(item)


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
        DataError: there is none of that name here or there, or the hub cannot be reached.
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


def looks_local(path: Path) -> bool:
    """Whether a name that is no file was rather meant as one than as a hub name: by its suffix, or by a close name beside it."""
    return data_suffix(path) is not None or (path.parent.is_dir() and "did you mean" in near_paths(path))


def near_paths(path: Path) -> str:
    """' (did you mean …?)' with names in the same folder that are close."""
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except (OSError, ValueError):
        return f" (nor does the folder {clip(str(path.parent))})"
    close = get_close_matches(path.name, names, n=3, cutoff=0.6)
    return f" (did you mean {' or '.join(clip(str(path.parent / name)) for name in close)}?)" if close else ""
