"""What the examples of the docs find in the folder that they run in."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.training.runs import pair_rows


@pytest.fixture
def workshop(tmp_path: Path, model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a tiny model and small data under the names that pages use; examples run in it.

    model, MODEL, runs/sft    a tiny random chat model
    pairs.csv, pairs.jsonl    pairs as text
    demonstrations.csv, .jsonl
    """
    rows = pair_rows(12)
    for name in ("model", "runs/sft/model"):
        shutil.copytree(model_folder(), tmp_path / name)
    demonstrations = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    for name, values in (("pairs", rows), ("demonstrations", demonstrations)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(value) + "\n" for value in values))
        with (tmp_path / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(values[0]))
            writer.writeheader()
            writer.writerows(values)
    monkeypatch.chdir(tmp_path)
    return tmp_path
