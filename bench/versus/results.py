"""What was measured, as one mapping; `tables` shows it."""

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from statistics import mean
from typing import Any

from bench.versus.contestants import Contestant
from bench.versus.figures import Block, loss_difference, ratio, speed, spread
from bench.versus.match import Player
from bench.versus.plan import Plan, examples_of_steps
from bench.versus.shapes import FORMULA
from bench.versus.workloads import Workload

PATHS = ("model", "data", "out", "cache_dir", "eval_data", "adapter", "reference")
"""Settings that name folders of this machine."""


def of_training(
    plan: Plan,
    chosen: Sequence[Contestant],
    workloads: Mapping[str, Workload],
    players: Mapping[str, Player],
    rates: Mapping[str, Sequence[float]],
    search: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """Everything about a run of training.

    Args:
        plan: of the run.
        chosen, workloads: who took part, on what.
        players: their processes, ended.
        rates: operations per second of the machine, before each block and after the last, by contestant.
        search: what TRL's batch per pass was chosen from.
    """
    blocks = {
        entry.label: blocks_of(plan, workloads[entry.workload or plan.workload], players[entry.label], rates.get(entry.label, []))
        for entry in chosen
    }
    ran = [entry for entry in chosen if not players[entry.label].failure and len(blocks[entry.label]) == plan.blocks]
    base = next((entry for entry in ran if entry.side == "prefopt"), ran[0] if ran else None)
    entries = [
        contestant(plan, entry, workloads[entry.workload or plan.workload], players, blocks, base if entry in ran else None)
        for entry in chosen
    ]
    all_rates = [rate for own in rates.values() for rate in own]
    return {
        "what": "training",
        "plan": described(plan),
        "machine": machine(plan),
        "versions": versions(players.values()),
        "workloads": {name: workload.account for name, workload in workloads.items()},
        "model": asdict(plan.model_shape) | {"name": plan.shape, "parameters": first_fact(players.values(), "parameters")},
        "formula": FORMULA,
        "matrix_rate": asdict(spread(all_rates)) if all_rates else None,
        "base": base.label if base else None,
        "search": list(search),
        "contestants": entries,
    }


def blocks_of(plan: Plan, workload: Workload, player: Player, rates: Sequence[float]) -> list[Block]:
    """The contestant's measured blocks, without the one that warms up."""
    steps = examples_of_steps(plan, workload)
    made = []
    for number, stretch in enumerate(player.of("train")):
        own = [example for step in steps[number * plan.block_steps : (number + 1) * plan.block_steps] for example in step]
        lengths = [workload.lengths[example] for example in own]
        made.append(
            Block(
                seconds=stretch.seconds,
                pairs=len(own) * workload.rows_per_example,
                tokens=sum(prompt + sum(completions) for prompt, completions in lengths),
                flops=sum(plan.model_shape.train_flops(each, adapter=plan.lora_rank > 0) for each in lengths),
                reference_flops=sum(plan.model_shape.forward_flops(each) for each in lengths),
                rate=mean(rates[number : number + 2]) if rates[number : number + 2] else 0.0,
            )
        )
    return made[1:]


def contestant(
    plan: Plan,
    entry: Contestant,
    workload: Workload,
    players: Mapping[str, Player],
    blocks: Mapping[str, Sequence[Block]],
    base: Contestant | None,
) -> dict[str, Any]:
    """One contestant's figures; those that need all blocks are left out where `base` is None."""
    player, own = players[entry.label], blocks[entry.label]
    reference = sum(part.seconds for part in player.of("reference"))
    losses = [loss for stretch in player.of("train") for loss in stretch.facts["losses"]]
    found: dict[str, Any] = {
        "label": entry.label,
        "says": entry.says,
        "failure": player.failure,
        "settings": entry.settings,
        "options": options(player.facts.get("options", {})),
        "reference_seconds": reference,
        "was_warm": not reference if entry.warm else None,
        "start": {name: player.facts.get(f"{name}_seconds") for name in ("import", "tokenise", "start")},
        "memory": memory(player),
        "tokens": player.facts.get("tokens"),
        "losses": losses,
        "blocks": [asdict(block) for block in own],
    }
    if base is None:
        return found
    per_pair, base_per_pair = (reference_per_pair(plan, players[label], blocks[label]) for label in (entry.label, base.label))
    base_losses = [loss for stretch in players[base.label].of("train") for loss in stretch.facts["losses"]]
    whole = ratio(own, blocks[base.label], reference_per_pair=per_pair, base_reference_per_pair=base_per_pair)
    return found | {
        "speed": asdict(speed(own, reference_per_pair=per_pair, computes_reference=not (entry.warm and not reference))),
        "time_with_reference": asdict(whole),
        "time_steps": asdict(ratio(own, blocks[base.label])),
        "loss_difference": loss_difference(losses, base_losses) if entry.workload == base.workload else None,
    }


def reference_per_pair(plan: Plan, player: Player, blocks: Sequence[Block]) -> float:
    """Seconds of the reference pass per pair; it covers the pairs of the warm-up too."""
    pairs = blocks[0].pairs * (plan.blocks + 1)
    return sum(part.seconds for part in player.of("reference")) / pairs


def memory(player: Player) -> dict[str, Any]:
    """Bytes: the most at once, and what was held before the first step."""
    peaks = [stretch.facts["memory"]["peak"] for stretch in player.of("train")]
    before = player.facts.get("memory_before") or {}
    return {"peak": max(peaks, default=None), "before": before.get("now"), "peak_before": before.get("peak")}


def options(given: Mapping[str, Any]) -> dict[str, Any]:
    """What a trainer said of its settings, without folders."""
    settings = given.get("settings")
    rest = {name: value for name, value in given.items() if name != "settings"}
    return rest | ({"settings": {name: value for name, value in settings.items() if name not in PATHS}} if settings else {})


def of_tokenising(plan: Plan, chosen: Sequence[Contestant], workload: Workload, players: Mapping[str, Player]) -> dict[str, Any]:
    """Everything about a run of tokenisation: a block is a round over all rows."""
    rounds = {entry.label: players[entry.label].of("tokenise")[1:] for entry in chosen}
    ran = [entry for entry in chosen if not players[entry.label].failure and rounds[entry.label]]
    base = next((entry for entry in ran if entry.side == "prefopt"), ran[0] if ran else None)
    entries = []
    for entry in chosen:
        own = rounds[entry.label]
        found: dict[str, Any] = {"label": entry.label, "failure": players[entry.label].failure, "settings": entry.settings}
        if entry in ran and base is not None:
            others = rounds[base.label]
            found["rows_per_second"] = asdict(spread([stretch.facts["rows"] / stretch.seconds for stretch in own]))
            found["time"] = asdict(spread([one.seconds / other.seconds for one, other in zip(own, others, strict=True)]))
        entries.append(found)
    return {
        "what": "tokenise",
        "plan": described(plan),
        "machine": machine(plan),
        "versions": versions(players.values()),
        "workloads": {workload.name: workload.account},
        "base": base.label if base else None,
        "contestants": entries,
    }


def described(plan: Plan) -> dict[str, Any]:
    """The plan without folders."""
    return {name: value for name, value in asdict(plan).items() if name not in ("data", "lengths", "work", "python")}


def machine(plan: Plan) -> dict[str, Any]:
    """What it ran on."""
    import torch

    processor = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n")
        processor = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), processor)
    except OSError:
        pass
    return {
        "device": torch.cuda.get_device_name() if plan.device == "cuda" else "cpu",
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "bf16_units": bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "time": datetime.now().isoformat(timespec="seconds"),
    }


def versions(players: Any) -> dict[str, str]:
    """Of all libraries that anybody named."""
    return {"python": platform.python_version()} | {
        name: value for player in players for name, value in player.facts.get("versions", {}).items()
    }


def first_fact(players: Any, name: str) -> Any:
    """The first that anybody told."""
    return next((player.facts[name] for player in players if name in player.facts), None)
