"""`metrics.jsonl` by columns."""

import json
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefopt.report.text import number


@dataclass(slots=True)
class Curve:
    """One metric over the steps, as two columns of the same length; values that were not finite are not in it."""

    steps: "array[float]" = field(default_factory=lambda: array("d"))
    values: "array[float]" = field(default_factory=lambda: array("d"))

    def __len__(self) -> int:
        return len(self.steps)

    def add(self, step: float, value: float) -> None:
        """One more value."""
        self.steps.append(step)
        self.values.append(value)


@dataclass(slots=True)
class Metrics:
    """`metrics.jsonl` by columns: a run of many steps would not fit in memory by rows.

    Attributes:
        curves: metric -> its values.
        last_step: of the newest row; 0 before the first.
        num_rows: rows read.
        num_unread: lines that are no rows; a last one that is still being written is not counted.
    """

    curves: dict[str, Curve] = field(default_factory=dict)
    last_step: int = 0
    num_rows: int = 0
    num_unread: int = 0

    def curve(self, name: str) -> Curve:
        """A metric's values; empty where there are none."""
        return self.curves.get(name) or Curve()

    def newest(self, name: str) -> float | None:
        """A metric's newest value."""
        curve = self.curves.get(name)
        return curve.values[-1] if curve else None

    def add(self, row: Mapping[str, Any]) -> None:
        """One more row; one without a step follows the row before it."""
        numbers = {name: found for name, value in row.items() if (found := number(value)) is not None}
        step = numbers.pop("step", self.last_step + 1.0)
        for name, value in numbers.items():
            if name not in self.curves:
                self.curves[name] = Curve()
            self.curves[name].add(step, value)
        self.last_step = int(step)
        self.num_rows += 1


def read_metrics(path: Path) -> Metrics:
    """The metrics, line by line."""
    metrics = Metrics()
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    row = None
                if isinstance(row, dict):
                    metrics.add(row)
                elif line.strip() and line.endswith("\n"):
                    metrics.num_unread += 1
    except OSError:
        pass
    return metrics
