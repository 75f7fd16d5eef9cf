"""What `prefopt plan` predicts against what is then measured: memory and time of real runs on real pairs.

python -m bench.plan_check --data DIR                  all rows, and the table
python -m bench.plan_check --data DIR --only 0 3       some of them
python -m bench.plan_check --data DIR --add FILE       those rows, put with those of FILE, which is written anew
python -m bench.plan_check --made 0.5b --device cuda   that shape in bf16, in full and with LoRA, on made-up texts of hh-rlhf's lengths

Each row plans a run, then takes its first steps in a process of its own: hh-rlhf pairs, steps of 16, rows of at most 2,048 tokens.
Memory is the most that the process held, Python and its libraries included; on a GPU what torch's allocator held. Time is the
median of the steps after the second (the first ones also wait for memory that the system gives for the first time), and the
reference pass before them. The plan is made before the run and after it, and the mean of its times counts: what the two differ by
is the machine's own.
The rows in 4 bits stand last and need bitsandbytes (`pip install 'prefopt[bits]'`).
DIR holds hh-rlhf/harmless-base.jsonl.gz; PREFOPT_SHARED is the default.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
import transformers
from bench.versus.shapes import SHAPES, make_model
from bench.versus.workloads import choose_rows, real_rows, rows_for, tokenizer_texts, train_tokenizer

from prefopt.pipeline.plan_measure import run_steps

ROWS: list[dict[str, Any]] = [
    {"shape": shape, "way": way, "precision": precision}
    for shape in ("10m", "32m", "135m")
    for way in ("full", "LoRA 16")
    for precision in ("float32", "bf16")
] + [{"shape": shape, "way": "QLoRA 16", "precision": "bf16"} for shape in ("10m", "32m")]
MADE_WAYS = ("full", "LoRA 16")
STEPS = {"10m": 12, "32m": 8, "135m": 4}
MADE_STEPS = 12
LENGTHS = Path(__file__).parent / "lengths" / "hh.json"
BATCH, MAX_TOKENS, MAX_LENGTH = 16, 2048, 1024
BAR = 0.15

CHILD = """
import json, sys
from prefopt.machine import prepare_environment
prepare_environment()
from prefopt.pipeline.plan import plan
from prefopt.pipeline.plan_settings import PlanSettings
found = plan(PlanSettings(**json.loads(sys.argv[1])), only=sys.argv[2])
(way,) = found.ways
print(json.dumps({
    "total": way.fit.estimate.total + found.process,
    "step": way.times.step,
    "reference": way.times.reference,
    "parts": way.fit.estimate.lines("Python and its libraries", found.process),
}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("PREFOPT_SHARED"))
    parser.add_argument("--only", type=int, nargs="*", help="rows by number; the default is all")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--made", choices=SHAPES, help="that shape on made-up texts, in place of the rows on real data")
    parser.add_argument("--add", type=Path, help="JSON file of rows that were measured before")
    given = parser.parse_args()
    if given.data is None and not given.made:
        sys.exit("give the folder of real data as --data, or in PREFOPT_SHARED")
    data = None if given.made else Path(given.data)
    precision = "float32" if given.device == "cpu" else "bf16"
    rows = [{"shape": given.made, "way": way, "precision": precision} for way in MADE_WAYS] if given.made else ROWS
    found = json.loads(given.add.read_text()) if given.add and given.add.is_file() else {}
    with tempfile.TemporaryDirectory() as folder:
        for index in range(len(rows)) if given.only is None else given.only:
            row = check(rows[index], data, Path(folder), given.device)
            found[str(index)] = row
            print(line(row), flush=True)
            if given.add:
                given.add.write_text(json.dumps(found, indent=1))
    print("\n" + table(found))


def check(row: dict[str, Any], data: Path | None, folder: Path, device: str) -> dict[str, Any]:
    """Plan it, run it; without real data on made-up texts."""
    shape = SHAPES[row["shape"]]
    place = folder / row["shape"]
    steps = STEPS[row["shape"]] if data else MADE_STEPS
    if not place.exists():
        name = "hh" if data else "lengths"
        tokenizer = train_tokenizer(tokenizer_texts(name, data)[:6000], vocabulary=min(shape.vocabulary, 16384))
        make_model(shape, tokenizer, place, seed=0, device=device)
        made = {"seed": 0, "data": None, "lengths": LENGTHS, "sizes": (None, None), "max_length": MAX_LENGTH}
        texts = real_rows("hh", data) if data else rows_for("lengths", steps * BATCH, tokenizer, **made)[0]
        choose_rows(name, texts, steps * BATCH, 2, place / "data", tokenizer, max_length=MAX_LENGTH)
    common = {
        "model": str(place),
        "data": [str(place / "data/pairs.jsonl")],
        "data_format": "text_pair",
        "batch_size": BATCH,
        "max_tokens": MAX_TOKENS,
        "max_length": MAX_LENGTH,
        "precision": row["precision"],
    }
    asked = {**common, "device": device}
    told = planned(asked, row["way"])
    adapter = {} if row["way"] == "full" else {"lora_rank": 16, "load_in_4bit": row["way"].startswith("QLoRA")}
    out = folder / f"{row['shape']}-{row['way'].split()[0]}-{row['precision']}"
    out.mkdir()
    values = {
        **common,
        **adapter,
        "out": str(out / "run"),
        "cache_dir": str(out / "cache"),
        "device": device,
        "gradient_checkpointing": "off",
    }
    rows, reference = run_steps(values, "dpo", steps)
    after = planned(asked, row["way"])  # the machine is not as fast at all times: what it was before and what it is after
    return {
        **row,
        "memory": [told["total"], rows[-1]["memory_gb"] * 1e9],
        "step": [mean((told["step"], after["step"])), median(own["seconds"] for own in rows[2:])],
        "reference": [mean((told["reference"], after["reference"])), reference],
        "noise": after["step"] / told["step"],
        "parts": told["parts"],
    }


def planned(settings: dict[str, Any], way: str) -> dict[str, Any]:
    """The plan of one way, made in a process of its own as `prefopt plan` is."""
    command = [sys.executable, "-c", CHILD, json.dumps(settings), way]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    cells = [f"| {row['shape']}, {row['way']}, {row['precision']} "]
    for name, number in (("memory", lambda value: f"{value / 1e9:.2f}"), ("step", "{:.2f}".format), ("reference", "{:.1f}".format)):
        predicted, measured = row[name]
        ratio = predicted / measured if measured else float("nan")
        cells.append(f"| {number(predicted)} | {number(measured)} | {ratio:.2f}{' *' if abs(ratio - 1) > BAR else ''} ")
    return "".join(cells) + f"| {row['noise']:.2f} |"


def table(found: dict[str, Any]) -> str:
    """All rows, as Markdown."""
    head = (
        "| run | memory GB | measured | ratio | step s | measured | ratio | reference s | measured | ratio | after / before |\n"
        "|---|---|---|---|---|---|---|---|---|---|---|"
    )
    where = f"{date.today()}, {platform.processor() or platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    versions = f"python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    rows = "\n".join(line(found[key]) for key in sorted(found, key=int))
    return f"{where}; {versions}\n\n{head}\n{rows}\n\n`*`: more than {BAR:.0%} off."


if __name__ == "__main__":
    main()
