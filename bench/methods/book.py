"""What was found, a line of JSON each, in a file that several processes add to and that outlives them.

A line is known by what was run (kind, contender, method, seed, settings), so that an edited grid never meets figures of another one.
"""

import json
from collections.abc import Mapping
from fcntl import LOCK_EX, flock
from pathlib import Path
from typing import Any

from bench.versus.contestants import UsageError

Line = dict[str, Any]


class Book:
    """The lines of a file.

    Args:
        path: made when there is something to write.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def lines(self) -> list[Line]:
        """All of them; of two about the same the later one. A line that a process was killed in is none.

        Raises:
            UsageError: the file is no such book.
        """
        found: dict[str, Line] = {}
        texts = self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []
        for text in texts:
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if not isinstance(line, dict) or "kind" not in line:
                raise UsageError(f"{self.path} holds something else than the lines of this bench. Give another file as --out.")
            found[key(line)] = line
        return list(found.values())

    def find(self, wanted: Mapping[str, Any]) -> Line | None:
        """The line about the same, unless that run failed; None: there is none."""
        return next((line for line in self.lines() if key(line) == key(wanted) and "failed" not in line), None)

    def add(self, line: Line) -> None:
        """At the end, whole."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            flock(file, LOCK_EX)
            size = file.seek(0, 2)
            file.seek(max(0, size - 1))
            torn = size and file.read(1) != b"\n"  # a process was killed in the middle of its line
            file.write((b"\n" if torn else b"") + json.dumps(line, sort_keys=True).encode() + b"\n")


def key(line: Mapping[str, Any]) -> str:
    """What was run, in one text."""
    return json.dumps([line.get(name) for name in ("kind", "name", "method", "seed", "settings")], sort_keys=True)
