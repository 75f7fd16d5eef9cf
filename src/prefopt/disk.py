"""Files and folders that appear by a rename, whole or not at all, and what a disk has really taken of them."""

import io
import os
import shutil
import weakref
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO


def draft_of(path: Path) -> Path:
    """Where a file or folder is written, before it appears under its name."""
    return path.parent / f".{path.name}.new"


def old_of(path: Path) -> Path:
    """Where a folder is removed, after it has gone from under its name."""
    return path.parent / f".{path.name}.old"


def write_whole(path: Path, text: str) -> None:
    """Write a file that appears whole or not at all.

    Raises:
        OSError: it cannot be written; what it held is as it was.
    """
    draft = draft_of(path)
    try:
        draft.write_text(text, encoding="utf-8", errors="replace")  # lone surrogates, which a tokenizer may make of broken text
        flush(draft)  # some disks say only now that they are full
        draft.replace(path)
    except OSError:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        raise


def replace_folder(draft: Path, folder: Path) -> None:
    """A finished folder takes its place; what stood there goes only then.

    Raises:
        OSError: it cannot be moved there; what stood there is as it was.
    """
    old = old_of(folder)
    for path in (*draft.rglob("*"), draft):
        flush(path)
    if folder.exists():
        with suppress(OSError):
            remove(old)  # of a process that was killed
        folder.rename(old)
    try:
        draft.rename(folder)
    except OSError:
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise
    flush(folder.parent)
    with suppress(OSError):
        remove(old)


def flush(path: Path) -> None:
    """See to it that a file's content, or a folder's entries, are on the disk.

    What is renamed before that may be empty after a power failure; and some disks say only now that they are full.

    Raises:
        OSError: it could not be written after all.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """A file, a folder with all that it holds, or a link: then what it leads to, which someone has put elsewhere, stays.

    Raises:
        OSError: it, or a part of it, could not be removed. That it is not there is no error.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class Spool:
    """Bytes to be read again: in memory while they are few, then in a temporary file that goes with this object.

    Args:
        held: bytes that are held in memory.
    """

    def __init__(self, held: int) -> None:
        self.held = held
        self.file: IO[bytes] = io.BytesIO()
        """What was written; whoever reads it seeks first."""

    def write(self, part: bytes) -> None:
        """Add to the end.

        Raises:
            OSError: the disk is full, or fails.
        """
        if isinstance(self.file, io.BytesIO) and self.file.tell() + len(part) > self.held:
            held, self.file = self.file, TemporaryFile()  # noqa: SIM115 (closed by the finalizer below)
            weakref.finalize(self, self.file.close)
            self.file.write(held.getbuffer())
        self.file.write(part)
