"""A stream that words go to, and whose end is no reason for a run to end.

Somebody reads the first lines only (`prefopt train ... 2>&1 | head`), a terminal is closed, a disk with a log is full, a
terminal cannot write the letters of a prompt: training goes on. After the first failure nothing is written any more.
"""

import os
import sys
from contextlib import suppress
from typing import TextIO


class Outlet:
    """Writes to a stream for as long as somebody reads it.

    Args:
        file: the stream.

    Attributes:
        is_closed: nobody reads it any more.
    """

    def __init__(self, file: TextIO) -> None:
        self.file = file
        self.is_closed = False

    @property
    def encoding(self) -> str:
        """Of the stream."""
        return getattr(self.file, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        """Write it; letters that the stream does not know as question marks."""
        if not self.is_closed:
            try:
                try:
                    self.file.write(text)
                except UnicodeEncodeError:  # raised before anything is written
                    self.file.write(text.encode(self.encoding, errors="replace").decode(self.encoding))
            except (OSError, ValueError):  # a ValueError: the stream was closed
                self._close()
        return len(text)

    def flush(self) -> None:
        """Hand on what was written."""
        if not self.is_closed:
            try:
                self.file.flush()
            except (OSError, ValueError):
                self._close()

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        with suppress(OSError, ValueError):
            return bool(self.file.isatty())
        return False

    def fileno(self) -> int:
        """The stream's descriptor.

        Raises:
            OSError: it has none.
        """
        return self.file.fileno()

    def _close(self) -> None:
        """Write nothing more. What is left in a standard stream would fail again when Python shuts down, and become its exit code."""
        self.is_closed = True
        with suppress(OSError, ValueError, AttributeError):
            if (descriptor := self.file.fileno()) in (1, 2) and self.file in (sys.__stdout__, sys.__stderr__):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, descriptor)
                os.close(nowhere)
