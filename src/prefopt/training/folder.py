"""The files of a run: where they are, and how they are written so that a full disk or a kill loses nothing."""

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from prefopt.errors import ConfigError, RunError


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Where the files of a run are."""

    path: Path

    @property
    def config(self) -> Path:
        """All settings, defaults included, as a YAML file that runs it again."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """One JSON line per optimizer step."""
        return self.path / "metrics.jsonl"

    @property
    def summary(self) -> Path:
        """The final figures."""
        return self.path / "summary.json"

    @property
    def model(self) -> Path:
        """The trained model."""
        return self.path / "model"

    @property
    def checkpoints(self) -> Path:
        """What `--resume` reads."""
        return self.path / "checkpoints"

    @property
    def has_checkpoint(self) -> bool:
        """Whether a checkpoint was finished."""
        return any(self.checkpoints.glob("step-*/state.json"))

    @property
    def dropped(self) -> Path:
        """Rows that were left out, each with its reason; there where there are any."""
        return self.path / "dropped.jsonl"

    @property
    def dropped_held_out(self) -> Path:
        """The same of the held-out examples."""
        return self.path / "dropped-eval.jsonl"

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
            elif self.path.is_dir() and any(path not in (self.dropped, self.dropped_held_out) for path in self.path.iterdir()):
                self._check_overwrite(overwrite, models)
        except OSError as error:
            raise self._cannot_make(error) from None

    def _cannot_make(self, error: OSError) -> RunError:
        return RunError(f"cannot make the folder {self.path}: {error.strerror}. Give a folder that can be written as out.")

    def _check_resume(self) -> None:
        if self.has_checkpoint:
            return
        anew = "with --overwrite in place of --resume" if self.config.is_file() else "without --resume"
        raise RunError(f"there is nothing to resume in {self.path}: no checkpoint was saved. Start the run anew, {anew}.")

    def _check_overwrite(self, overwrite: bool, models: Iterable[str | None]) -> None:
        if not overwrite:
            raise RunError(
                f"{self.path} is not empty. Give another folder as out, --resume to go on with its run, or --overwrite to replace it."
            )
        if not self.config.is_file():
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
            for path in (self.model, self.checkpoints):
                if path.exists():
                    shutil.rmtree(path)
            for path in {self.config, self.metrics, self.summary, self.dropped, self.dropped_held_out}.difference(keep):
                path.unlink(missing_ok=True)
        except OSError as error:
            raise RunError(f"cannot delete the run in {self.path}: {error}. Delete it by hand, or give another folder as out.") from None

    def write_config(self, values: Mapping[str, Any]) -> None:
        """All settings as a file that `prefopt train --config` takes.

        Raises:
            RunError: it cannot be written.
        """
        _write_whole(self.config, yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """The final figures.

        Raises:
            RunError: they cannot be written.
        """
        _write_whole(self.summary, json.dumps(summary, indent=2) + "\n")

    def read_summary(self) -> dict[str, Any] | None:
        """The figures of a finished run; None where there are none."""
        try:
            summary: dict[str, Any] = json.loads(self.summary.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return summary

    def add_row(self, row: Mapping[str, float]) -> None:
        """A step's metrics.

        Raises:
            RunError: they cannot be written.
        """
        try:
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise _cannot_write(self.metrics, error) from None

    def keep_rows(self, steps: int) -> None:
        """Leave the rows of the first steps: those after the checkpoint are about to be made again.

        Raises:
            RunError: they cannot be written; all rows are as they were.
        """
        if self.metrics.is_file():
            rows = self.metrics.read_text(encoding="utf-8").split("\n")
            _write_whole(self.metrics, "".join(f"{row}\n" for row in rows[:steps] if row))

    def last_row(self) -> dict[str, float]:
        """The newest metrics; empty where there are none."""
        rows = self.metrics.read_text(encoding="utf-8").strip().split("\n") if self.metrics.is_file() else [""]
        return json.loads(rows[-1]) if rows[-1] else {}


def _write_whole(path: Path, text: str) -> None:
    """The file appears whole or not at all."""
    draft = path.with_name(f".{path.name}.new")
    try:
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)
    except OSError as error:
        raise _cannot_write(path, error) from None


def _cannot_write(path: Path, error: OSError) -> RunError:
    return RunError(f"cannot write {path}: {error.strerror}. Make room, and go on with --resume from the last checkpoint.")
