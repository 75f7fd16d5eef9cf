"""The memory that a run is estimated to take against what it took: one child process per shape, the most that it held at once.

python bench/memory_estimate.py                 all shapes, as the table of docs/memory.md
python bench/memory_estimate.py --only 0 3      some of them
python bench/memory_estimate.py --parts         what each estimate consists of
python bench/memory_estimate.py --heap          with MALLOC_MMAP_THRESHOLD_ set, so that glibc keeps nothing back
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

MODELS = {
    "5M": {"hidden": 256, "layers": 6, "heads": 4},
    "28M": {"hidden": 512, "layers": 8, "heads": 8},
    "56M": {"hidden": 768, "layers": 7, "heads": 12, "architecture": "llama"},
}
SHAPES: list[dict[str, Any]] = [
    {"model": "5M", "max_tokens": 1024},
    {"model": "5M", "max_tokens": 4096},
    {"model": "5M", "max_tokens": 4096, "lora_rank": 16},
    {"model": "5M", "max_tokens": 4096, "gradient_checkpointing": "on"},
    {"model": "5M", "max_tokens": 4096, "gradient_checkpointing": "on", "lora_rank": 16},
    {"model": "5M", "max_tokens": 4096, "sharing": "plain"},
    {"model": "28M", "max_tokens": 4096, "precision": "bf16"},
    {"model": "28M", "max_tokens": 4096, "lora_rank": 16, "precision": "bf16"},
    {"model": "28M", "max_tokens": 4096, "gradient_checkpointing": "on"},
    {"model": "56M", "max_tokens": 1024},
    {"model": "56M", "max_tokens": 1024, "reference_cache": False},
    {"model": "56M", "max_tokens": 1024, "lora_rank": 16, "gradient_checkpointing": "on", "precision": "bf16"},
]
COMMON: dict[str, Any] = {
    "batch_size": 16,
    "max_steps": 3,
    "max_length": 1024,
    "precision": "float32",
    "samples": 0,
    "report": False,
    "device": "cpu",
    "data_workers": 1,
}
HEAP = {"MALLOC_MMAP_THRESHOLD_": "1000000"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, nargs="*", default=range(len(SHAPES)))
    parser.add_argument("--heap", action="store_true")
    parser.add_argument("--parts", action="store_true", help="what the estimate consists of")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(measure(json.loads(given.child))))
        return
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), {SHAPES[index]["model"] for index in given.only})
        print("| shape | positions | estimated MB | measured MB | estimated / measured | CPU s |\n|---|---|---|---|---|---|", flush=True)
        for index in given.only:
            shape = SHAPES[index]
            place = {"model": f"{folder}/{shape['model']}", "data": f"{folder}/pairs.jsonl", "out": f"{folder}/{index}"}
            spec = COMMON | shape | place | {"cache_dir": f"{folder}/cache-{index}"}
            found = json.loads(child(spec, HEAP if given.heap else {}))
            estimated, measured = found["estimated"] / 1e6, found["measured"] / 1e6
            words = ", ".join(f"{name} {value}" for name, value in shape.items())
            for line in found["parts"] if given.parts else ():
                print("   ", line)
            print(
                f"| {words} | {found['positions']:,} | {estimated:,.0f} | {measured:,.0f} | {estimated / measured:.2f} "
                f"| {found['cpu_seconds']:.0f} |",
                flush=True,
            )


def child(spec: dict[str, Any], environment: dict[str, str]) -> str:
    command = [sys.executable, __file__, "--child", json.dumps(spec)]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"} | environment
    )
    if done.returncode:
        sys.exit(f"{spec}\n{done.stderr}")
    return done.stdout.strip().splitlines()[-1]


def make(folder: Path, models: set[str]) -> None:
    from prefopt.pipeline.new import new_model
    from prefopt.pipeline.new_settings import NewSettings

    rng = random.Random(0)
    words = [f"w{index:03d}" for index in range(900)]
    text = folder / "text.txt"
    text.write_text("\n".join(" ".join(rng.choices(words, k=60)) for _ in range(400)))
    rows = [{name: " " + " ".join(rng.choices(words, k=80)) for name in ("prompt", "chosen", "rejected")} for _ in range(64)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in sorted(models):
        new_model(NewSettings(text=[str(text)], out=folder / name, vocabulary=1500, context=1024, **MODELS[name]), say=print)


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Run it; what it took beside what Python and its libraries had taken before."""
    import torch

    from prefopt.config import check
    from prefopt.training.assemble import method_named, own_settings, settings_for
    from prefopt.training.cut import fullest_row
    from prefopt.training.memory.available import held, most_held
    from prefopt.training.memory.estimate import estimate_memory
    from prefopt.training.run import train_with
    from prefopt.training.terminal.narrator import Quiet

    base = held()
    result = train_with("dpo", narrator=Quiet(), **spec)
    peak = most_held()
    used = resource.getrusage(resource.RUSAGE_SELF)
    method = method_named("dpo")
    settings = check(settings_for(method), spec)
    data = result.summary["data"]["summary"]
    prompt, completion = data["mean_prompt"], (data["num_tokens"] / data["num_trees"] - data["mean_prompt"]) / 2
    per_tree = data["num_tokens"] / data["num_trees"] + (prompt if settings.sharing == "plain" else 0)
    positions = fullest_row(per_tree, 0.0, round(per_tree), count=settings.batch_size, max_tokens=settings.max_tokens)
    estimate = estimate_memory(
        method(own_settings(method, settings)),
        settings,
        positions=positions,
        device=torch.device("cpu"),
        tree=tuple(map(round, (prompt, completion, completion))),
        accumulates=per_tree * settings.batch_size > settings.max_tokens,
    )
    return {
        "estimated": estimate.total,
        "measured": peak - base,
        "positions": positions,
        "parts": estimate.lines(),
        "cpu_seconds": used.ru_utime + used.ru_stime,
    }


if __name__ == "__main__":
    main()
