"""A sweep's folder, read: its book, and the folders of its runs."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prefopt.errors import ConfigError
from prefopt.report.figures import Change, changes
from prefopt.report.files import read_json
from prefopt.report.findings import by_rank, passed
from prefopt.report.record import Finding, RunRecord, is_run, listed, mapping, read_run
from prefopt.report.state import process_is_alive, run_state
from prefopt.report.sweep.files import SweepFiles
from prefopt.report.text import setting


@dataclass(frozen=True, slots=True)
class SweptRun:
    """A run of a sweep.

    Attributes:
        name: of its folder.
        values: of the settings that are swept.
        state: `finished`, `failed`, `stopped`, `running`, `waiting`.
        message: what was said of its end; empty where nothing was.
        record: what its folder holds; None where there is none yet.
        figures: held-out figures of its model, where it has finished.
        findings: what the watch warned of and what still holds, the most urgent first.
    """

    name: str
    values: Mapping[str, Any]
    state: str
    message: str
    record: RunRecord | None
    figures: Mapping[str, Change]
    findings: tuple[Finding, ...]

    @property
    def label(self) -> str:
        """`beta 0.1`."""
        return label_of(self.values)

    @property
    def seconds(self) -> float | None:
        """What its steps took, evaluations and checkpoints included."""
        return None if self.record is None else self.record.seconds

    @property
    def steps(self) -> int:
        """Done so far; of a finished run those that its model has seen."""
        return 0 if self.record is None else self.record.model_step

    def after(self, name: str) -> float | None:
        """A figure of its model; None where it is not known."""
        return self.figures[name].after if name in self.figures else None

    def error(self, name: str) -> float | None:
        """The standard error of that."""
        return self.figures[name].error if name in self.figures else None


@dataclass(frozen=True, slots=True)
class SweepRecord:
    """Everything that a sweep's folder says.

    Attributes:
        folder: of the sweep.
        method: of all runs.
        swept: settings -> values, in their order.
        runs: all of the sweep, in their order.
    """

    folder: Path
    method: str
    swept: Mapping[str, tuple[Any, ...]]
    runs: tuple[SweptRun, ...]

    @property
    def finished(self) -> tuple[SweptRun, ...]:
        """The runs that have figures to compare."""
        return tuple(run for run in self.runs if run.state == "finished")


def label_of(values: Mapping[str, Any]) -> str:
    """`beta 0.1, learning_rate 1e-6`."""
    return ", ".join(f"{name} {setting(value)}" for name, value in values.items())


def read_sweep(folder: Path) -> SweepRecord:
    """What the folder says of its sweep.

    Raises:
        ConfigError: it holds none that can be read.
    """
    book = read_json(SweepFiles(folder).book)
    if book is None or not isinstance(book.get("swept"), dict) or not isinstance(book.get("runs"), list):
        raise ConfigError(f"{folder} holds no sweep that can be read: {SweepFiles(folder).book.name} is not there, or damaged.")
    swept = {str(name): tuple(listed(values)) for name, values in book["swept"].items()}
    runs = tuple(run_of(folder, mapping(entry)) for entry in book["runs"])
    return SweepRecord(folder, str(book.get("method", "")), swept, runs)


def run_of(folder: Path, entry: Mapping[str, Any]) -> SweptRun:
    """One run, by its entry in the book and its folder."""
    name, state, message = (str(entry.get(key) or "") for key in ("name", "state", "message"))
    record = read_run(folder / name) if name and state != "waiting" and is_run(folder / name) else None
    figures: Mapping[str, Change] = {}
    standing: list[Finding] = []
    if record is not None:
        if state == "running":  # or it was, when its process was killed
            found = run_state(record, now=datetime.now(UTC), is_alive=process_is_alive)
            state = "running" if found.name == "running" else "stopped"
        all_figures = changes(record)
        standing = [finding for finding in by_rank(record.findings) if finding.is_warning and not passed(finding, record, all_figures)]
        figures = all_figures if state == "finished" else {}
    return SweptRun(name, mapping(entry.get("values")), state or "waiting", message, record, figures, tuple(standing))
