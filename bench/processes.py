"""One process with two threads against two processes with one thread each: python -m bench.processes

The same run (model, pairs, order, steps) three ways on the same cores: one process, two with `--parallel ddp`, two with `--parallel
fsdp` (gloo). The ways alternate, round after round, each run in fresh processes, because what waits inside a group of processes
cannot be made to wait for its turn; so a round takes a minute or more, and `--rounds 1 --out FILE` several times adds up: rounds
that FILE holds already are kept. Timed are whole steps, the first two left out.

Two processes on the cores of one are no gain to expect: they share what one had, hold weights twice (ddp), and send gradients
through memory. What this shows is what that costs, and that the losses are the same.
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from bench.versus.turns import status_bytes

ROOT = Path(__file__).resolve().parents[1]
WAYS: dict[str, tuple[int, str]] = {"one": (1, "ddp"), "two, ddp": (2, "ddp"), "two, fsdp": (2, "fsdp")}
"""Processes, and what they share."""

WARM_UP = 2
LIMIT_S = 170.0


def parser() -> argparse.ArgumentParser:
    """All flags."""
    made = argparse.ArgumentParser(
        prog="python -m bench.processes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flag = made.add_argument
    flag("--shape", default="32m", help="of the model, as bench.versus names them")
    flag("--lengths", type=Path, default=ROOT / "bench" / "lengths" / "hh.json", help="lengths of the pairs")
    flag("--batch", type=int, default=8, help="pairs of an optimizer step")
    flag("--steps", type=int, default=10, help=f"optimizer steps of a run; the first {WARM_UP} are not timed")
    flag("--rounds", type=int, default=3, help="runs of each way, added to those that --out holds")
    flag("--threads", type=int, default=os.cpu_count() or 2, help="of the one process; two processes get half each")
    flag("--precision", choices=("auto", "bf16", "float32"), default="auto")
    flag("--max-length", type=int, default=1024)
    flag("--work", type=Path, help="folder for model and data, kept; the default is a temporary one")
    flag("--out", type=Path, help="JSON file of the result, with the table beside it as .md; the default only prints")
    flag("--child", type=Path, help=argparse.SUPPRESS)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    given = parser().parse_args(arguments)
    if given.child:
        child(json.loads(given.child.read_text(encoding="utf-8")))
        return 0
    known = json.loads(given.out.read_text(encoding="utf-8")) if given.out and given.out.is_file() else {"runs": []}
    with tempfile.TemporaryDirectory(prefix="processes-") as temporary:
        work = given.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        spec = prepared(given, work)
        known_rounds = len(known["runs"]) // len(WAYS)
        for number in range(given.rounds):
            first = (known_rounds + number) % len(WAYS)  # each way begins a round in turn
            for way in [*list(WAYS)[first:], *list(WAYS)[:first]]:
                found = one_run(way, spec, given.threads, work)
                known["runs"].append(found)
                print(f"{way}: " + (found.get("failure") or f"{found['pairs_per_second']:.3g} pairs/s"), flush=True)
    known |= {"spec": {name: value for name, value in spec.items() if name not in ("model", "data", "cache")}, "threads": given.threads}
    known |= {"machine": machine(), "command": "python -m bench.processes"}
    text = table(known)
    print("\n" + text)
    if given.out:
        given.out.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
        given.out.with_suffix(".md").write_text(text, encoding="utf-8")
    return 1 if any("failure" in run for run in known["runs"]) else 0


def prepared(given: argparse.Namespace, work: Path) -> dict[str, Any]:
    """A model with random weights and pairs of the given lengths, made by what bench.versus makes its own with."""
    from bench.versus import __main__ as versus
    from bench.versus.plan import plan_from, prepare

    words = ["--workload", "lengths", "--lengths", str(given.lengths), "--shape", given.shape, "--batch", str(given.batch)]
    words += ["--blocks", str(given.steps), "--block-steps", "1", "--precision", given.precision, "--device", "cpu"]
    plan = plan_from(versus.parser().parse_args([*words, "--max-length", str(given.max_length)]), work)
    model, workloads = prepare(plan, ["lengths"])
    return {
        "model": str(model),
        "data": str(workloads["lengths"].pairs),
        "cache": str(work / "cache"),
        "shape": given.shape,
        "batch_size": given.batch,
        "steps": given.steps,
        "precision": plan.precision,
        "max_length": given.max_length,
    }


def one_run(way: str, spec: Mapping[str, Any], threads: int, work: Path) -> dict[str, Any]:
    """The run in fresh processes, and what they measured."""
    count, parallel = WAYS[way]
    folder = work / "run"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    file = folder / "spec.json"
    file.write_text(json.dumps({**spec, "parallel": parallel, "folder": str(folder)}), encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = os.environ | {"OMP_NUM_THREADS": str(max(1, threads // count)), "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    if count > 1:
        own |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = []
    for rank in range(count):
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {}
        with (folder / f"log-{rank}").open("wb") as log:
            command = [sys.executable, "-m", "bench.processes", "--child", str(file)]
            started.append(subprocess.Popen(command, cwd=ROOT, env=own | ranks, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(timeout=LIMIT_S) for process in started]
    except subprocess.TimeoutExpired:
        codes = [-1]
    finally:
        for process in started:
            process.kill()
            process.wait()
    if any(codes):
        last = (folder / "log-0").read_text(encoding="utf-8", errors="replace").strip().split("\n")[-3:]
        return {"way": way, "failure": f"exit codes {codes}: {' '.join(last)}"}
    parts = [json.loads((folder / f"result-{rank}.json").read_text(encoding="utf-8")) for rank in range(count)]
    seconds = parts[0]["seconds"][WARM_UP:]
    return {
        "way": way,
        "seconds": seconds,
        "pairs_per_second": spec["batch_size"] / median(seconds),
        "losses": parts[0]["losses"],
        "memory_gb": [part["peak"] / 1e9 for part in parts],
        "threads": parts[0]["threads"],
    }


def child(spec: Mapping[str, Any]) -> None:
    """One process of a run."""
    import torch

    from prefopt.training.record.callbacks import Callback
    from prefopt.training.run import train_with
    from prefopt.training.terminal.narrator import Quiet

    losses: list[float] = []
    ends: list[float] = []

    class Clock(Callback):
        def on_start(self, run: Any) -> None:
            ends.append(time.perf_counter())

        def on_step(self, row: Mapping[str, float]) -> None:
            ends.append(time.perf_counter())
            losses.append(row["loss"])

    rank = int(os.environ.get("RANK", "0"))
    train_with(
        "dpo",
        model=spec["model"],
        data=spec["data"],
        data_format="text_pair",
        out=f"{spec['folder']}/out",
        cache_dir=spec["cache"],
        batch_size=spec["batch_size"],
        max_steps=spec["steps"],
        max_length=spec["max_length"],
        learning_rate=1e-4,
        lr_schedule="constant",
        warmup_ratio=0.0,
        precision=spec["precision"],
        device="cpu",
        parallel=spec["parallel"],
        samples=0,
        report=False,
        memory_check=False,
        narrator=Quiet(),
        callbacks=[Clock()],
    )
    result = {
        "seconds": [end - begin for begin, end in pairwise(ends)],
        "losses": losses,
        "peak": status_bytes("VmHWM"),
        "threads": torch.get_num_threads(),
    }
    (Path(spec["folder"]) / f"result-{rank}.json").write_text(json.dumps(result), encoding="utf-8")


def machine() -> dict[str, Any]:
    """What it ran on."""
    import torch
    import transformers

    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n")
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": name,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def table(known: Mapping[str, Any]) -> str:
    """What was measured, as Markdown."""
    spec, own = known["spec"], known["machine"]
    good = [run for run in known["runs"] if "failure" not in run]
    base = [run for run in good if run["way"] == "one"]
    lines = [
        "# One process or two on the same cores",
        "",
        f"    {known['command']}",
        "",
        "| | processes × threads | pairs/s, median of runs (all runs) | against one | peak of each, GB | together, GB | losses apart |",
        "|---|---|---|---|---|---|---|",
    ]
    for way, (count, _) in WAYS.items():
        runs = [run for run in good if run["way"] == way]
        if not runs or not base:
            lines.append(f"| {way} | {count} | no run ended well | | | | |")
            continue
        speeds = [run["pairs_per_second"] for run in runs]
        against = median(speeds) / median(run["pairs_per_second"] for run in base)
        memory = [median(run["memory_gb"][rank] for run in runs) for rank in range(count)]
        apart = max(abs(a - b) for run in runs for a, b in zip(run["losses"], base[0]["losses"], strict=True))
        lines.append(
            f"| {way} | {count} × {runs[0]['threads']} | {median(speeds):.3g} ({', '.join(f'{speed:.3g}' for speed in speeds)}) | "
            f"{against:.2f}x | {', '.join(f'{each:.2f}' for each in memory)} | {sum(memory):.2f} | {apart:.1e} |"
        )
    failed = [f"- {run['way']} failed: {run['failure']}" for run in known["runs"] if "failure" in run]
    lines += [
        "",
        f"- {own['date']}, {own['processor']}, {own['cores']} cores; torch {own['torch']}, transformers {own['transformers']}",
        f"- {spec['shape']}, {spec['precision']}, {spec['batch_size']} pairs per step of hh-rlhf lengths up to {spec['max_length']}; gloo",
        f"- runs of {spec['steps']} steps, the first {WARM_UP} not timed; the ways in turns, fresh processes for each run",
        "- pairs/s: of a run's median step, the reference computed before. Memory: VmHWM, libraries included (0.4 GB for each process).",
        "- losses: of each step, against the first run of one process.",
        *failed,
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
