"""Trees on disk, by content: the same rows, settings, template and tokenizer give the same file.

A file (`prefopt.data.store`) whose digest does not match is not used. Writing is atomic. A cache that
cannot be written is no reason to stop, unless the data is too large to be held in memory instead.
"""

import json
import os
import time
import warnings
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefopt.data.store import Damaged, Stored, open_file
from prefopt.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VERSION = 8
"""Raise it whenever the same rows would give other trees or another file."""

TOKENS = "tokens"
"""Folder of the files of trees, in that of all caches."""

KINDS = {TOKENS: "tokens", "reference": "reference values"}
ENDINGS = {TOKENS: (".trees", ".partial"), "reference": (".sqlite", ".damaged")}
"""What the files of the caches are called; others are not ours."""


def cache_folder(given: Path | None) -> Path:
    """The folder of all caches: the setting's, $PREFOPT_CACHE's, or ~/.cache/prefopt."""
    return (given or Path(os.environ.get("PREFOPT_CACHE") or Path.home() / ".cache" / "prefopt")).expanduser()


def key_of(parts: dict[str, Any]) -> str:
    """The name of an entry: a digest of everything that decides it."""
    return sha256(json.dumps({"version": VERSION, **parts}, sort_keys=True, default=str).encode(errors="surrogatepass")).hexdigest()[:40]


def tokenizer_digest(tokenizer: "PreTrainedTokenizerBase") -> str:
    """A digest of how the tokenizer turns text into ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    try:
        # Padding and truncation stand before the tokens: set by the last call that asked for them, they do not touch the ids here.
        rules = backend.to_str().partition('"added_tokens"')[2] if backend is not None else ""
    except Exception:  # a backend with parts in Python cannot be written out
        rules = ""
    about = {
        "class": type(tokenizer).__name__,
        "rules": sha256(rules.encode()).hexdigest() if rules else sorted(tokenizer.get_vocab().items()),
        "added": sorted(tokenizer.get_added_vocab().items()),
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
    }
    return sha256(json.dumps(about, sort_keys=True, default=str).encode(errors="surrogatepass")).hexdigest()


def load(folder: Path, name: str) -> Stored | None:
    """The file of that name, or None where there is none or it is damaged (then with a warning)."""
    path = folder / name
    try:
        found = open_file(path)
    except OSError:
        return None
    except Damaged:
        warnings.warn(f"the cached tokens in {path} are damaged and are made anew", stacklevel=2)
        return None
    with suppress(OSError):
        os.utime(path)  # so that what is in use is not pruned
    return found


def name_of(key: str) -> str:
    """The name of a key's file."""
    return f"{key}.trees"


@dataclass(frozen=True, slots=True)
class Kept:
    """One file of a cache.

    Attributes:
        path: of the file.
        num_bytes: its size.
        idle_days: since a run has used it.
    """

    path: Path
    num_bytes: int
    idle_days: float


def kept(folder: Path, kind: str) -> list[Kept]:
    """The files of one of the caches.

    Raises:
        DataError: the folder cannot be looked at.
    """
    found = []
    try:
        for path in sorted((folder / kind).glob("*") if (folder / kind).is_dir() else ()):
            state = path.stat()
            if path.is_file() and path.suffix in ENDINGS[kind]:
                found.append(Kept(path, state.st_size, (time.time() - state.st_mtime) / 86400))
    except OSError as error:
        raise DataError(f"{folder} cannot be looked at: {error.strerror}. Give the folder of the caches as cache_dir.") from None
    return found


def report(folder: Path) -> list[str]:
    """What the caches hold, a line each."""
    lines = [f"caches in {folder}:"]
    for kind, words in KINDS.items():
        files = kept(folder, kind)
        idle = f", the longest unused for {max(one.idle_days for one in files):.0f} days" if files else ""
        lines.append(f"  {words}: {len(files)} files, {sum(one.num_bytes for one in files) / 1e9:.2f} GB{idle}")
    return lines


def prune(folder: Path, older_than_days: float) -> str:
    """Remove what no run has used for so long; a run that has one of the files open reads it to its end.

    Returns:
        what was done, in words.

    Raises:
        DataError: a file cannot be removed.
    """
    old = [one for kind in KINDS for one in kept(folder, kind) if one.idle_days >= older_than_days]
    for one in old:
        try:
            one.path.unlink(missing_ok=True)
        except OSError as error:
            raise DataError(f"{one.path} cannot be removed: {error.strerror}.") from None
    return f"removed {len(old)} files, {sum(one.num_bytes for one in old) / 1e9:.2f} GB"
