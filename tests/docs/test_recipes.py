"""Recipes run as they are, with nothing but model, data and folder changed, and say what they gave."""

import json
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.command_line import prefopt
from tests.docs.pages import ROOT

from prefopt.config import read_yaml

RECIPES = ROOT / "recipes"
PAIRS = [{"prompt": f"How wide is sea {n}?", "chosen": f" It is {n} miles.", "rejected": f" Who knows {n}."} for n in range(20)]
THUMBS = [{"prompt": f"How wide is sea {n}?", "completion": f" It is {n} miles.", "label": n % 3 == 0} for n in range(20)]
RANKED = [{"prompt": f"How wide is sea {n}?", "completions": [f" {n}.", " 1.", " 2."], "scores": [3, 2, 1]} for n in range(3, 23)]

DATA: dict[str, list[dict[str, Any]]] = {"pairs": PAIRS, "thumbs": THUMBS, "ranks": RANKED, "code": PAIRS, "summaries": PAIRS}
"""What each kind of data looks like."""

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", DATA)
def test_a_recipe_runs(name: str, tmp_path: Path, model_folder: Callable[..., Path]):
    data = written(tmp_path / "data.jsonl", DATA[name])
    words = ("--model", str(model_folder()), "--data", str(data), "--out", str(tmp_path / "run"), "--samples", "0")
    said = prefopt("train", "--config", str(RECIPES / f"{name}.yaml"), *words).check()
    assert said.code == 0, said.err
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["after"]


@pytest.mark.parametrize("name", DATA)
def test_a_recipe_says_what_it_gave(name: str):
    text = (RECIPES / f"{name}.yaml").read_text()
    assert "not measured" not in text
    said = " ".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
    assert re.search(r"Measured( on [\w, ]+)?: .*\d", said), said
    assert read_yaml(RECIPES / f"{name}.yaml")["model"] == "runs/sft/model"


def test_every_recipe_is_listed():
    page = (RECIPES / "README.md").read_text()
    listed = {path.name for path in RECIPES.iterdir() if path.name in page}
    split = {"hh_split.py"}  # hh-small.yaml names it
    assert listed | split | {"README.md"} == {path.name for path in RECIPES.iterdir() if path.is_file()}


def test_graded_answers_become_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    graded = [("a", "right", 1), ("a", "wrong", 0), ("a", "right too", 1), ("a", "wrong too", 0), ("a", "never", 0), ("b", "alone", 1)]
    rows = [{"prompt": prompt, "completion": text, "label": label} for prompt, text, label in graded]
    out = tmp_path / "made" / "pairs.jsonl"
    runpy.run_path(str(RECIPES / "graded_pairs.py"))["main"](str(written(tmp_path / "graded.jsonl", rows)), out)
    assert [json.loads(line) for line in out.read_text().splitlines()] == [
        {"prompt": "a", "chosen": "right", "rejected": "wrong"},
        {"prompt": "a", "chosen": "right too", "rejected": "wrong too"},
    ]
    assert "2 pairs of 6 answers to 2 questions; 1 questions give none" in capsys.readouterr().out
