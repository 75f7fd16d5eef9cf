"""The book of a sweep: its folder, and `sweep.json`, by which it goes on where it was."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import prefopt
from prefopt.config import to_yaml
from prefopt.disk import draft_of, write_whole
from prefopt.errors import ConfigError, RunError
from prefopt.pipeline.stages_done import noted_of, still_done
from prefopt.pipeline.sweep.plan import PlannedRun, SweepPlan
from prefopt.report.files import read_json
from prefopt.report.record import is_run, listed, mapping
from prefopt.report.sweep.files import SweepFiles, is_sweep
from prefopt.training.assemble import own_settings
from prefopt.training.record.environment import differences
from prefopt.training.record.folder import RunFolder, plain
from prefopt.training.record.lock import Lock
from prefopt.training.record.resume import ELSEWHERE, FREE, ROUNDING, config_values, fixed_settings
from prefopt.training.run import models_read


class SweepBook:
    """What is noted of a sweep.

    Args:
        plan: the sweep.

    Attributes:
        entries: of each run, by its name: `state`, `message`, `figures`, and what tells whether it is done.
    """

    def __init__(self, plan: SweepPlan) -> None:
        self.plan = plan
        self.files = SweepFiles(plan.out)
        self.entries: dict[str, dict[str, Any]] = {run.name: _entry(run) for run in plan.runs}
        self.others: list[dict[str, Any]] = []
        """Entries of runs that an earlier start of the sweep had and this one has not; their folders stay."""
        self.closing: dict[str, Any] = {}
        """What came of the sweep."""

    def open(self) -> Lock:
        """Take the folder, and go on with what it holds.

        Raises:
            ConfigError, RunError: it cannot take this sweep; says why and what to do.
        """
        self._check()
        try:
            self.plan.out.mkdir(parents=True, exist_ok=True)
            lock = Lock(self.files.lock)
        except OSError as error:
            raise RunError(f"cannot make the folder {self.plan.out}: {error.strerror}. Give a folder that can be written as out.") from None
        try:
            self._check()  # what it holds may have changed before the lock was there
            if self.plan.overwrite:
                self._clear()
            else:
                self._take_over(read_json(self.files.book) or {})
            self.write()
            self._write(self.files.config.name, to_yaml(self._config()))
        except BaseException:
            lock.release()
            raise
        return lock

    def is_done(self, run: PlannedRun) -> bool:
        """Whether a run has finished, with the same settings on the same files."""
        return still_done(self.entries[run.name].get("noted"), run.settings, self.plan.method(own_settings(self.plan.method, run.settings)))

    def has_failed(self, run: PlannedRun, read: Mapping[str, list[int]]) -> bool:
        """Whether a run came to numbers that are not finite, with the same settings on the same files: it would again."""
        failed = self.entries[run.name].get("not_finite")
        return is_run(run.settings.out) and isinstance(failed, dict) and failed == self._cause(run, read)

    def note(self, run: PlannedRun, state: str, message: str = "", *, read: Mapping[str, list[int]], is_final: bool = False) -> None:
        """How a run stands.

        Args:
            run: it.
            state: `running`, `finished`, `stopped`, `failed`.
            message: what was said of its end.
            read: the files that it reads, as `inputs` gave them before it began.
            is_final: a failed run would fail again.
        """
        entry = _entry(run) | {"state": state, "message": message}
        if state == "finished":
            entry["noted"] = noted_of(run.settings, self.plan.method(own_settings(self.plan.method, run.settings)), read)
        if is_final:
            entry["not_finite"] = self._cause(run, read)
        self.entries[run.name] = entry
        self.write()

    def put_back(self, before: Mapping[str, Any], state: str, message: str) -> None:
        """A run could not be looked at or gone on with, for a reason outside of it: one that had finished has still finished."""
        self.entries[str(before["name"])] = (
            dict(before) if before["state"] == "finished" else {**before, "state": state, "message": message}
        )
        self.write()

    def write(self) -> None:
        """Write the book. It appears whole or not at all.

        Raises:
            RunError: it cannot be written.
        """
        values = {
            "prefopt": prefopt.__version__,
            "updated": datetime.now(UTC).isoformat(timespec="seconds"),
            "method": self.plan.method.name,
            "swept": {name: list(values) for name, values in self.plan.swept.items()},
            **self.closing,
            "runs": list(self.entries.values()),
            "left_out": self.others,
            "settings": self._settings(self.plan.runs[0]),
        }
        self._write(self.files.book.name, json.dumps(plain(values), indent=2, ensure_ascii=False) + "\n")

    def _write(self, name: str, text: str) -> None:
        path = self.files.path / name
        try:
            write_whole(path, text)
        except OSError as error:
            raise RunError(f"cannot write {path}: {error.strerror}. Make room, and go on with the same command and --resume.") from None

    def _settings(self, run: PlannedRun) -> dict[str, Any]:
        """What decides a run's numbers, without what is swept."""
        method = self.plan.method(own_settings(self.plan.method, run.settings))
        return {name: value for name, value in fixed_settings(method, run.settings).items() if name not in self.plan.swept}

    def _config(self) -> dict[str, Any]:
        """The sweep as a file that `prefopt sweep --config` takes."""
        first = self.plan.runs[0]
        values = config_values(self.plan.method(own_settings(self.plan.method, first.settings)), first.settings)
        shared = {name: value for name, value in values.items() if name not in (*self.plan.swept, "method")}
        swept = {name: list(values) for name, values in self.plan.swept.items()}
        return {"method": self.plan.method.name, "sweep": swept, **shared, "out": str(self.plan.out)}

    def _cause(self, run: PlannedRun, read: Mapping[str, list[int]]) -> dict[str, Any]:
        method = self.plan.method(own_settings(self.plan.method, run.settings))
        found: dict[str, Any] = plain({"settings": fixed_settings(method, run.settings), "inputs": dict(read)})
        return found

    def _check(self) -> None:
        """Whether the folder can take this sweep.

        Raises:
            ConfigError, RunError: it cannot.
        """
        out, plan = self.plan.out, self.plan
        if plan.resume and plan.overwrite:
            raise ConfigError(
                "resume and overwrite exclude each other: the one goes on with the sweep in `out`, the other deletes its runs"
            )
        try:
            if out.exists() and not out.is_dir():
                raise RunError(f"{out} is a file. Give a folder as out.")
            held = [] if not out.is_dir() else [path for path in out.iterdir() if path not in (self.files.lock, draft_of(self.files.book))]
            if is_run(out):
                raise RunError(f"{out} holds a run of its own, and no sweep. Give another folder as out.")
            names = {run.name for run in plan.runs}
            foreign = sorted(path.name for path in held if path not in self.files.own and path.name not in names)
            if held and not is_sweep(out) and (foreign or not plan.resume):
                what = "is not empty, and holds no sweep" + (f" ({', '.join(foreign[:4])})" if foreign else "")
                raise RunError(f"{out} {what}. Give another folder as out.")
            if is_sweep(out):
                self._check_sweep()
            for run in plan.runs:
                folder = RunFolder(run.settings.out)
                if plan.overwrite or (run.settings.out.exists() and not is_run(run.settings.out)):
                    folder.check(resume=False, overwrite=plan.overwrite, models=models_read(run.settings))
        except OSError as error:
            raise RunError(f"cannot read {out}: {error.strerror}. Give a folder that can be read and written as out.") from None

    def _check_sweep(self) -> None:
        """Whether the sweep that the folder holds is this one."""
        out, plan, earlier = self.plan.out, self.plan, read_json(self.files.book)
        if not plan.resume and not plan.overwrite:
            raise RunError(
                f"{out} holds a sweep. Give another folder as out, --resume to go on with it (values may be added and left out), or "
                "--overwrite to make its runs anew."
            )
        if plan.overwrite or earlier is None:
            return
        if earlier.get("method") != plan.method.name:
            raise RunError(f"{out} holds a sweep of {earlier.get('method')}, not of {plan.method.name}. Give another folder as out.")
        before, now = mapping(earlier.get("settings")), plain(self._settings(plan.runs[0]))
        compared = before.keys() & now.keys() - {*ROUNDING}  # what is swept stands in neither
        if before and (changed := differences({name: before[name] for name in compared}, {name: now[name] for name in compared})):
            free = sorted({*FREE, *ELSEWHERE, *ROUNDING} - {"out", "resume", "overwrite"})
            raise RunError(
                f"these settings differ from those of the sweep in {out}: {'; '.join(changed)}. Its runs and new ones would not compare. "
                "Give them as they were, start with another out, or make all runs anew with --overwrite. What may change: the values that "
                f"are swept, and {', '.join(free)}."
            )

    def _clear(self) -> None:
        """Delete what the runs' folders hold, all before the first run begins: a sweep that goes on must find none of the old ones."""
        for run in self.plan.runs:
            if is_run(run.settings.out):
                folder = RunFolder(run.settings.out)
                folder.prepare(resume=False, overwrite=True, models=models_read(run.settings)).release()
                folder.clear()

    def _take_over(self, earlier: Mapping[str, Any]) -> None:
        """The entries of the sweep that is gone on with; those of runs that are no longer asked for are kept apart."""
        known = [entry for entry in map(mapping, (*listed(earlier.get("runs")), *listed(earlier.get("left_out")))) if entry.get("name")]
        for entry in known:
            if entry["name"] in self.entries:
                self.entries[entry["name"]] |= {key: value for key, value in entry.items() if key not in ("name", "values")}
        self.others = [entry for entry in known if entry["name"] not in self.entries]


def _entry(run: PlannedRun) -> dict[str, Any]:
    """A run of which nothing is known yet."""
    return {"name": run.name, "values": dict(run.values), "state": "waiting", "message": ""}
