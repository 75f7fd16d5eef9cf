"""Names that users give: what may be given, and what was perhaps meant."""

from difflib import get_close_matches
from pathlib import Path

from prefopt.data.rows import clip

ALLOWED = (
    "Give a file (.jsonl, .json, .csv, .tsv, .parquet, each also .gz or .zst; .xlsx), a folder of such files, a folder written by "
    "datasets' save_to_disk, `-` for JSON lines on standard input, or a hub name like org/name or org/name:split."
)


def why(error: OSError | ValueError) -> str:
    """What the system says, in a few words."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def at_home(item: str) -> Path:
    """The path, with ~ as the home folder: a shell writes that itself, a YAML file does not."""
    try:
        return Path(item).expanduser()
    except RuntimeError:  # ~ and a name that is no user: then it is a name like another
        return Path(item)


def near_paths(path: Path) -> str:
    """' (did you mean …?)' with names in the same folder that are close."""
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except (OSError, ValueError):
        return f" (nor does the folder {clip(str(path.parent))})"
    close = get_close_matches(path.name, names, n=3, cutoff=0.6)
    return f" (did you mean {' or '.join(clip(str(path.parent / name)) for name in close)}?)" if close else ""
