"""The files of a run: their names, for whoever writes or reads them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class RunFiles:
    """Where the files of a run are.

    Attributes:
        path: of the run's folder.
    """

    path: Path

    @property
    def config(self) -> Path:
        """All settings, defaults included, as a YAML file that runs it again."""
        return self.path / "config.yaml"

    @property
    def manifest(self) -> Path:
        """What was run: settings, what was chosen for them, digests of data and model, versions, the machine. Written at the start."""
        return self.path / "manifest.json"

    @property
    def status(self) -> Path:
        """Whether the run is going on, finished, was stopped, or failed, and why."""
        return self.path / "status.json"

    @property
    def metrics(self) -> Path:
        """One JSON line per optimizer step; evaluations under `eval/...`, figures of samples under `samples/...`."""
        return self.path / "metrics.jsonl"

    @property
    def held_out(self) -> Path:
        """One JSON line per held-out example: its text, its figures before training and at the newest evaluation."""
        return self.path / "held_out.jsonl"

    @property
    def samples(self) -> Path:
        """One JSON line per answer that the model gave at an evaluation; those of step 0 are from before training."""
        return self.path / "samples.jsonl"

    @property
    def watch(self) -> Path:
        """One JSON line per thing that the watch found."""
        return self.path / "watch.jsonl"

    @property
    def bad_batch(self) -> Path:
        """The examples of the step whose loss or gradient was not finite, if that ended the run."""
        return self.path / "bad_batch.jsonl"

    @property
    def summary(self) -> Path:
        """The final figures."""
        return self.path / "summary.json"

    @property
    def report(self) -> Path:
        """One page about the run."""
        return self.path / "report.html"

    @property
    def model(self) -> Path:
        """The trained model."""
        return self.path / "model"

    @property
    def card(self) -> Path:
        """What the model's readers should know of it."""
        return self.model / "README.md"

    @property
    def checkpoints(self) -> Path:
        """What `--resume` reads."""
        return self.path / "checkpoints"

    @property
    def dropped(self) -> Path:
        """Rows that were left out, each with its reason; there where there are any."""
        return self.path / "dropped.jsonl"

    @property
    def dropped_held_out(self) -> Path:
        """The same of the held-out examples."""
        return self.path / "dropped-eval.jsonl"

    @property
    def lock(self) -> Path:
        """What a run holds while it goes: its process and its machine."""
        return self.path / ".lock"

    @property
    def reported(self) -> tuple[Path, ...]:
        """What TensorBoard, Weights & Biases and MLflow keep of it, and the ids under which they know it."""
        return tuple(self.path / name for name in ("tensorboard", "wandb", "mlruns", "mlflow-run-id"))

    @property
    def single(self) -> tuple[Path, ...]:
        """All that are files and not folders: what a new run in the same place replaces, beside `model` and `checkpoints`."""
        notes = (
            self.manifest,
            self.status,
            self.metrics,
            self.held_out,
            self.samples,
            self.watch,
            self.bad_batch,
            self.summary,
            self.report,
        )
        return (self.config, *notes, self.dropped, self.dropped_held_out)


def read_json(path: Path) -> dict[str, Any] | None:
    """The object that a file of a run holds; None where there is none that can be read."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects that a file holds, one per line; a line that a kill cut short is passed over."""
    rows: list[dict[str, Any]] = []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return rows
    for line in filter(None, lines):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows
