"""TRL as a contestant: `DPOTrainer.train()`, followed by a callback that waits for its turn.

Nothing here imports prefopt, so that TRL can live in an environment of its own. The order of the pairs comes with the spec:
the data set is laid out in it, and TRL's own sequential sampler reads it through.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from bench.versus.turns import Parts, Turns, peak_memory
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer

AS_IT_COMES = 8
"""TRL's own number of pairs per pass."""


def play(spec: Mapping[str, Any], turns: Turns) -> None:
    """Run what the spec says; the driver ends the process after the last block."""
    turns.facts(import_seconds=turns.start_seconds)
    rows = [json.loads(line) for line in Path(spec["pairs"]).read_text(encoding="utf-8").split("\n") if line]
    ordered = Dataset.from_list([rows[place] for place in spec["rows"]])
    config = DPOConfig(**options(spec))
    trainer = Measured(
        turns,
        spec["reference_parts"],
        model=spec["model"],
        args=config,
        train_dataset=ordered,
        processing_class=AutoTokenizer.from_pretrained(spec["model"]),
        peft_config=adapter(spec["lora_rank"]),
        callbacks=[],
    )
    trainer.add_callback(Blocks(turns, spec["block_steps"], trainer, same_tokens(trainer.train_dataset, spec)))
    trainer.train()


def options(spec: Mapping[str, Any]) -> dict[str, Any]:
    """What `DPOConfig` is given: what all contestants have in common, then its own; anything else is TRL's default."""
    own = dict(spec["settings"])
    per_pass = own.pop("per_device_train_batch_size", min(AS_IT_COMES, spec["batch_size"]))
    if spec["batch_size"] % per_pass:
        raise ValueError(f"{per_pass} pairs per pass do not divide a batch of {spec['batch_size']}")
    return {
        "output_dir": spec["out"],
        "per_device_train_batch_size": per_pass,
        "gradient_accumulation_steps": spec["batch_size"] // per_pass,
        "max_steps": spec["steps"],
        "max_length": spec["max_length"],
        "learning_rate": spec["learning_rate"],
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "beta": spec["beta"],
        "bf16": spec["precision"] == "bf16",
        "use_cpu": spec["device"] == "cpu",
        "train_sampling_strategy": "sequential",
        "seed": spec["seed"],
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **({} if spec["checkpointing"] is None else {"gradient_checkpointing": spec["checkpointing"]}),
        **own,
    }


def adapter(rank: int) -> Any:
    """LoRA on the layers that prefopt puts one on; None: all weights are trained."""
    if not rank:
        return None
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")


class Measured(DPOTrainer):
    """TRL's trainer; its reference pass waits for turns, its tokenisation is timed. What it computes is untouched."""

    def __init__(self, turns: Turns, reference_parts: int, **arguments: Any) -> None:
        self.turns, self.reference_parts = turns, reference_parts
        self.parts: Parts | None = None
        self.tokenise_seconds = 0.0
        super().__init__(**arguments)

    def _prepare_dataset(self, *arguments: Any, **named: Any) -> Any:
        before = self.turns.start_seconds
        prepared = super()._prepare_dataset(*arguments, **named)
        self.tokenise_seconds += self.turns.start_seconds - before
        return prepared

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        self.turns.enter("reference")
        self.parts = Parts(self.turns, -(-len(dataset) // batch_size), self.reference_parts)
        done = super()._precompute_ref_logps(dataset, name, batch_size)
        self.turns.finish()
        return done

    def compute_ref_log_probs(self, model: Any, inputs: Any) -> Any:
        found = super().compute_ref_log_probs(model, inputs)
        if self.parts is not None:
            self.parts.item()
        return found


class Blocks(TrainerCallback):
    """Waits before the first step and after every few, and tells the steps' losses."""

    def __init__(self, turns: Turns, block_steps: int, trainer: Measured, tokens: Mapping[str, Any]) -> None:
        self.turns, self.block_steps, self.trainer, self.tokens = turns, block_steps, trainer, tokens
        self.losses: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        model = self.trainer.model
        told = (
            "per_device_train_batch_size gradient_accumulation_steps gradient_checkpointing bf16 optim max_length precompute_ref_log_probs"
        )
        names = (told + " padding_free use_liger_kernel torch_compile activation_offloading").split()
        self.turns.facts(
            start_seconds=self.turns.start_seconds,
            tokenise_seconds=self.trainer.tokenise_seconds,
            memory_before=peak_memory(cuda=self.turns.cuda),
            options={name: str(getattr(args, name, None)) for name in names}
            | {"attention": model.config._attn_implementation, "weights": str(next(model.parameters()).dtype)},
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            versions={"trl": trl.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
            tokens=dict(self.tokens),
        )
        self.turns.enter("train")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
        # The last thing of a step: after the optimizer, with its loss.
        if "loss" not in (logs or {}):
            return
        self.losses.append(logs["loss"])
        if len(self.losses) == self.block_steps:
            losses, self.losses = self.losses, []
            self.turns.cut(losses=losses, memory=peak_memory(cuda=self.turns.cuda))


def same_tokens(dataset: Any, spec: Mapping[str, Any]) -> dict[str, Any]:
    """Whether TRL's ids are those of prefopt, row by row, and where they part first."""
    theirs = json.loads(Path(spec["ids"]).read_text(encoding="utf-8"))
    different = []
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    if len(dataset) != len(spec["rows"]):
        return {"rows": len(spec["rows"]), "kept": len(dataset), "different": None, "first": None}
    for place, row in zip(spec["rows"], dataset, strict=True):
        parts = [name for name, ids in zip(columns, theirs[place], strict=True) if list(row[name]) != ids]
        if parts:
            different.append({"row": place, "parts": parts, "ours": theirs[place], "theirs": [list(row[name]) for name in columns]})
    return {"rows": len(spec["rows"]), "kept": len(dataset), "different": len(different), "first": different[0] if different else None}
