"""The three ways of holding AdamW's numbers: loss curve, time and memory of each against float32, on the same pairs in the same order.

python -m bench.optimizers --data DATA                  DATA holds hh-rlhf/ (or PREFOPT_SHARED names it)
python -m bench.optimizers --data DATA --work runs/o    keeps the model between calls
python -m bench.optimizers --step 32m                   the optimizer's step alone, on a model of that shape of bench.versus

Each run is a process of its own. `optimizer step` is the time in the optimizer alone; `peak` what the process took at most, on a
GPU what its allocator did.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

from bench.small_hh import circumstances, median, plot, prepare, said, train
from bench.versus.shapes import SHAPES

KINDS = ("adamw", "adamw-8bit", "adamw-bf16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("PREFOPT_SHARED", ".")), help="folder that holds hh-rlhf/")
    parser.add_argument("--work", type=Path, help="folder for the model and the runs; the default is one that goes")
    parser.add_argument("--out", type=Path, default=Path("bench/results/optimizers"), help="the table (.md) and the chart (.svg)")
    parser.add_argument("--pairs", type=int, default=384)
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--step", choices=SHAPES, help="time steps of the optimizer alone; no data is needed")
    parser.add_argument("--rounds", type=int, default=7, help="of --step, in turns; the first one warms up")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.out.parent.mkdir(parents=True, exist_ok=True)
    if given.step:
        text = steps_alone(given.step, given.rounds, given.device)
        print(text)
        given.out.with_suffix(".md").write_text(text, encoding="utf-8")
        return
    if given.child:
        print(json.dumps(one(given)))
        return
    with tempfile.TemporaryDirectory() as folder:
        given.work = given.work or Path(folder)
        start(given)
        found = {kind: child(given, kind) for kind in KINDS}
    text = table(found, given)
    print(text)
    given.out.with_suffix(".md").write_text(text, encoding="utf-8")
    plot({kind: each["losses"] for kind, each in found.items()}, given.out.with_suffix(".svg"), title="DPO loss by optimizer")


def steps_alone(shape: str, rounds: int, device: str) -> str:
    """The three in turns on weights of that shape with random gradients, as Markdown."""
    import torch
    import transformers

    from prefopt.training.optimizer import make_optimizer, set_learning_rate
    from prefopt.training.optimizers.kinds import KINDS as MADE

    place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    optimizers, count = {}, 0
    for kind in KINDS:
        torch.manual_seed(0)
        with torch.device(place):
            model = transformers.AutoModelForCausalLM.from_config(SHAPES[shape].config())
        count = sum(parameter.numel() for parameter in model.parameters())
        model.to(MADE[kind].trained)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizers[kind] = make_optimizer(list(model.named_parameters()), weight_decay=0.01, kind=kind)
        set_learning_rate(optimizers[kind], 1e-6)
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    processor: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(rounds):
        for kind, optimizer in optimizers.items():
            began, began_processor = time.perf_counter(), time.process_time()
            optimizer.step()
            if place.type == "cuda":
                torch.cuda.synchronize()
            seconds[kind].append(time.perf_counter() - began)
            processor[kind].append(time.process_time() - began_processor)
    lines = [f"# The optimizer's step alone, {shape}", "", f"    python -m bench.optimizers --step {shape}", ""]
    lines += ["| | median, ms | least | most | time of the processor, median, ms |", "|---|---|---|---|---|"]
    for kind, own in seconds.items():
        times = [median(own[1:]), min(own[1:]), max(own[1:]), median(processor[kind][1:])]
        lines.append(f"| {kind} | " + " | ".join(f"{1000 * each:.1f}" for each in times) + " |")
    where = torch.cuda.get_device_name() if place.type == "cuda" else f"CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    versions = ", ".join(f"{name} {installed(name)}" for name in ("torch", "transformers", "bitsandbytes", "torch-optimi"))
    lines += ["", f"- {date.today()}, {where}; python {platform.python_version()}, {versions}"]
    lines += [f"- other work on the machine while it ran: {os.getloadavg()[0]:.1f} processes on average (its own one of them)"]
    lines += [f"- {count / 1e6:.1f} million weights, random gradients; {rounds} rounds in turns, the first left out", ""]
    return "\n".join(lines)


def start(given: argparse.Namespace) -> Any:
    return prepare(given.work, given.data, num_pairs=given.pairs, hidden=given.hidden, layers=given.layers)


def one(given: argparse.Namespace) -> dict[str, Any]:
    """A run with one of them, and the bytes that it held for a trained weight between two steps."""
    import torch

    from prefopt.training.loop import Trainer
    from prefopt.training.optimizers.kinds import kind_of

    held: list[float] = []
    check = Trainer.check_finite

    def counted(self: Trainer, step: int) -> None:
        weights = [parameter for parameter in self.policy.parameters() if parameter.requires_grad]
        kept = [tensor for weight in weights for tensor in kind_of(self.optimizer).tensors(self.optimizer, weight).values()]
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        held.append(sum(tensor.nbytes for tensor in (*weights, *gradients, *kept)) / sum(weight.numel() for weight in weights))
        check(self, step)

    Trainer.check_finite = counted  # type: ignore[method-assign]
    settings = {"learning_rate": given.learning_rate, "epochs": given.epochs, "device": given.device, "optim": given.child}
    found = train(start(given), given.work / given.child, precision="bf16", **settings)
    return found | {"bytes": held[-1], "threads": torch.get_num_threads()}


def child(given: argparse.Namespace, kind: str) -> dict[str, Any]:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in vars(given).items() if name not in ("child", "out")]
    done = subprocess.run(
        [sys.executable, "-m", "bench.optimizers", *flags, "--child", kind],
        check=False, capture_output=True, text=True, env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"},
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{kind}\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def table(found: dict[str, dict[str, Any]], given: argparse.Namespace) -> str:
    """A column for each."""
    base = found["adamw"]

    def gaps(each: dict[str, Any]) -> list[float]:
        return [abs(a - b) for a, b in zip(base["losses"], each["losses"], strict=True)]

    rows = {
        "bytes for a trained weight": [f"{each['bytes']:.1f}" for each in found.values()],
        "peak, GB": [f"{each['peak_gb']:.2f}" for each in found.values()],
        "time of a step": [f"{median(each['seconds']) / median(base['seconds']):.2f}" for each in found.values()],
        "optimizer step, ms": [f"{1000 * median(each['optimizer_seconds']):.1f}" for each in found.values()],
        "loss, first step": [f"{each['losses'][0]:.4f}" for each in found.values()],
        "loss, mean of the last ten": [f"{sum(each['losses'][-10:]) / 10:.4f}" for each in found.values()],
        "largest gap to adamw": [f"{max(gaps(each)):.4f}" for each in found.values()],
        "mean gap to adamw": [f"{sum(gaps(each)) / len(each['losses']):.4f}" for each in found.values()],
        "held-out loss": [f"{each['after']['eval/loss']:.4f}" for each in found.values()],
        "held-out accuracy": [f"{each['after']['eval/rewards/accuracy']:.3f}" for each in found.values()],
    }
    lines = ["|  | " + " | ".join(found) + " |", "|---" * (1 + len(found)) + "|"]
    lines += [f"| {name} | " + " | ".join(values) + " |" for name, values in rows.items()]
    spread, before = max(base["losses"]) - min(base["losses"]), base["before"].get("eval/loss", float("nan"))
    lines += ["", f"- adamw's losses range over {spread:.4f}; held-out loss before: {before:.4f}; all weights trained"]
    lines += circumstances(base, given)
    return "\n".join(lines)


if __name__ == "__main__":
    said(main)
