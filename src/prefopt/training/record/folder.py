"""The folder of a run: whether it can take one, and how its files are written so that a full disk or a kill loses nothing."""

import errno
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt.config import to_yaml
from prefopt.disk import draft_of, flush, old_of, remove, write_whole
from prefopt.errors import ConfigError, RunError
from prefopt.report.files import RunFiles, read_lines
from prefopt.training.record.lock import Lock


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The folder of a run."""

    path: Path

    @property
    def files(self) -> RunFiles:
        """The names of its files."""
        return RunFiles(self.path)

    @property
    def has_checkpoint(self) -> bool:
        """Whether a checkpoint was finished."""
        return any(self.files.checkpoints.glob("step-*"))

    def how_to_go_on(self, *, several: bool = True) -> str:
        """What is left of a run that broke off, and how to go on; `several`: in several processes."""
        again = "start all processes again" if several else "go on" if self.has_checkpoint else "start anew"
        if self.has_checkpoint:
            return f"The last checkpoint in {self.files.checkpoints} is as it was: {again} with the same command and --resume."
        if several and not self.path.is_dir():  # another machine has it
            return f"To go on, {again} with the same command, and with --resume where a checkpoint was saved."
        return f"No checkpoint was saved: {again} with the same command, and --overwrite if the folder is not empty."

    @property
    def drafts(self) -> tuple[Path, ...]:
        """What is being written, or removed, and has another name until that is done; a process that is killed leaves it behind."""
        old = (old_of(self.files.checkpoints), old_of(self.files.model))
        return (*map(draft_of, (*self.files.single, self.files.model)), *old)

    def prepare(self, *, resume: bool, overwrite: bool, models: Iterable[str] = ()) -> Lock:
        """Make it and take its lock, where `check` finds that it can take a run; what it holds stays until `clear`.

        Raises:
            ConfigError, RunError: as `check`; or it cannot be made, or a run is going on in it.
        """
        try:
            if not self.path.is_dir():
                self.check(resume=resume, overwrite=overwrite, models=models)
            self.path.mkdir(parents=True, exist_ok=True)
            lock = Lock(self.files.lock)
        except OSError as error:
            raise self._cannot_make(error) from None
        try:
            self.check(resume=resume, overwrite=overwrite, models=models)
        except BaseException:
            lock.release()
            raise
        return lock

    def check(self, *, resume: bool, overwrite: bool, models: Iterable[str] = ()) -> None:
        """Whether it can take a run.

        Args:
            resume: go on with its run.
            overwrite: it may hold a run.
            models: what the run reads and `clear` must not delete.

        Raises:
            ConfigError: resume and overwrite are both asked for.
            RunError: it holds another run or other files, and neither resuming nor overwriting was asked for.
        """
        if resume and overwrite:
            raise ConfigError("resume and overwrite exclude each other: the one goes on with the run in `out`, the other deletes it")
        try:
            if self.path.exists() and not self.path.is_dir():
                raise RunError(f"{self.path} is a file. Give a folder as out.")
            if resume:
                self._check_resume()
            elif self.path.is_dir() and any(path not in (self.files.lock, *self.drafts) for path in self.path.iterdir()):
                self._check_overwrite(overwrite, models)
        except OSError as error:
            raise self._cannot_make(error) from None

    def _cannot_make(self, error: OSError) -> RunError:
        return RunError(f"cannot make the folder {self.path}: {error.strerror}. Give a folder that can be written as out.")

    def _check_resume(self) -> None:
        if self.has_checkpoint:
            return
        anew = "with --overwrite in place of --resume" if self.files.config.is_file() else "without --resume"
        raise RunError(f"there is nothing to resume in {self.path}: no checkpoint was saved. Start the run anew, {anew}.")

    def _check_overwrite(self, overwrite: bool, models: Iterable[str]) -> None:
        if not overwrite:
            raise RunError(
                f"{self.path} is not empty. Give another folder as out, --resume to go on with its run, or --overwrite to replace it."
            )
        if not self.files.config.is_file():
            raise RunError(
                f"{self.path} holds files and no run of prefopt (no config.yaml), so --overwrite does not delete it. Give another folder."
            )
        for name in models:
            if (place := Path(name).expanduser()).exists() and place.resolve().is_relative_to(self.path.resolve()):
                raise RunError(
                    f"{name} lies in {self.path}, and --overwrite would delete it before it is trained. Give another folder as out."
                )

    def clear(self) -> None:
        """Delete what an earlier run left, and nothing else.

        Raises:
            RunError: it cannot be deleted.
        """
        try:
            self._remove(self.drafts)
            for path in (self.files.checkpoints, self.files.model):
                if path.exists() or path.is_symlink():  # in one move: half of a checkpoint or model must not stand there after a kill
                    path.rename(old_of(path))
                    self._remove([old_of(path)])
            self._remove(self.files.reported)
            # The config waits for `write_config`: a folder without it may not be overwritten, and a kill may come in between.
            self._remove(path for path in self.files.single if path != self.files.config)
        except OSError as error:
            raise RunError(f"cannot delete the run in {self.path}: {error}. Delete it by hand, or give another folder as out.") from None

    def write_config(self, values: Mapping[str, Any]) -> None:
        """All settings as a file that `prefopt train --config` takes.

        Raises:
            RunError: it cannot be written.
        """
        self.write_text(self.files.config, to_yaml(values))

    def write_json(self, path: Path, values: Mapping[str, Any]) -> None:
        """One of its files that hold one object.

        Raises:
            RunError: it cannot be written.
        """
        self.write_text(path, json.dumps(plain(values), indent=2, ensure_ascii=False) + "\n")

    def write_lines(self, path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
        """One of its files that hold an object per line, as a whole.

        Raises:
            RunError: it cannot be written; what it held is as it was.
        """
        self.write_text(path, "".join(_line(row) for row in rows))

    def add_lines(self, path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
        """More lines at the end of such a file.

        Raises:
            RunError: they cannot be written.
        """
        try:
            with path.open("a", encoding="utf-8", errors="replace") as file:
                file.write("".join(_line(row) for row in rows))
        except OSError as error:
            raise self._cannot_write(path, error) from None

    def flush(self) -> None:
        """See to it that the lines are on the disk before a checkpoint is: one that knows of more steps than they would leave a gap.

        Raises:
            RunError: they cannot be written.
        """
        for path in (self.files.metrics, self.files.samples, self.files.watch):
            try:
                flush(path)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise self._cannot_write(path, error) from None

    def keep_steps(self, step: int) -> dict[str, int]:
        """Leave what was noted up to a step: what came after the checkpoint is about to be made again.

        Returns:
            name of a file -> lines that could not be read, where there are any; they are gone.

        Raises:
            RunError: a file cannot be written; it holds all that it held.
        """
        damaged: dict[str, int] = {}
        try:
            self._remove(map(draft_of, self.files.single))
            self._remove([self.files.bad_batch, self.files.summary])  # the step is taken again, and the end comes again
            for path in (self.files.metrics, self.files.samples, self.files.watch):
                if path.is_file():
                    readable = [row for row in read_lines(path) if isinstance(row.get("step"), int)]
                    ended = path.read_bytes().split(b"\n")[:-1]  # what a kill has cut short is no damage
                    num_lines = sum(bool(line.strip()) for line in ended)
                    self.write_lines(path, [row for row in readable if row["step"] <= step])
                    if num_lines > len(readable):
                        damaged[path.name] = num_lines - len(readable)
        except OSError as error:
            raise self._cannot_write(self.path, error) from None
        return damaged

    def write_text(self, path: Path, text: str) -> None:
        """One of its files. It appears whole or not at all.

        Raises:
            RunError: it cannot be written; what it held is as it was.
        """
        try:
            write_whole(path, text)
        except OSError as error:
            raise self._cannot_write(path, error) from None

    def _cannot_write(self, path: Path, error: OSError) -> RunError:
        if not self.path.is_dir():
            return folder_gone(path, self.path)
        first = "Make room" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "See to it that it can be written"
        then = "go on with --resume from the last checkpoint" if self.has_checkpoint else "start anew with --overwrite"
        return RunError(f"cannot write {path}: {error.strerror}. {first}, and {then}.")

    @staticmethod
    def _remove(paths: Iterable[Path]) -> None:
        for path in paths:
            remove(path)


def folder_gone(path: Path, run: Path) -> RunError:
    """What is said where a file of a run cannot be written because the run's folder is not there any more."""
    return RunError(
        f"cannot write {path}: the folder of the run, {run}, is gone: it was removed or moved while the run went, with all checkpoints in "
        "it. Move it back and go on with --resume, or start anew with the same command."
    )


def plain(value: Any) -> Any:
    """A value as JSON has it: numbers that are not finite, which JSON does not know, become null; paths become text."""
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(plain(row), ensure_ascii=False) + "\n"
