"""One run at a time in a folder.

A run that its user believes dead may still be going on, on this machine or, on a shared disk, on another. A second one in the
same folder, above all one with --resume, would write between its lines. So the main process of a run holds a lock on a
file in the folder. It is the kernel's, not the file's existence: whatever ends the process, `kill -9` included, lets go of it.
"""

import errno
import fcntl
import json
import os
import platform
import warnings
from contextlib import suppress
from pathlib import Path

from prefopt.errors import RunError

NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}
"""What disks answer that have no locks: some network and cluster ones, or as they are mounted."""


class Lock:
    """The lock on a folder's file `.lock`, taken.

    Args:
        path: of the file; it is there while the lock is held, and left behind by a process that was killed.

    Raises:
        RunError: another process has it: says which.
        OSError: the file cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = self._take()

    def _take(self) -> int:
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = _read(descriptor)
                os.close(descriptor)
                raise RunError(
                    f"another run is going on in {self.path.parent}{holder}. Wait for its end, stop it, or give another folder as out."
                ) from None
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    os.close(descriptor)
                    raise
                warnings.warn(
                    f"{self.path.parent} is on a disk that has no locks ({error.strerror}): see to it that no other run uses it",
                    stacklevel=2,
                )
            # Who let go of it in the meantime has removed the file: a lock on that one would keep nobody out.
            with suppress(OSError):
                if os.fstat(descriptor).st_ino == self.path.stat().st_ino:
                    self._sign(descriptor)
                    return descriptor
            os.close(descriptor)

    def _sign(self, descriptor: int) -> None:
        with suppress(OSError):  # a full disk: the lock holds without a name on it
            os.ftruncate(descriptor, 0)
            os.write(descriptor, json.dumps({"pid": os.getpid(), "host": platform.node()}).encode())

    def release(self) -> None:
        """Let go of it; the file goes too."""
        with suppress(OSError):
            self.path.unlink()
        os.close(self.descriptor)


def _read(descriptor: int) -> str:
    """Who holds the lock, in words."""
    try:
        holder = json.loads(os.pread(descriptor, 1000, 0))
        return f" (process {holder['pid']} on {holder['host']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
