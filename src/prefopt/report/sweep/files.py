"""The files of a sweep: their names, for whoever writes or reads them."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class SweepFiles:
    """Where the files of a sweep are, beside the folders of its runs.

    Attributes:
        path: of the sweep's folder.
    """

    path: Path

    @property
    def book(self) -> Path:
        """What is swept, the settings that all runs share, and of each run how it stands and its figures."""
        return self.path / "sweep.json"

    @property
    def config(self) -> Path:
        """All settings as a YAML file that runs the sweep again. Its name is not that of a run's, which a sweep is not."""
        return self.path / "sweep.yaml"

    @property
    def report(self) -> Path:
        """One page about the sweep."""
        return self.path / "report.html"

    @property
    def lock(self) -> Path:
        """What a sweep holds while it goes."""
        return self.path / ".lock"

    @property
    def own(self) -> tuple[Path, ...]:
        """All of them."""
        return (self.book, self.config, self.report, self.lock)


def is_sweep(folder: Path) -> bool:
    """Whether the folder holds a sweep."""
    return SweepFiles(folder).book.is_file()
