"""The page about metrics explains every key that a run writes, and none that it does not."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.docs.pages import ROOT
from tests.training.runs import pair_rows, rows, run, write_rows

PAGE = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")

FIGURES = ("before", "after", "last_step")
"""Objects of the summary that hold metrics."""

LEAVES = ("data.summary.sources", "data.summary.dropped", "data.summary.branches")
"""Objects of the summary whose keys are those of the data."""


@pytest.fixture(scope="module")
def files(model_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[set[str], set[str]]:
    """The keys of `metrics.jsonl` and of `summary.json` of small runs: with pairs and without, with all that can be measured."""
    folder = tmp_path_factory.mktemp("runs")
    data, held_out = write_rows(folder / "pairs.jsonl", pair_rows(12)), write_rows(folder / "held_out.jsonl", pair_rows(3))
    common: dict[str, Any] = {"samples": 1, "sample_tokens": 4, "eval_every_steps": 2, "max_steps": 4}
    runs = [
        run("dpo", model_folder(), data, folder / "dpo", eval_fraction=0.3, **common),
        run("dpo", model_folder(), data, folder / "lora", eval_data=held_out, lora_rank=2, early_stop=1, **common),
        run("sft", model_folder(), data, folder / "sft", eval_data=held_out, **common),
        run("kto", model_folder(), data, folder / "kto", eval_data=held_out, **common),
        run("reward", model_folder(), data, folder / "reward", eval_data=held_out, **common),
        run("dpo", model_folder(), data, folder / "bare", max_steps=1),
    ]
    metrics = {name for result in runs for row in rows(result.folder) for name in row}
    summaries = [json.loads((result.folder / "summary.json").read_text()) for result in runs]
    return metrics, {key for summary in summaries for key in keys(summary)}


def keys(values: Mapping[str, Any], before: str = "") -> Iterator[str]:
    """The keys of a summary, inner ones with dots."""
    for name, value in values.items():
        key = f"{before}{name}"
        if isinstance(value, dict) and key not in FIGURES and plain(key) not in LEAVES:
            yield from keys(value, f"{key}.")
        else:
            yield plain(key)


def plain(key: str) -> str:
    """Held-out data are accounted for with the keys of training data."""
    return key.replace("data.eval_summary.", "data.summary.")


def spans_in(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def test_every_metric_is_explained_and_no_other(files: tuple[set[str], set[str]]):
    explained = [name for heading in re.findall(r"^### (.+)$", PAGE, re.MULTILINE) for name in spans_in(heading)]
    assert len(explained) == len(set(explained))
    assert set(explained) == files[0]


def test_every_key_of_the_summary_is_explained_and_no_other(files: tuple[set[str], set[str]]):
    explained = [name for cell in re.findall(r"^\| (`[^|]+) \|", PAGE, re.MULTILINE) for name in spans_in(cell)]
    assert len(explained) == len(set(explained))
    assert set(explained) == files[1] - {"best"}  # null where nothing is compared; the text says so


def test_a_metric_has_more_than_its_name():
    sections = re.split(r"^### .+$", PAGE, flags=re.MULTILINE)[1:]
    assert all(len(section.split("\n## ")[0].split()) >= 8 for section in sections)
