"""What a disk has really taken: for whatever appears by a rename, whole or not at all."""

import os
from pathlib import Path


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
