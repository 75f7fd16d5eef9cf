"""Where the comparisons of training curves begin: real pairs, and a small model that has learned to answer like them.

The pairs are HH transcripts (the data folder that `bench.versus` reads). The model is made by `prefopt new` and fine-tuned on
the chosen answers of the rows that are not among the pairs. Made once per work folder.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.versus.contestants import UsageError
from bench.versus.workloads import real_rows

COMMON: dict[str, Any] = {
    "batch_size": 16,
    "max_length": 512,
    "max_tokens": 4096,
    "samples": 0,
    "report": False,
    "memory_check": False,
    "data_workers": 1,
    "on_bad_row": "drop",
}
HELD_OUT = 64


@dataclass(frozen=True, slots=True)
class Start:
    """What a comparison trains.

    Attributes:
        model: folder of the fine-tuned model.
        pairs, held_out: files of rows.
    """

    model: Path
    pairs: Path
    held_out: Path


def prepare(work: Path, data: Path, *, num_pairs: int, hidden: int, layers: int, sft_epochs: float = 2.0) -> Start:
    """Pairs and model, from the work folder where they are there already.

    Args:
        work: a folder.
        data: the data folder.
        num_pairs: to train on; `HELD_OUT` more are held out.
        hidden, layers: of the model.
        sft_epochs: passes over the other rows.
    """
    from prefopt.machine import prepare_environment

    prepare_environment()
    from prefopt.pipeline.new import new_model
    from prefopt.pipeline.new_settings import NewSettings
    from prefopt.training.run import train_with

    work.mkdir(parents=True, exist_ok=True)
    rows = real_rows("hh", data)
    random.Random(0).shuffle(rows)
    if len(rows) < 2 * (num_pairs + HELD_OUT):
        raise UsageError(f"{len(rows)} pairs are too few to take {num_pairs + HELD_OUT} and fine-tune on the others.")
    parts = {"held_out": rows[:HELD_OUT], "pairs": rows[HELD_OUT : HELD_OUT + num_pairs], "sft": rows[HELD_OUT + num_pairs :]}
    files = {name: work / f"{name}.jsonl" for name in parts}
    for name, part in parts.items():
        files[name].write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    demonstrations = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in parts["sft"]]
    files["sft"].write_text("".join(json.dumps(row) + "\n" for row in demonstrations), encoding="utf-8")
    base, sft = work / f"base-{hidden}-{layers}", work / f"sft-{hidden}-{layers}"
    if not (sft / "model").is_dir():
        shape = {"hidden": hidden, "layers": layers, "heads": hidden // 64, "vocabulary": 4096, "context": 1024}
        new_model(NewSettings(text=[str(files["sft"])], out=base, overwrite=True, **shape), say=print)
        common = COMMON | {"cache_dir": work / "cache", "overwrite": True}
        train_with("sft", model=str(base), data=str(files["sft"]), out=sft, epochs=sft_epochs, learning_rate=1e-3, **common)
    return Start(sft / "model", files["pairs"], files["held_out"])


def train(start: Start, out: Path, **settings: Any) -> dict[str, Any]:
    """A DPO run from the start: its losses, its held-out figures before and after, and what it took."""
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

    from prefopt.training.run import train_with
    from prefopt.training.terminal.narrator import Quiet

    began: list[float] = []
    took: list[float] = []
    hooks = [
        register_optimizer_step_pre_hook(lambda *_: began.append(time.perf_counter())),
        register_optimizer_step_post_hook(lambda *_: took.append(time.perf_counter() - began[-1])),
    ]
    common = COMMON | {"cache_dir": out.parent / "cache", "overwrite": True, "narrator": Quiet()}
    try:
        data = {"data": str(start.pairs), "eval_data": str(start.held_out)}
        result = train_with("dpo", model=str(start.model), out=out, **data, **common | settings)
    finally:
        for hook in hooks:
            hook.remove()
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    newest = max((out / "checkpoints").iterdir(), key=lambda path: path.name)
    before = json.loads((newest / "state.json").read_text())
    return {
        "losses": [row["loss"] for row in steps],
        "seconds": [row["seconds"] for row in steps],
        "optimizer_seconds": took,
        "before": before["opening"].get("before", {}),
        "after": result.summary["after"],
        "peak_gb": result.summary["peak_memory_gb"],
        "precision": json.loads((out / "manifest.json").read_text())["resolved"]["precision"],
        "device": result.summary["device"],
        "versions": result.summary["versions"],
    }


def median(values: Sequence[float]) -> float:
    """The middle one."""
    return sorted(values)[len(values) // 2]


def plot(curves: dict[str, Sequence[float]], file: Path, *, title: str) -> None:
    """Losses by step, as SVG."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.5))
    for name, losses in curves.items():
        axes.plot(range(1, len(losses) + 1), losses, label=name, linewidth=1.2)
    axes.set(xlabel="step", ylabel="loss", title=title)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def circumstances(one: dict[str, Any], given: argparse.Namespace) -> list[str]:
    """What the figures were found on."""
    shape = f"qwen3 shape, hidden {given.hidden}, {given.layers} layers, vocabulary 4,096"
    versions = ", ".join(f"{name} {version}" for name, version in one["versions"].items())
    return [
        f"- {len(one['losses'])} steps of {COMMON['batch_size']}, {given.pairs} pairs of hh-rlhf, learning rate {given.learning_rate:g}",
        f"- model: {shape}, two passes of SFT on the chosen answers of the other rows",
        f"- {one['device']}, {one['precision']}; {versions}",
        "",
    ]


def said(found: Callable[[], None]) -> None:
    """Run a bench; what is wrong with how it was called, in a sentence."""
    try:
        found()
    except UsageError as error:
        sys.exit(str(error))
