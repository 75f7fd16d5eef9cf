"""The harness as a whole: prefopt against itself, and against TRL where it is installed."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bench.versus.__main__ import command_line, main
from bench.versus.tables import as_markdown

ROOT = Path(__file__).parents[2]
TINY = ("--shape", "1m", "--batch", "2", "--blocks", "2", "--block-steps", "2", "--precision", "float32", "--device", "cpu")
SHORT = ("--prompt-tokens", "24", "--completion-tokens", "8", "--learning-rate", "1e-3")


def versus(out: Path, *words: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.versus", *TINY, *SHORT, "--out", str(out), *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def test_mistakes_end_before_anything_is_made(capsys: pytest.CaptureFixture[str]):
    assert main([*TINY, "--contestants", "prefop"]) == 2
    assert main([*TINY, "--contestants", "trl", "--workload", "k4", "--prompt-tokens", "0"]) == 2
    told = capsys.readouterr().err
    assert "did you mean prefopt" in told
    assert "--prompt-tokens must be 1 or more" in told


def test_the_written_command_names_no_folder_of_this_machine():
    given = ["--data", "/home/somebody/data", "--out=/tmp/x/r.json", "--set", "prefopt:max_tokens=1"]
    assert command_line(given) == "python -m bench.versus --data data --out=r.json --set prefopt:max_tokens=1"


@pytest.mark.slow
def test_prefopt_against_itself(tmp_path: Path):
    """Two processes of the same do the same to the bit; without sharing the losses agree and each block saw the same pairs."""
    names = ["prefopt", "prefopt-again", "prefopt-warm", "prefopt-plain", "prefopt@k2"]
    found = versus(tmp_path / "result.json", "--workload", "k4", "--contestants", ",".join(names))
    entries = {entry["label"]: entry for entry in found["contestants"]}
    assert list(entries) == names
    assert all(entry["failure"] == "" for entry in entries.values())
    first = entries["prefopt"]["losses"]
    assert len(first) == 6
    assert len({round(loss, 6) for loss in first}) > 1
    assert entries["prefopt-again"]["losses"] == entries["prefopt-warm"]["losses"] == first
    assert entries["prefopt-plain"]["loss_difference"]["largest"] < 1e-4
    assert entries["prefopt-warm"]["was_warm"] is True
    assert entries["prefopt-warm"]["reference_seconds"] == 0 < entries["prefopt"]["reference_seconds"]
    assert [block["tokens"] for block in entries["prefopt"]["blocks"]] == [4 * (24 + 4 * 8)] * 2
    assert [block["pairs"] for block in entries["prefopt"]["blocks"]] == [4 * 2] * 2
    assert [block["tokens"] for block in entries["prefopt@k2"]["blocks"]] == [4 * (24 + 2 * 8)] * 2
    assert entries["prefopt-plain"]["options"]["engine"].startswith("plain")
    assert entries["prefopt"]["memory"]["peak"] >= entries["prefopt"]["memory"]["before"] > 0
    assert entries["prefopt"]["time_steps"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert found["matrix_rate"]["median"] > 0
    table = as_markdown(found)
    assert (tmp_path / "result.md").read_text() == table
    assert str(tmp_path) not in table
    assert table.count("| share of matrix rate |") == 1


@pytest.mark.slow
def test_tokenisation_alone(tmp_path: Path):
    found = versus(tmp_path / "result.json", "--workload", "no-prefix", "--only", "tokenise", "--contestants", "prefopt,prefopt-again")
    assert all(entry["rows_per_second"]["median"] > 0 for entry in found["contestants"])
    assert found["contestants"][0]["time"] == {"median": 1.0, "low": 1.0, "high": 1.0}


@pytest.mark.slow
def test_trl_sees_the_same_and_learns_the_same(tmp_path: Path):
    """The same tokens in the same order, and in float32 the same loss at every step, whatever TRL's pairs per pass."""
    found = versus(
        tmp_path / "result.json", "--workload", "long-prompt", "--contestants", "prefopt,trl,trl-best", "--checkpointing", "as-it-comes"
    )
    _, trl, best = found["contestants"]
    for entry in (trl, best):
        assert entry["failure"] == ""
        assert entry["tokens"] == {"rows": 12, "kept": 12, "different": 0, "first": None}
        assert entry["loss_difference"]["steps"] == 6
        assert entry["loss_difference"]["largest"] < 1e-5
    assert trl["options"]["gradient_checkpointing"] == "True"
    assert found["search"][0]["pairs_per_pass"] == 1
    assert best["reference_seconds"] > 0 == trl["reference_seconds"]
