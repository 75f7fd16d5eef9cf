"""The command line as a test calls it: in this process, with the streams of a terminal that takes UTF-8 and nothing else."""

import io
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from prefopt.cli import main


@dataclass(frozen=True)
class Said:
    """What a command line came to."""

    code: int
    out: str
    err: str

    def check(self) -> "Said":
        """Whether it is an end that a user can understand: done, or a sentence about what to mend."""
        assert self.code in (0, 2), self.err
        assert "Traceback" not in self.err
        if self.code == 2:
            assert self.err.splitlines()[-1]
            assert any(line.startswith("prefopt: ") for line in self.err.splitlines()), self.err
        return self


def prefopt(*words: str) -> Said:
    """Run `prefopt WORDS`."""
    with pytest.MonkeyPatch.context() as patch:
        streams = {}
        for name, errors in (("stdout", "strict"), ("stderr", "backslashreplace")):
            streams[name] = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors=errors, write_through=True)
            patch.setattr(sys, name, streams[name])
        code = main(list(words))
        out, err = (stream.buffer.getvalue().decode() for stream in streams.values())
    return Said(code, out, err)


def refused(*words: str) -> str:
    """What `prefopt WORDS` says when it refuses."""
    said = prefopt(*words).check()
    assert said.code == 2, said.out
    return said.err


def scratch(factory: pytest.TempPathFactory) -> Path:
    """One folder for the files of all examples of a test, apart from those of other tests, which look around their own."""
    folder = factory.getbasetemp() / "scratch" / "files"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
