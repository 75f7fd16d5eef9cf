"""Small runs for the tests of the training room: their data, and what they leave."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prefopt.training.run import RunResult, train_with
from prefopt.training.terminal.narrator import Quiet

TIMES = ("tokens_per_second", "examples_per_second", "seconds", "memory_gb")
"""Metrics that differ from run to run."""

ENDINGS = ["at all", "of course", "my friend", "I think", "as ever", "again", "today", "to you", "if so", "by far", "for now", "and you"]


def pair_rows(num: int = 12) -> list[dict[str, Any]]:
    """Pairs that a small model can learn: yes is better than no, whatever was asked."""
    return [
        {
            "prompt": f"Is number {index} good{' or very good' * (index % 3)}?",
            "chosen": f" yes, it is {ENDINGS[index % 12]}",
            "rejected": f" no, it is not {ENDINGS[(index + 5) % 12]}",
        }
        for index in range(num)
    ]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(method: str, model: Path | str, data: str, out: Path, **settings: Any) -> RunResult:
    """A run of six steps, two of them in a second epoch."""
    small = {"batch_size": 4, "epochs": 2, "learning_rate": 1e-3, "max_length": 128, "device": "cpu", "precision": "float32"}
    small |= {"samples": 0, "report": False, "memory_check": False}  # each has tests of its own
    settings = {"narrator": Quiet(), "cache_dir": out.parent / "cache"} | small | settings
    return train_with(method, model=str(model), data=data, out=out, **settings)


def rows(folder: Path) -> list[dict[str, float]]:
    """The lines of `metrics.jsonl`."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in rows(folder)]


def figures(folder: Path) -> list[dict[str, float]]:
    """All metrics but those that measure time and memory."""
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows(folder)]


def weights(folder: Path) -> dict[str, bytes]:
    """The saved model's or adapter's weights, as they lie on disk."""
    return {path.name: path.read_bytes() for path in sorted((folder / "model").glob("*.safetensors"))}


class Asks(Quiet):
    """Calls `at` when a step of the training is done, with the number of steps."""

    def __init__(self, at: Any) -> None:
        self.at = at
        self.said: list[str] = []

    def say(self, line: str) -> None:
        self.said.append(line)

    @contextmanager
    def progress(self, what: str, total: int, done: int = 0) -> Iterator[Any]:
        yield _Asking(self.at if what == "training" else lambda _: None)


class _Asking:
    def __init__(self, at: Any) -> None:
        self.at = at

    def step(self, done: int, row: Mapping[str, float]) -> None:
        self.at(done)
