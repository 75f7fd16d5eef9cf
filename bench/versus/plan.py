"""What the command line asks for, made into specs for the contestants' processes."""

import json
import os
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.versus import workloads
from bench.versus.contestants import Contestant, UsageError
from bench.versus.match import ROOT, Player
from bench.versus.shapes import SHAPES, Shape, make_model
from bench.versus.workloads import Workload

BETA = 0.1
ORDER_SEED = 0
USUAL_LENGTH = 1024
REFERENCE_PARTS = 10
CHECKPOINTING = {"off": False, "on": True, "as-it-comes": None}


@dataclass(frozen=True, slots=True)
class Plan:
    """One comparison.

    Attributes:
        workload, shape: what is trained on, and what is trained.
        batch_size: examples of an optimizer step.
        blocks, block_steps: measured blocks of each contestant, one more before them for warming up; optimizer steps of each.
        precision, device: resolved, of the arithmetic and where.
        checkpointing: of activations, for all; None: each trainer's own default.
        max_length, learning_rate, lora_rank, seed: of the runs; the seed is that of weights and of the choice of pairs.
        apart: one contestant after the other.
        threads: of each process; 0: the library's choice.
        limit_s: longest silence of a contestant.
        python: that runs TRL.
        data, lengths: where real data and lengths lie.
        sizes: tokens of prompts and completions of made-up workloads, where not their own.
        work: folder for all files.
    """

    workload: str
    shape: str
    batch_size: int
    blocks: int
    block_steps: int
    precision: str
    device: str
    checkpointing: bool | None
    max_length: int
    learning_rate: float
    lora_rank: int
    seed: int
    apart: bool
    threads: int
    limit_s: float
    python: str
    data: Path | None
    lengths: Path | None
    sizes: tuple[int | None, int | None]
    work: Path

    @property
    def steps(self) -> int:
        """Optimizer steps of each contestant."""
        return (self.blocks + 1) * self.block_steps

    @property
    def model_shape(self) -> Shape:
        """The shape of that name."""
        return SHAPES[self.shape]


def plan_from(given: Namespace, work: Path) -> Plan:
    """The plan, with device and precision resolved.

    Raises:
        UsageError: numbers that cannot be, a GPU that is not there, no data folder.
    """
    import torch

    from prefopt.models.load import choose_precision

    for name in ("batch", "blocks", "block_steps", "max_length", "prompt_tokens"):
        if (number := getattr(given, name)) is not None and number < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be 1 or more (given: {number})")
    if given.completion_tokens is not None and given.completion_tokens < 2:
        raise UsageError(f"--completion-tokens must be 2 or more, the last ends the text (given: {given.completion_tokens})")
    if given.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no GPU here.")
    device = ("cuda" if torch.cuda.is_available() else "cpu") if given.device == "auto" else given.device
    precision = choose_precision(given.precision, torch.device(device), adapter=False)
    return Plan(
        workload=given.workload,
        shape=given.shape,
        batch_size=given.batch,
        blocks=given.blocks,
        block_steps=given.block_steps,
        precision="bf16" if precision.autocast is not None else "float32",
        device=device,
        checkpointing=CHECKPOINTING[given.checkpointing],
        max_length=given.max_length or longest_made(given),
        learning_rate=given.learning_rate,
        lora_rank=given.lora_rank,
        seed=given.seed,
        apart=given.apart,
        threads=given.threads,
        limit_s=given.limit,
        python=given.trl_python or sys.executable,
        data=data_folder(given.data),
        lengths=given.lengths,
        sizes=(given.prompt_tokens, given.completion_tokens),
        work=work,
    )


def longest_made(given: Namespace) -> int:
    """The usual longest length, or what the made-up workloads of the run take."""
    labels = [label.partition("@")[2] for label in (given.contestants or "").split(",")]
    sizes = [workloads.MADE[name] for name in (given.workload, *labels) if name in workloads.MADE]
    longest = [(given.prompt_tokens or prompt) + (given.completion_tokens or completion) for prompt, completion, _ in sizes]
    return max([USUAL_LENGTH, *longest])


def data_folder(given: Path | None) -> Path:
    """Where real data lies: as given, in PREFOPT_SHARED, or in the folder `shared/data` beside the checkout."""
    return given or Path(os.environ.get("PREFOPT_SHARED") or ROOT.parent / "shared" / "data")


def prepare(plan: Plan, names: Sequence[str]) -> tuple[Path, dict[str, Workload]]:
    """The model's folder, and the workloads by name; the first is that whose texts the tokenizer learns from.

    Raises:
        UsageError: data that is not there, too few pairs.
    """
    from transformers import AutoTokenizer

    shape = plan.model_shape
    model = plan.work / f"model-{plan.shape}-{names[0] if names[0] in workloads.REAL else 'made'}-{plan.seed}"
    if not (model / "config.json").is_file():
        texts = workloads.tokenizer_texts(names[0], plan.data)
        learned = workloads.train_tokenizer(texts, vocabulary=min(shape.vocabulary, 16384))
        make_model(shape, learned, model, seed=plan.seed, device=plan.device)
    tokenizer = AutoTokenizer.from_pretrained(model)
    needed = plan.steps * plan.batch_size
    made = {}
    for name in dict.fromkeys(names):
        candidates, branches = workloads.rows_for(
            name, needed, tokenizer, seed=plan.seed, data=plan.data, lengths=plan.lengths, sizes=plan.sizes, max_length=plan.max_length
        )
        folder = plan.work / f"data-{name}"
        made[name] = workloads.choose_rows(name, candidates, needed, branches, folder, tokenizer, max_length=plan.max_length)
        (folder / "ids.json").write_text(json.dumps(made[name].ids), encoding="utf-8")
    return model, made


def examples_of_steps(plan: Plan, workload: Workload) -> list[list[int]]:
    """Which examples each optimizer step takes: prefopt's own order."""
    from prefopt.training.order import DataOrder

    order = DataOrder(len(workload.lengths), plan.batch_size, ORDER_SEED, max_steps=plan.steps)
    return [order.examples(step).tolist() for step in range(plan.steps)]


def spec_for(plan: Plan, entry: Contestant, workload: Workload, model: Path, caches: Mapping[str, Path]) -> dict[str, Any]:
    """What a contestant's process is told.

    Args:
        plan: of the comparison.
        entry: the contestant.
        workload: that it runs.
        model: folder.
        caches: where each contestant keeps values, by label.

    Raises:
        UsageError: TRL on examples of more than two completions.
    """
    if entry.side == "trl" and workload.branches != 2:
        raise UsageError(f"{entry.label}: TRL reads pairs, and {workload.name} has {workload.branches} completions per prompt.")
    cold = entry.label.replace(entry.name, "prefopt", 1) if entry.warm else entry.label
    rows = [place for step in examples_of_steps(plan, workload) for example in step for place in workload.rows_of(example)]
    return {
        "what": "train",
        "side": entry.side,
        "device": plan.device,
        "gives_memory_back": plan.device == "cuda" and not plan.apart,
        "model": str(model),
        "pairs": str(workload.pairs),
        "ids": str(workload.pairs.with_name("ids.json")),
        "rows": rows,
        "branches": workload.branches,
        "out": str(plan.work / "out" / entry.file_name),
        "cache": str(caches[cold]),
        "batch_size": plan.batch_size,
        "steps": plan.steps,
        "block_steps": plan.block_steps,
        "reference_parts": REFERENCE_PARTS,
        "max_length": plan.max_length,
        "learning_rate": plan.learning_rate,
        "precision": plan.precision,
        "checkpointing": plan.checkpointing,
        "lora_rank": plan.lora_rank,
        "seed": ORDER_SEED,
        "beta": BETA,
        "settings": entry.settings,
    }


def player_for(plan: Plan, entry: Contestant, spec: Mapping[str, Any]) -> Player:
    """The contestant's process, not started yet; its folder is empty."""
    folder = plan.work / "out" / entry.file_name
    folder.parent.mkdir(parents=True, exist_ok=True)
    file = folder.with_suffix(".spec.json")
    file.write_text(json.dumps(spec), encoding="utf-8")
    surroundings = {"HF_HOME": str(plan.work / "hf"), "PREFOPT_CACHE": str(plan.work / "caches" / "default")}
    if plan.threads:
        surroundings["OMP_NUM_THREADS"] = str(plan.threads)
    python = plan.python if entry.side == "trl" else sys.executable
    return Player(entry.label, [python, "-m", "bench.versus.child", str(file)], folder.with_suffix(".log"), surroundings, plan.limit_s)


def shortened(plan: Plan, blocks: int) -> Plan:
    """The same with so many blocks of one step, for a look at a setting; all contestants look one after the other."""
    return replace(plan, blocks=blocks, block_steps=1, apart=True)
