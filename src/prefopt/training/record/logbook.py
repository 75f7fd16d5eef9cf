"""What is noted while a run goes: written to its folder, shown, handed to the watch and to callbacks.

The main process keeps the book; the others only remember the rows.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from prefopt.errors import PrefoptError
from prefopt.report.card import model_card
from prefopt.report.files import read_json, read_lines
from prefopt.report.page import write_report
from prefopt.training.record.callbacks import Callback, RunStart
from prefopt.training.record.folder import RunFolder
from prefopt.training.record.lock import Lock
from prefopt.training.terminal.narrator import Narrator
from prefopt.training.watching.watch import Watch
from prefopt.training.watching.watched import WatchedRun


class Logbook:
    """The book of a run.

    Args:
        folder: of the run.
        narrator: where words go.
        callbacks: told of everything.
        is_main: whether this process keeps it.

    Attributes:
        rows: all metrics so far, one row per step.
    """

    def __init__(self, folder: RunFolder, narrator: Narrator, callbacks: Sequence[Callback], *, is_main: bool) -> None:
        self.folder, self.narrator, self.is_main = folder, narrator, is_main
        self.callbacks = callbacks if is_main else ()
        self.rows: list[dict[str, float]] = []
        self.num_steps = 0
        self.watch: Watch | None = None
        self.is_open = self.is_told = False
        """Whether the folder is this run's; whether the run ends in an error that says what its user needs to know."""
        self.started = ""
        """When the run began, before whatever interrupted it."""
        self.lock: Lock | None = None
        """Keeps other runs out of the folder; on the main process, from the time that the folder was found fit."""

    def begin(self, start: RunStart, manifest: Mapping[str, Any], *, num_steps: int) -> None:
        """The folder belongs to this run from now on."""
        self.num_steps = num_steps
        self.rows = [_numbers(row) for row in read_lines(self.folder.files.metrics)] if start.step else []
        if not self.is_main:
            return
        self.is_open = True
        self.started = _now()
        if start.step:
            self.started = str((read_json(self.folder.files.status) or {}).get("started", self.started))
        self.folder.write_json(self.folder.files.manifest, manifest)
        self.status("running")
        for callback in self.callbacks:
            callback.on_start(start)

    def follow(self, run: WatchedRun) -> None:
        """Let the watch look at the run, before its first step or where it goes on; what it has said before it does not say again."""
        if self.is_main:
            self.watch = Watch(run, said={str(row.get("rule", "")) for row in read_lines(self.folder.files.watch)})
            self._look()

    def row(self, row: Mapping[str, float]) -> None:
        """A step's metrics."""
        self.rows.append(dict(row))
        if not self.is_main:
            return
        self.folder.add_lines(self.folder.files.metrics, [row])
        for callback in self.callbacks:
            callback.on_step(row)
        self._look()

    def samples(self, answers: Sequence[Mapping[str, Any]]) -> None:
        """Answers of the model."""
        if not self.is_main:
            return
        self.folder.add_lines(self.folder.files.samples, answers)
        for callback in self.callbacks:
            callback.on_samples(answers)

    def held_out(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """The held-out examples with their newest figures."""
        if self.is_main:
            self.folder.write_lines(self.folder.files.held_out, rows)

    def end(self, summary: Mapping[str, Any]) -> None:
        """The run is done and its model saved."""
        if not self.is_main:
            return
        self.folder.write_json(self.folder.files.summary, summary)
        self.status("finished")
        for callback in self.callbacks:
            callback.on_end(summary)

    def doing(self) -> str:
        """What is going on, as the end of a sentence."""
        return f"in step {len(self.rows) + 1} of {self.num_steps}" if self.num_steps else "before the first step"

    def pages(self, *, report: bool) -> None:
        """The model's card, where there is a model, and the page about the run. Whatever hinders that, the run is what it is."""
        if not self.is_open:
            return
        try:
            if self.folder.files.model.is_dir():
                self.folder.write_text(self.folder.files.card, model_card(self.folder.path))
            if report:
                self.narrator.say(f"report: {write_report(self.folder.path)}")
        except Exception as error:  # a bug in a page, too, must not hide why a run failed, nor make a finished one a failed one
            if not self.is_told:  # a disk that is full is told of once
                what = "" if isinstance(error, PrefoptError) else f"the pages about the run cannot be made: {type(error).__name__}: "
                self.narrator.say(f"note: {what}{error}")

    def failed(self, error: BaseException, *, stopped: bool) -> None:
        """The run ends in an error. A second one while that is noted must not hide it."""
        if not self.is_open:
            return
        self.is_told = isinstance(error, PrefoptError) and not stopped
        try:
            self.status("stopped" if stopped else "failed", str(error) or type(error).__name__)
        except PrefoptError as another:
            if not self.is_told:
                self.narrator.say(f"note: {another}")
        for callback in self.callbacks:
            try:
                callback.on_failure(error)
            except Exception as another:
                self.narrator.say(f"note: {type(callback).__name__}.on_failure failed as well: {type(another).__name__}: {another}")

    def close(self) -> None:
        """The folder may take another run."""
        if self.lock is not None:
            self.lock.release()
            self.lock = None

    def status(self, state: str, message: str = "") -> None:
        """Where the run stands, in `status.json`."""
        step = int(self.rows[-1].get("step", 0)) if self.rows else 0
        times = {"started": self.started, "updated": _now()}
        values = {"state": state, "step": step, "num_steps": self.num_steps, "pid": os.getpid(), **times, "message": message}
        self.folder.write_json(self.folder.files.status, values)

    def _look(self) -> None:
        if self.watch is None:
            return
        for finding in self.watch.look(self.rows):
            self.folder.add_lines(self.folder.files.watch, [asdict(finding)])
            self.narrator.finding(finding)
            for callback in self.callbacks:
                callback.on_finding(finding)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """A row without the figures that were not finite, which the file holds as null."""
    return {name: value for name, value in row.items() if isinstance(value, int | float)}
