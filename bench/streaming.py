"""Data larger than memory: what reading, tokenising and training on made-up files of several sizes takes of it.

    python bench/streaming.py                      files of 30,000 and 300,000 pairs (about 50 and 500 MB)
    python bench/streaming.py --rows 3000 30000    smaller ones
    python bench/streaming.py --rows 1200000 --limit 1.5 --steps 330 --batch 64 --stages whole cold warm train

Each figure comes from a process of its own: the peak of its memory (VmHWM), and the same less what it took before it touched the
data. `cold` makes the file of trees, `warm` finds it in the cache and looks at trees in random order, `train` takes some steps of DPO
with a tiny model. What is bounded does not grow with the rows.

`--limit` is a hard limit of what a process may hold of its own (RLIMIT_DATA): what it asks for beyond that is refused. Pages of files
are not counted by it; the system drops those when it needs room. `whole` holds all rows at once and should not get through.
"""

import argparse
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PROMPT_WORDS, ANSWER_WORDS = 130, 60
LOOKED_AT = 20_000
MAX_TOKENS = 2048
"""Of a micro-batch: what its activations take must not hide what the data takes."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[30_000, 300_000])
    parser.add_argument("--work", type=Path, help="folder for files, kept; the default is a temporary one")
    parser.add_argument("--stages", nargs="+", default=["cold", "warm", "train"], choices=tuple(STAGES))
    parser.add_argument("--limit", type=float, help="GB that a process may hold, pages of files aside; the default is no limit")
    parser.add_argument("--steps", type=int, default=20, help="of the stage train")
    parser.add_argument("--batch", type=int, default=8, help="pairs of a step")
    parser.add_argument("--child", nargs=3, metavar=("STAGE", "FILE", "WORK"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        stage, file, work = given.child
        print(json.dumps(STAGES[stage](Path(file), Path(work), given)))
        return 0
    with tempfile.TemporaryDirectory(prefix="streaming-") as temporary:
        work = given.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        words = made_words()
        save_model(work / "model", words)
        print(f"{date.today()}, {platform.processor() or platform.machine()}, {os.cpu_count()} cores; python {platform.python_version()}")
        print(f"limit {given.limit} GB" if given.limit else "no limit")
        print(f"{'rows':>9} {'file MB':>8} {'stage':>6} {'seconds':>8} {'rows/s':>8} {'in all MB':>9} {'peak MB':>8} {'bytes/row':>10}")
        for rows in given.rows:
            file = work / f"pairs-{rows}.jsonl"
            if not file.exists():
                write_rows(file, rows, words)
            for stage in given.stages:
                print(
                    f"{rows:>9,} {file.stat().st_size / 1e6:>8.0f} {stage:>6} {told(in_process(stage, file, work, given), rows)}",
                    flush=True,
                )
    return 0


def told(found: dict[str, Any], rows: int) -> str:
    """The figures of a stage, or why it has none."""
    if "failure" in found:
        return found["failure"]
    speed = f"{rows / found['seconds']:,.0f}" if found["all_rows"] else ""
    return (
        f"{found['seconds']:>8.1f} {speed:>8} {found['in_all'] / 1e6:>9.0f} "
        f"{found['bytes'] / 1e6:>8.0f} {found['bytes'] / rows:>10,.0f}  {found.get('says', '')}"
    )


def in_process(stage: str, file: Path, work: Path, given: argparse.Namespace) -> dict[str, Any]:
    """A stage's figures, from a process of its own; where it failed, the last thing that it said."""
    command = [sys.executable, __file__, "--steps", str(given.steps), "--batch", str(given.batch), "--child", stage, str(file), str(work)]
    most = int(given.limit * 1e9) if given.limit else None

    def limited() -> None:
        if most is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (most, most))

    done = subprocess.run(command, check=False, capture_output=True, text=True, preexec_fn=limited)
    if done.returncode:
        return {"failure": f"ended with code {done.returncode}: {(done.stderr.strip() or 'without a word').splitlines()[-1][:100]}"}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def figures(began: float, before: int, *, all_rows: bool, **more: Any) -> dict[str, Any]:
    """What a stage tells when it is done."""
    peak = memory("VmHWM")
    return {"seconds": time.perf_counter() - began, "in_all": peak, "bytes": peak - before, "all_rows": all_rows, **more}


def whole(file: Path, work: Path, given: argparse.Namespace) -> dict[str, Any]:
    """All rows at once, as a list: what the other stages do without."""
    before, began = memory("VmRSS"), time.perf_counter()
    with file.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return figures(began, before, all_rows=True, says=f"{len(rows):,} rows held")


def load_all(file: Path, work: Path) -> tuple[Any, int, float]:
    """The data, memory before it, and when it began."""
    from transformers import AutoTokenizer

    from prefopt.data.dataset import load
    from prefopt.data.settings import DataSettings

    tokenizer = AutoTokenizer.from_pretrained(work / "model")
    tokenizer(["a"])
    settings = DataSettings(data=[str(file)], cache_dir=work / f"cache-{file.stem}", data_workers=1, on_bad_row="drop")
    before = memory("VmRSS")
    began = time.perf_counter()
    return load([str(file)], settings, tokenizer, kind="pair"), before, began


def cold(file: Path, work: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Read and tokenise."""
    dataset, before, began = load_all(file, work)
    assert not dataset.summary.from_cache, "remove the cache of an earlier run"
    return figures(began, before, all_rows=True, says=f"{len(dataset.trees):,} examples, dropped {dict(dataset.summary.dropped or {})}")


def warm(file: Path, work: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Find the trees in the cache, and look at some, in random order."""
    dataset, before, _ = load_all(file, work)
    assert dataset.summary.from_cache
    began = time.perf_counter()
    rng = random.Random(0)
    for _ in range(LOOKED_AT):
        assert dataset.trees[rng.randrange(len(dataset.trees))].num_tokens
    says = f"{(time.perf_counter() - began) / LOOKED_AT * 1e6:.1f} microseconds per tree"
    return figures(began, before, all_rows=False, says=says)


def train(file: Path, work: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Some steps of DPO on a tiny model, with some of the data held out; before it stands a run on a handful of rows."""
    import prefopt

    few = work / "few.jsonl"
    with file.open(encoding="utf-8") as lines:
        few.write_text("".join(line for line, _ in zip(lines, range(64), strict=False)), encoding="utf-8")

    def run(data: Path, name: str, steps: int) -> None:
        prefopt.train(
            "dpo",
            model=str(work / "model"),
            data=[str(data)],
            out=work / "runs" / name,
            cache_dir=work / f"cache-{file.stem}",
            max_steps=steps,
            batch_size=given.batch,
            max_tokens=MAX_TOKENS,
            overwrite=True,
            report=False,
            samples=0,
            data_workers=1,
            on_bad_row="drop",
        )

    run(few, "few", 20)
    before, began = memory("VmHWM"), time.perf_counter()
    run(file, file.stem, given.steps)
    return figures(began, before, all_rows=False, says=f"{given.steps * given.batch:,} examples")


STAGES = {"whole": whole, "cold": cold, "warm": warm, "train": train}


def memory(name: str) -> int:
    """A figure of this process, in bytes."""
    with open("/proc/self/status", encoding="ascii") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def made_words() -> list[str]:
    """Words that no language has; few, so that most are one token and a file takes little time."""
    rng = random.Random(0)
    syllables = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
    return sorted({"".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(2_000)})


def write_rows(file: Path, rows: int, words: Sequence[str]) -> None:
    """Pairs of made-up text; some words are frequent, as in all languages."""
    rng = random.Random(1)
    weights = [1 / (place + 1) for place in range(len(words))]
    pool = rng.choices(words, weights, k=1_000_000)

    def text(number: int) -> str:
        start = rng.randrange(len(pool) - number)
        return " ".join(pool[start : start + number])

    with file.open("w", encoding="utf-8") as out:
        for number in range(rows):
            row = {
                "prompt": f"Question {number}: {text(PROMPT_WORDS)}?",
                "chosen": f" {text(ANSWER_WORDS)}.",
                "rejected": f" {text(ANSWER_WORDS)}.",
            }
            out.write(json.dumps(row) + "\n")


def save_model(folder: Path, words: Sequence[str]) -> None:
    """A model of one layer and a tokenizer that splits words as Qwen2's does."""
    if (folder / "config.json").is_file():
        return
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.qwen2 import Qwen2Tokenizer

    tokenizer = Qwen2Tokenizer(pad_token="<|pad|>").train_new_from_iterator([" " + " ".join(words)] * 2, 4096, show_progress=False)
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


if __name__ == "__main__":
    sys.exit(main())
