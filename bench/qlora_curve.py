"""LoRA on a base in full and in 4 bits: the same pairs in the same order, the same adapter to begin with, both loss curves.

python -m bench.qlora_curve --data DATA                  384 pairs, four passes; DATA holds hh-rlhf/ (or PREFOPT_SHARED names it)
python -m bench.qlora_curve --data DATA --work runs/q    keeps the model between calls
"""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

from bench.small_hh import Start, circumstances, plot, prepare, said, train

VARIANTS: dict[str, dict[str, Any]] = {"LoRA": {}, "QLoRA": {"load_in_4bit": True}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("PREFOPT_SHARED", ".")), help="folder that holds hh-rlhf/")
    parser.add_argument("--work", type=Path, help="folder for the model and the runs; the default is one that goes")
    parser.add_argument("--out", type=Path, default=Path("bench/results/qlora"), help="the table (.md) and the chart (.svg)")
    parser.add_argument("--pairs", type=int, default=384)
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--device", default="auto")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = given.work or Path(folder)
        start = prepare(work, given.data, num_pairs=given.pairs, hidden=given.hidden, layers=given.layers)
        found = {name: run(start, work / name.lower(), given, changes) for name, changes in VARIANTS.items()}
    text = table(found, given)
    print(text)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.with_suffix(".md").write_text(text, encoding="utf-8")
    curves = {name: each["losses"] for name, each in found.items()}
    plot(curves, given.out.with_suffix(".svg"), title="DPO loss: LoRA on a whole base and on one in 4 bits")


def run(start: Start, out: Path, given: argparse.Namespace, changes: dict[str, Any]) -> dict[str, Any]:
    same = {"lora_rank": given.rank, "learning_rate": given.learning_rate, "epochs": given.epochs, "precision": given.precision}
    return train(start, out, device=given.device, **same, **changes)


def table(found: dict[str, dict[str, Any]], given: argparse.Namespace) -> str:
    """Both curves at ten places, how far they are apart, and what was held out."""
    one, other = (each["losses"] for each in found.values())
    apart = [abs(a - b) for a, b in zip(one, other, strict=True)]
    places = sorted({round(index * (len(one) - 1) / 9) for index in range(10)})
    lines = ["| step | " + " | ".join(found) + " | apart |", "|---|---|---|---|"]
    lines += [f"| {place + 1} | {one[place]:.4f} | {other[place]:.4f} | {apart[place]:.4f} |" for place in places]
    lines += ["", "| held out | before | " + " | ".join(found) + " |", "|---|---|---|---|"]
    first = next(iter(found.values()))
    for name in ("eval/loss", "eval/rewards/accuracy", "eval/rewards/margin"):
        after = " | ".join(f"{each['after'][name]:.4f}" for each in found.values())
        lines.append(f"| {name.removeprefix('eval/')} | {first['before'].get(name, float('nan')):.4f} | {after} |")
    worst = max(range(len(apart)), key=lambda place: apart[place])
    gap = f"{apart[worst]:.4f} (step {worst + 1}), mean {sum(apart) / len(apart):.4f}"
    lines += ["", f"- largest gap between the two losses of a step: {gap}; LoRA's losses range over {max(one) - min(one):.4f}"]
    lines += [f"- rank {given.rank}; the same order of data and the same adapter to begin with", *circumstances(first, given)]
    return "\n".join(lines)


if __name__ == "__main__":
    said(main)
