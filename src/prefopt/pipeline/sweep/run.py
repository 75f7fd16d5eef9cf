"""Run a sweep: its runs one after the other in one process, then the table and the page about them.

Each run is what `prefopt train` makes of the same settings, to the bit, in a folder of its own. What does not depend on the swept
setting is computed by the first run that needs it and comes from the caches after that: tokens, and the values of the reference.
The model is loaded for each run anew: training changes its weights, and reading them again takes less than making sure that
nothing else of a run is left in it.
"""

import gc
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt.errors import DataError, ModelError, PrefoptError, RunError, RunStopped
from prefopt.pipeline.stages_done import inputs
from prefopt.pipeline.sweep.book import SweepBook
from prefopt.pipeline.sweep.plan import NOTHING_TO_COMPARE_ON, PlannedRun, SweepPlan
from prefopt.pipeline.sweep.shown import show_sweep
from prefopt.report.files import RunFiles, read_json
from prefopt.report.record import is_run
from prefopt.report.sweep.best import find_best
from prefopt.report.sweep.page import write_sweep_report
from prefopt.report.sweep.record import SweepRecord, label_of, read_sweep
from prefopt.report.text import duration, plural
from prefopt.training.group import processes
from prefopt.training.interrupt import stop_at_once
from prefopt.training.loop import forget_peak_memory
from prefopt.training.not_finite import NotFinite
from prefopt.training.record.again import Again
from prefopt.training.record.callbacks import Callback, RunStart
from prefopt.training.record.folder import RunFolder
from prefopt.training.run import train
from prefopt.training.terminal.narrator import Narrator, Terminal, Ticker
from prefopt.training.watching.watched import Finding

DECIDE_FIT = {
    "max_tokens",
    "batch_size",
    "gradient_checkpointing",
    "lora_rank",
    "precision",
    "sharing",
    "parallel",
    "device",
    "reference_cache",
}
"""Settings on which it depends whether a run fits into memory and runs at all: where one is swept, the others may fare better."""


@dataclass(frozen=True, slots=True)
class SweepResult:
    """What a sweep leaves.

    Attributes:
        folder: of the sweep.
        report: the page about it.
        best: name of the best run's folder; None where no two runs can be compared.
        runs: name of a run -> its held-out figures, by metric; without those that failed.
    """

    folder: Path
    report: Path
    best: str | None
    runs: Mapping[str, Mapping[str, float]]


class Once:
    """What the runs of a sweep say: each sentence once, however many runs say it."""

    def __init__(self, inner: Narrator) -> None:
        self.inner = inner
        self.said: set[str] = set()
        self.found: set[tuple[str, str]] = set()

    def say(self, line: str) -> None:
        """A sentence that no run before has said."""
        if line not in self.said:
            self.said.add(line)
            self.inner.say(line)

    def finding(self, finding: Finding) -> None:
        """What the watch has found, where it has not found the very same in a run before."""
        if (key := (finding.rule, finding.what)) not in self.found:
            self.found.add(key)
            self.inner.finding(finding)

    def progress(self, what: str, total: int, done: int = 0) -> AbstractContextManager[Ticker]:
        """A run's progress."""
        return self.inner.progress(what, total, done)


class NeedsHeldOut(Callback):
    """Ends a run before its first step where its data gave no held-out examples, which only reading it shows."""

    def on_start(self, run: RunStart) -> None:
        """Look at what was held out.

        Raises:
            DataError: nothing.
        """
        if not run.manifest["data"]["num_held_out"]:
            raise DataError(NOTHING_TO_COMPARE_ON)


def run_sweep(
    plan: SweepPlan, *, narrator: Narrator | None = None, callbacks: Sequence[Callback] = (), again: Again | None = None
) -> SweepResult:
    """Run all runs that are not done yet, and compare them.

    With `resume`, runs that have finished with the same settings on the same files stay as they are, one that was interrupted goes on
    from its checkpoint, and the rest follows. A run whose numbers were not finite is noted, and would be again: it is not repeated.

    Args:
        plan: the sweep.
        narrator: where words go; the default is the terminal, with the table on standard output.
        callbacks: follow every run.
        again: the run whose manifest the settings come from.

    Raises:
        RunError: the folder cannot take the sweep; or some runs failed, after the others have run.
        RunStopped: it was asked to stop; what is done is kept.
        PrefoptError: from a run, where the others would come to the same.
    """
    if (count := processes.place(os.environ)[1]) > 1:
        raise RunError(f"a sweep runs in one process, and {count} were started: give the runs to prefopt train under torchrun one by one.")
    show = narrator or Terminal()
    book = SweepBook(plan)
    with stop_at_once():
        try:
            lock = book.open()
        except KeyboardInterrupt:
            raise RunStopped("stopped before the first run. Give the same command to start again.") from None
        try:
            return Sweep(plan, book, show, callbacks, again).go(is_shown=narrator is None)
        except KeyboardInterrupt:
            raise RunStopped(f"the sweep in {plan.out} was stopped. Go on with the same command and --resume.") from None
        finally:
            lock.release()


class Sweep:
    """A sweep whose folder is open.

    Args:
        plan, book: what is run, and where it is noted.
        show: where words go.
        callbacks, again: as `run_sweep` has them.
    """

    def __init__(self, plan: SweepPlan, book: SweepBook, show: Narrator, callbacks: Sequence[Callback], again: Again | None) -> None:
        self.plan, self.book, self.show, self.callbacks, self.again = plan, book, show, callbacks, again
        self.narrator = Once(show)
        self.took: list[float] = []
        """Seconds of each run that was run to its end here."""

    def go(self, *, is_shown: bool) -> SweepResult:
        """All runs, then what came of them."""
        num = len(self.plan.runs)
        self.show.say(f"sweep: {plural(num, 'run')} of {self.plan.method.name} in {self.plan.out}")
        if self.book.others:
            names = ", ".join(str(entry["name"]) for entry in self.book.others)
            self.show.say(f"left out of the table, for they are not asked for now: {names}; their folders stay")
        for place, run in enumerate(self.plan.runs, 1):
            self._run(run, f"run {place} of {num}, {label_of(run.values)}", num_left=num - place)
        record = self._sum_up()
        if is_shown:
            show_sweep(record)
        if self.plan.runs[0].settings.report:
            self.show.say(f"report: {self.book.files.report}")
        if failed := [run.label for run in record.runs if run.state == "failed"]:
            done = "" if len(failed) == num else " The others are done."
            raise RunError(f"{len(failed)} of {plural(num, 'run')} failed: {'; '.join(failed)}.{done}")
        best = find_best(record)
        figures = {
            run.name: {name: change.after for name, change in run.figures.items() if change.after is not None} for run in record.finished
        }
        return SweepResult(self.plan.out, self.book.files.report, best.run.name if best and best.behind else None, figures)

    def _run(self, run: PlannedRun, what: str, *, num_left: int) -> None:
        """One run, unless it is done."""
        read = inputs(run.settings)
        if self.book.is_done(run):
            self.show.say(f"{what}: done before, in {run.settings.out}")
            return
        if self.book.has_failed(run, read):
            self.show.say(f"{what}: failed before, and would again; delete {run.settings.out} to try it anew")
            return
        self.show.say(f"\n{what}")
        before, began = self.book.entries[run.name], time.perf_counter()
        self.book.note(run, "running", read=read)
        try:
            followed = (NeedsHeldOut(), *self.callbacks)
            train(self.plan.method.name, self._start_of(run), narrator=self.narrator, callbacks=followed, again=self.again)
        except (RunStopped, KeyboardInterrupt):
            self.book.note(run, "stopped", read=read)
            self._sum_up()
            raise RunStopped(self._stopped(run, what)) from None
        except PrefoptError as error:
            if not self._others_may_fare_better(error):
                with suppress(PrefoptError):  # it must not hide the first one
                    self.book.put_back(before, "stopped" if is_run(run.settings.out) else "waiting", str(error))
                    self._sum_up()
                raise
            self.book.note(run, "failed", str(error), read=read, is_final=isinstance(error, NotFinite))
            self.show.say(f"{what} failed: {error}")
        else:
            self.book.note(run, "finished", read=read)
            self._foresee(run, time.perf_counter() - began, num_left)
        self._sum_up()
        gc.collect()  # the model of this run, before the next one asks what memory there is
        forget_peak_memory()

    def _start_of(self, run: PlannedRun) -> Any:
        """The settings by which a run starts or goes on."""
        folder = RunFolder(run.settings.out)
        if folder.has_checkpoint:
            return run.settings.model_copy(update={"resume": True})
        return run.settings.model_copy(update={"overwrite": is_run(run.settings.out)})  # it was stopped before its first checkpoint

    def _others_may_fare_better(self, error: PrefoptError) -> bool:
        """Whether the error is that run's own; a full disk, or a file that is missing, would meet the others too."""
        if isinstance(error, NotFinite):
            return True
        is_about_files = isinstance(error.__context__, OSError) or not isinstance(error, RunError | ModelError)
        return not is_about_files and bool(DECIDE_FIT & self.plan.swept.keys())

    def _foresee(self, run: PlannedRun, seconds: float, num_left: int) -> None:
        """How long the rest will take, and how much room, by what this run did."""
        self.took.append(seconds)
        if num_left:
            gigabytes = num_left * sum(path.stat().st_size for path in run.settings.out.rglob("*") if path.is_file()) / 1e9
            size = f"{gigabytes:.1f} GB" if gigabytes >= 1 else f"{1000 * gigabytes:.0f} MB"
            mean = sum(self.took) / len(self.took)
            self.show.say(f"{plural(num_left, 'run')} to go: about {duration(num_left * mean)}, and {size} of disk")

    def _stopped(self, run: PlannedRun, what: str) -> str:
        """Where the sweep stands."""
        status = read_json(RunFiles(run.settings.out).status) or {}
        at = f" after step {status['step']} of {status['num_steps']}" if status.get("step") and status.get("num_steps") else ""
        done = sum(entry["state"] == "finished" for entry in self.book.entries.values())
        return (
            f"the sweep was stopped in {what}{at}. {done} of {plural(len(self.plan.runs), 'run')} "
            f"{'is' if done == 1 else 'are'} finished. Go on with the same command and --resume."
        )

    def _sum_up(self) -> SweepRecord:
        """The figures into the book, and the page."""
        record = read_sweep(self.plan.out)
        for run in record.runs:
            entry = self.book.entries[run.name]
            entry["figures"] = {
                name: {"before": change.before, "after": change.after, "error": change.error} for name, change in run.figures.items()
            }
            entry["seconds"], entry["steps"] = run.seconds, run.steps
            entry["watch"] = [finding.rule for finding in run.findings]
        best = find_best(record)
        self.book.closing = {"best": {"run": best.run.name, "by": best.figure} if best and best.behind else None}
        self.book.write()
        if self.plan.runs[0].settings.report:
            try:
                write_sweep_report(self.plan.out)
            except Exception as error:  # a page that cannot be made is no reason to end a sweep
                what = "" if isinstance(error, PrefoptError) else f"the page about the sweep cannot be made: {type(error).__name__}: "
                self.narrator.say(f"note: {what}{error}")
        return record
