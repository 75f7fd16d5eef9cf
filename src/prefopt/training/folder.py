"""The folder of a run: whether it can take one, and how its files are written so that a full disk or a kill loses nothing."""

import json
import math
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from prefopt.errors import ConfigError, RunError
from prefopt.report.files import RunFiles, read_lines


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
        return any(self.files.checkpoints.glob("step-*/state.json"))

    def prepare(self, *, resume: bool, overwrite: bool, models: Iterable[str | None] = ()) -> None:
        """Make it, where `check` finds that it can take a run; what it holds stays until `clear`.

        Raises:
            ConfigError, RunError: as `check`; or it cannot be made.
        """
        self.check(resume=resume, overwrite=overwrite, models=models)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._cannot_make(error) from None

    def check(self, *, resume: bool, overwrite: bool, models: Iterable[str | None] = ()) -> None:
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
            elif self.path.is_dir() and any(path not in (self.files.dropped, self.files.dropped_held_out) for path in self.path.iterdir()):
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

    def _check_overwrite(self, overwrite: bool, models: Iterable[str | None]) -> None:
        if not overwrite:
            raise RunError(
                f"{self.path} is not empty. Give another folder as out, --resume to go on with its run, or --overwrite to replace it."
            )
        if not self.files.config.is_file():
            raise RunError(
                f"{self.path} holds files and no run of prefopt (no config.yaml), so --overwrite does not delete it. Give another folder."
            )
        for name in filter(None, models):
            if Path(name).exists() and Path(name).resolve().is_relative_to(self.path.resolve()):
                raise RunError(
                    f"{name} lies in {self.path}, and --overwrite would delete it before it is trained. Give another folder as out."
                )

    def clear(self, *, keep: Iterable[Path] = ()) -> None:
        """Delete what an earlier run left, and nothing else.

        Raises:
            RunError: it cannot be deleted.
        """
        try:
            for path in (self.files.model, self.files.checkpoints):
                if path.exists():
                    shutil.rmtree(path)
            for path in set(self.files.single).difference(keep):
                path.unlink(missing_ok=True)
        except OSError as error:
            raise RunError(f"cannot delete the run in {self.path}: {error}. Delete it by hand, or give another folder as out.") from None

    def write_config(self, values: Mapping[str, Any]) -> None:
        """All settings as a file that `prefopt train --config` takes.

        Raises:
            RunError: it cannot be written.
        """
        _write_whole(self.files.config, yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True))

    def write_json(self, path: Path, values: Mapping[str, Any]) -> None:
        """One of its files that hold one object.

        Raises:
            RunError: it cannot be written.
        """
        _write_whole(path, json.dumps(plain(values), indent=2, ensure_ascii=False) + "\n")

    def write_lines(self, path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
        """One of its files that hold an object per line, as a whole.

        Raises:
            RunError: it cannot be written; what it held is as it was.
        """
        _write_whole(path, "".join(_line(row) for row in rows))

    def add_lines(self, path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
        """More lines at the end of such a file.

        Raises:
            RunError: they cannot be written.
        """
        try:
            with path.open("a", encoding="utf-8", errors="replace") as file:
                file.write("".join(_line(row) for row in rows))
        except OSError as error:
            raise _cannot_write(path, error) from None

    def keep_steps(self, step: int) -> None:
        """Leave what was noted up to a step: what came after the checkpoint is about to be made again.

        Raises:
            RunError: a file cannot be written; it holds all that it held.
        """
        for path in (self.files.metrics, self.files.samples, self.files.watch):
            if path.is_file():
                self.write_lines(path, [row for row in read_lines(path) if row.get("step", 0) <= step])


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


def _write_whole(path: Path, text: str) -> None:
    """The file appears whole or not at all."""
    draft = path.with_name(f".{path.name}.new")
    try:
        draft.write_text(text, encoding="utf-8", errors="replace")  # lone surrogates, which a tokenizer may make of broken text
        draft.replace(path)
    except OSError as error:
        raise _cannot_write(path, error) from None


def _cannot_write(path: Path, error: OSError) -> RunError:
    return RunError(f"cannot write {path}: {error.strerror}. Make room, and go on with --resume from the last checkpoint.")
