"""Every method through the command line on public preference data: that it runs there, what it takes, and what held-out figures do.

    python -m bench.methods.real --data DATA --out FILE.md        DATA holds the files (or PREFOPT_SHARED names it)

All methods run on hh-rlhf, from one small model that was made and fine-tuned here; KTO and BCO also on thumbs (the KTO demo, right
and wrong solutions of gsm8k), and what reads rankings on Open-Assistant's trees. The runs are short and the model is small: the table
shows that methods run on real rows and whether they learn what they are meant to, not which is best.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from bench.small_hh import COMMON, prepare, said
from bench.versus.contestants import UsageError

from prefopt.methods.table import METHODS

SHAPE = {"hidden": 192, "layers": 4}
HELD_OUT = 0.25
"""Of the files that come without held-out rows."""


@dataclass(frozen=True, slots=True)
class Job:
    """A run.

    Attributes:
        data: what the table calls the rows.
        method: its name on the command line.
        flags: beside those of all runs.
    """

    data: str
    method: str
    flags: Mapping[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("PREFOPT_SHARED", ".")), help="folder of the public data")
    parser.add_argument("--out", type=Path, required=True, help="the table")
    parser.add_argument("--work", type=Path, help="folder for the model and the runs; the default is one that goes")
    parser.add_argument("--pairs", type=int, default=256)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = given.work or Path(folder)
        start = prepare(work, given.data, num_pairs=given.pairs, **SHAPE)
        pairs = {"data": str(start.pairs), "eval-data": str(start.held_out)}
        lines = []
        for job in jobs(given.data, work, pairs):
            lines.append(line(job, run(job, start.model, work / "runs", given)))
            print(lines[-1], flush=True)
    where = f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, python {platform.python_version()}, torch {torch.__version__}"
    head = "| data | method | settings | examples | steps | held-out loss | held-out accuracy | seconds | peak GB |\n" + "|---" * 9 + "|"
    given.out.write_text("\n".join([f"{where}; `python -m bench.methods.real`", "", head, *lines, ""]), encoding="utf-8")


def jobs(data: Path, work: Path, pairs: Mapping[str, str]) -> Iterator[Job]:
    """All runs."""
    for row in METHODS:
        yield Job("hh-rlhf", row.name, pairs)
    for sync in ({}, {"lora-rank": "8"}):
        yield Job("hh-rlhf", "dpo", {**pairs, **sync, "sync-reference-every-steps": "4"})
    split = {"eval-fraction": str(HELD_OUT)}
    thumbs = {
        "kto_en_demo": {"data": str(there(data / "llamafactory-demo/kto_en_demo.json")), **split},
        "gsm8k solutions": {"data": str(solutions(there(data / "gsm8k/example_model_solutions.jsonl"), work)), **split},
    }
    for name, flags in thumbs.items():
        for method in ("kto", "bco"):
            yield Job(name, method, flags)
    ranked = {"data": str(there(data / "open-assistant/en_100_tree.jsonl")), **split}
    for method in ("dpo", "reward"):
        for way in ("plackett-luce", "all-pairs"):
            yield Job("Open-Assistant", method, {**ranked, way: ""})


def there(path: Path) -> Path:
    """The path of a file that exists.

    Raises:
        UsageError: it does not.
    """
    if not path.is_file():
        raise UsageError(f"{path} is not there. Give the folder of the public data as --data, or in PREFOPT_SHARED.")
    return path


def solutions(source: Path, work: Path) -> Path:
    """Solutions of four models to grade-school problems, marked as right or wrong, as thumbs: every fourth problem."""
    rows = []
    for problem in map(json.loads, source.read_text(encoding="utf-8").splitlines()[::4]):
        answers = [entry for entry in problem.values() if isinstance(entry, dict)]
        rows += [{"prompt": problem["question"], "completion": each["solution"], "label": each["is_correct"]} for each in answers]
    out = work / "solutions.jsonl"
    out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return out


def run(job: Job, model: Path, folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """The run's summary.

    Raises:
        UsageError: it fails.
    """
    common = {**COMMON, "epochs": given.epochs, "learning_rate": given.learning_rate, "cache_dir": folder / "cache"}
    common |= {"out": folder / "run", "overwrite": True, "model": model}
    flags = {name.replace("_", "-"): str(value) for name, value in common.items()} | dict(job.flags)
    command = [sys.executable, "-m", "prefopt", "train", job.method, *arguments(flags)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise UsageError(f"{job.method} on {job.data} ended with {done.returncode}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads((folder / "run/summary.json").read_text(encoding="utf-8"))
    return found


def arguments(flags: Mapping[str, str]) -> Sequence[str]:
    """Flags as the command line takes them; true and false are switches, as is what has no value."""
    found: list[str] = []
    for name, value in flags.items():
        found += [f"--no-{name}"] if value == "False" else [f"--{name}"] if value in ("", "True") else [f"--{name}", value]
    return found


def line(job: Job, summary: Mapping[str, Any]) -> str:
    """A row of the table."""
    settings = " ".join(
        f"--{name} {value}".strip() for name, value in job.flags.items() if name not in ("data", "eval-data", "eval-fraction")
    )
    before, after = summary["before"], summary["after"]
    accuracy = "eval/rewards/accuracy"
    learned = f"{before[accuracy]:.2f} -> {after[accuracy]:.2f}" if accuracy in after else ""
    cells = [
        job.data,
        job.method,
        settings,
        f"{summary['data']['num_train']:,}",
        str(summary["steps"]),
        f"{before['eval/loss']:.3f} -> {after['eval/loss']:.3f}",
        learned,
        f"{summary['seconds']:.0f}",
        f"{summary['peak_memory_gb']:.2f}",
    ]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    said(main)
