"""Every method through the command line, on public preference data: that it runs there, what it takes, and what held-out figures do.

    python -m bench.methods.real --data DATA --out FILE.md        DATA holds the files (or PREFOPT_SHARED names it)
    python -m bench.methods.real ... --world FOLDER               also on the quickstart's world, as `bench.methods` or the
                                                                  quickstart left it (sft/model, pairs.jsonl, held_out_pairs.jsonl)

All methods run on hh-rlhf, from one small model that was made and fine-tuned here; KTO and BCO also on thumbs (the KTO demo, right
and wrong solutions of gsm8k), and what reads rankings on Open-Assistant's trees. The learning rate is the one that each method takes
by itself. The runs are short and the model is small: the table shows that methods run on real rows and which way they go, not
which is best.

FILE.jsonl beside the table holds what was found. A file that is there is gone on with. A command that fails is a row of the table too, the
others go on, and this one ends with 1; called again, it tries those that failed.
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
from bench.methods.book import Book, Line, key
from bench.small_hh import COMMON, Start, prepare, said
from bench.versus.contestants import UsageError

from prefopt.methods.table import METHODS

SHAPE = {"hidden": 192, "layers": 4}
HELD_OUT = 0.25
"""Of the files that come without held-out rows."""

THUMBS: Mapping[str, Mapping[str, str]] = {"kto": {}, "bco": {"unpaired": "on"}}
"""What reads thumbs, and what it is told for that."""

SKIPPED = ("data", "eval-data", "eval-fraction", "model")
"""Flags that the table says elsewhere."""

HEAD = ("data", "method", "settings", "examples", "steps", "held-out loss", "held-out accuracy", "seconds", "peak GB")


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

    @property
    def settings(self) -> str:
        """The flags that make it another run than others of the method on these rows."""
        return " ".join(f"--{name} {value}" for name, value in self.flags.items() if name not in SKIPPED)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("PREFOPT_SHARED", ".")), help="folder of the public data")
    parser.add_argument("--out", type=Path, required=True, help="FILE.md, the table; FILE.jsonl beside it")
    parser.add_argument("--work", type=Path, help="folder for the model and the runs; the default is one that goes")
    parser.add_argument("--world", type=Path, help="folder of the quickstart's world")
    parser.add_argument("--pairs", type=int, default=256, help="of hh-rlhf")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--first", type=int, help="only so many runs, to see whether they do")
    given = parser.parse_args(words)
    book = Book(given.out.with_suffix(".jsonl"))
    with tempfile.TemporaryDirectory() as folder:
        work = given.work or Path(folder)
        start = prepare(work, given.data, num_pairs=given.pairs, **SHAPE)
        todo = [*jobs(given.data, work, start), *(on_world(given.world) if given.world else ())][: given.first]
        lines = [asked(job, given) for job in todo]
        for job, line in zip(todo, lines, strict=True):
            if (found := book.find(line)) is None:
                found = line | run(job, work / "runs", given.epochs)
                book.add(found)
            print(row(found), flush=True)
            given.out.write_text(page(book, lines), encoding="utf-8")
    if failed := sum(book.find(line) is None for line in lines):
        sys.exit(f"{failed} of {len(lines)} runs failed: {given.out} says why. The same command tries them again.")


def asked(job: Job, given: argparse.Namespace) -> Line:
    """What is to be run, without where its files are."""
    own = {"settings": job.settings, "pairs": given.pairs, "epochs": given.epochs}
    return {"kind": "real", "name": job.data, "method": job.method, "settings": own}


def jobs(data: Path, work: Path, start: Start) -> Iterator[Job]:
    """All runs from the small model.

    Args:
        data: folder of the public data.
        work: folder for what is made of it.
        start: the model, and the pairs of hh-rlhf.

    Raises:
        UsageError: a file is not there.
    """
    model = {"model": str(start.model)}
    pairs = {**model, "data": str(start.pairs), "eval-data": str(start.held_out)}
    for method in METHODS:
        yield Job("hh-rlhf", method.name, pairs)
    for adapter in ({}, {"lora-rank": "8"}):
        yield Job("hh-rlhf", "dpo", {**pairs, **adapter, "sync-reference-every-steps": "4"})
    split = {**model, "eval-fraction": str(HELD_OUT)}
    thumbs = {
        "kto_en_demo": {"data": str(there(data / "llamafactory-demo/kto_en_demo.json")), **split},
        "gsm8k solutions": {"data": str(solutions(there(data / "gsm8k/example_model_solutions.jsonl"), work)), **split},
    }
    for name, flags in thumbs.items():
        for method, own in THUMBS.items():
            yield Job(name, method, {**flags, **own})
    ranked = {"data": str(there(data / "open-assistant/en_100_tree.jsonl")), **split}
    for method in ("dpo", "reward"):
        for way in ("plackett-luce", "all-pairs"):
            yield Job("Open-Assistant", method, {**ranked, way: "on"})


def on_world(folder: Path) -> Iterator[Job]:
    """All methods on the quickstart's world, from its SFT model.

    Raises:
        UsageError: the folder holds none.
    """
    if not (folder / "sft" / "model").is_dir():
        raise UsageError(f"{folder} holds no sft/model. Give the folder of a quickstart, or a world-SEED of bench.methods.")
    flags = {"model": str(folder / "sft" / "model"), "max-length": "256"}
    flags |= {"data": str(there(folder / "pairs.jsonl")), "eval-data": str(there(folder / "held_out_pairs.jsonl"))}
    for method in METHODS:
        yield Job("quickstart", method.name, flags)
    yield Job("quickstart", "bco", {**flags, **THUMBS["bco"]})


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


def run(job: Job, folder: Path, epochs: float) -> Line:
    """What the command leaves in its summary; or why it failed."""
    done = subprocess.run([sys.executable, "-m", "prefopt", *words_of(job, folder, epochs)], check=False, capture_output=True, text=True)
    if done.returncode:
        return {"failed": f"ended with {done.returncode}: {done.stderr.strip()[-2000:]}"}
    summary = json.loads((folder / "run/summary.json").read_text(encoding="utf-8"))
    kept = ("steps", "before", "after", "seconds", "peak_memory_gb")
    return {"examples": summary["data"]["num_train"], **{name: summary[name] for name in kept}}


def words_of(job: Job, folder: Path, epochs: float) -> list[str]:
    """The words of the command behind `prefopt`."""
    common = {**COMMON, "epochs": epochs, "cache_dir": folder / "cache", "out": folder / "run", "overwrite": True}
    flags = {name.replace("_", "-"): value_of(value) for name, value in common.items()} | dict(job.flags)
    return ["train", job.method, *(word for name, value in flags.items() for word in (f"--{name}", value))]


def value_of(value: Any) -> str:
    """A setting's value as the command line takes it."""
    return ("on" if value else "off") if isinstance(value, bool) else str(value)


def page(book: Book, lines: Sequence[Line]) -> str:
    """The table of what is done so far."""
    where = f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, python {platform.python_version()}, torch {torch.__version__}"
    found = {key(line): line for line in book.lines()}
    done = [found[key(line)] for line in lines if key(line) in found]
    head = ["| " + " | ".join(HEAD) + " |", "|---" * len(HEAD) + "|"]
    return "\n".join([f"{where}; `python -m bench.methods.real`", "", *head, *map(row, done), ""])


def row(line: Line) -> str:
    """A run in the table."""
    first = [line["name"], line["method"], line["settings"]["settings"]]
    if "failed" in line:
        said = " ".join(line["failed"].split()).replace("|", "\\|")
        return "| " + " | ".join([*first, f"**failed**: {said[-300:]}", *[""] * (len(HEAD) - len(first) - 1)]) + " |"
    before, after = line["before"], line["after"]
    accuracy = "eval/rewards/accuracy"
    cells = [
        *first,
        f"{line['examples']:,}",
        str(line["steps"]),
        f"{before['eval/loss']:.3f} -> {after['eval/loss']:.3f}",
        f"{before[accuracy]:.2f} -> {after[accuracy]:.2f}" if accuracy in after else "",
        f"{line['seconds']:.0f}",
        f"{line['peak_memory_gb']:.2f}",
    ]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    said(main)
