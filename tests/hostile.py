"""Files that would run code if they were opened the wrong way: each leaves a mark, a file in the test's own folder."""

import pickle
from pathlib import Path
from typing import Any


class Leaves:
    """Pickled, it writes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


def poison(path: Path, mark: Path) -> None:
    """A pickle that leaves the mark, and would indeed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps({"weight": Leaves(mark)}))
    pickle.loads(path.read_bytes())
    assert mark.exists()
    mark.unlink()


def module_that_leaves(mark: Path) -> str:
    """Python code that leaves the mark when it is imported."""
    return f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n"
