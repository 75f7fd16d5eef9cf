"""The longest pair that a trainer can make an optimizer step of in a fixed memory: python -m bench.longest --side prefopt|trl

A pair of L tokens has a prompt of L / 2 and two completions of the other half. L doubles until memory runs out, then the border is
halved in until it is known to a sixteenth. Full fine-tuning, gradient checkpointing on for both, the reference computed before. Each
length is a real step: prefopt's loader, policy, loss and optimizer; TRL's `DPOTrainer.train()` of one step.

On a GPU the allocator refuses what goes beyond `--memory`. On a CPU nothing refuses: a length fits where the process held no more than
that, Python and its libraries included. There must be room for the first length that does not fit, which can take four times as much.
"""

import argparse
import gc
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench.versus.shapes import SHAPES, make_model
from bench.versus.workloads import tokenizer_texts, train_tokenizer

from prefopt.training.loop import forget_peak_memory, peak_memory_gb


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.longest", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--side", choices=("prefopt", "trl"), required=True)
    parser.add_argument("--shape", choices=SHAPES, default="0.5b")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--memory", type=float, default=24.0, help="GB")
    parser.add_argument("--first", type=int, default=4096, help="tokens that are tried first")
    parser.add_argument("--most", type=int, default=1_048_576, help="tokens beyond which nothing is tried")
    parser.add_argument("--work", type=Path, required=True, help="folder for the model, kept")
    parser.add_argument("--out", type=Path, help="a JSON line is added to it after each try")
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(min(1.0, given.memory * 1e9 / torch.cuda.get_device_properties(device).total_memory))
    model = model_folder(given.shape, given.work, given.device)
    step = (of_prefopt if given.side == "prefopt" else of_trl)(model, device, given.work, SHAPES[given.shape].vocabulary)
    tries: list[dict[str, Any]] = []

    def tell(length: int, fits: bool) -> None:
        tries.append({"tokens": length, "fits": fits, "peak": round(peak_memory_gb(device) * 1e9)})
        found = {"bench": "longest", "side": given.side, "shape": given.shape, "memory_gb": given.memory, "tries": tries}
        found["longest"] = max((own["tokens"] for own in tries if own["fits"]), default=0)
        print(json.dumps(tries[-1]), flush=True)
        if given.out:
            given.out.write_text(json.dumps(found) + "\n", encoding="utf-8")

    longest = search(lambda length: fits(step, length, device, given.memory), given.first, given.most, tell)
    print(f"{given.side}: {longest} tokens")
    return 0 if longest else 1


def search(fits: Callable[[int], bool], first: int, most: int, tell: Callable[[int, bool], None]) -> int:
    """The largest length that fits: doubled while it does, halved while nothing does, then narrowed down to a sixteenth; 0: none."""

    def try_one(length: int) -> bool:
        good = fits(length)
        tell(length, good)
        return good

    low, high, length = 0, math.inf, min(first, most)
    while length >= 16 and length <= most:
        if try_one(length):
            low = length
            if high < math.inf:
                break
            length *= 2
        else:
            high = length
            if low:
                break
            length //= 2
    while low and high < math.inf and high - low > low / 16:
        middle = int((low + high) / 2)
        if try_one(middle):
            low = middle
        else:
            high = middle
    return low


def fits(step: Callable[[int], None], length: int, device: torch.device, memory: float) -> bool:
    """Whether a step of that length can be made in so many GB; what it held is given back."""
    forget_peak_memory()
    try:
        step(length)
        good = device.type == "cuda" or peak_memory_gb(device) <= memory
    except torch.OutOfMemoryError:
        good = False
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return good


def model_folder(shape: str, work: Path, device: str) -> Path:
    """A model with random weights, made once for both sides."""
    folder = work / f"longest-model-{shape}"
    if not (folder / "model.safetensors").is_file():
        tokenizer = train_tokenizer(tokenizer_texts("lengths", None), vocabulary=min(SHAPES[shape].vocabulary, 16384))
        make_model(SHAPES[shape], tokenizer, folder, seed=0, device=device)
    return folder


def pair_ids(length: int, vocabulary: int) -> tuple[list[int], list[int], list[int]]:
    """Random prompt, chosen and rejected."""
    drawn = np.random.default_rng(length).integers(3, min(vocabulary, 2000), (3, length))
    rest = length - length // 2
    return drawn[0, : length // 2].tolist(), drawn[1, :rest].tolist(), drawn[2, :rest].tolist()


def of_prefopt(model: Path, device: torch.device, work: Path, vocabulary: int) -> Callable[[int], None]:
    """A step as `prefopt train dpo` makes one, with the reference's values at hand."""
    from prefopt.engine.batch import pack
    from prefopt.methods.dpo import dpo_loss
    from prefopt.models.load import choose_precision, load_model
    from prefopt.models.policy import Policy, trained_parameters
    from prefopt.models.proof import prove
    from prefopt.models.settings import ModelSettings
    from prefopt.training.optimizer import clip_gradients, make_optimizer, set_learning_rate
    from prefopt.trees import Completion, PromptTree, token_ids

    precision = choose_precision("auto", device, adapter=False)
    settings = ModelSettings(model=str(model), gradient_checkpointing=True)
    loaded = load_model(settings, precision=precision, device=device, seed=0)
    policy = Policy(loaded.model, prove(loaded.model, max_length=512, autocast=precision.autocast).path)
    optimizer = make_optimizer(trained_parameters(policy), weight_decay=0.0)
    set_learning_rate(optimizer, 1e-6)

    def step(length: int) -> None:
        prompt, chosen, rejected = pair_ids(length, vocabulary)
        tree = PromptTree(token_ids(prompt), (Completion(token_ids(chosen)), Completion(token_ids(rejected))))
        try:
            batch = pack([tree], sharing=policy.path.sharing, device=device)
            with torch.autocast(device.type, dtype=precision.autocast, enabled=precision.autocast is not None):
                summed = policy(batch).sum()
            own, other = summed.view(-1, 2).unbind(1)
            dpo_loss(own, other, own.detach(), other.detach(), beta=0.1).mean().backward()
            clip_gradients(policy, 1.0)
            optimizer.step()
        finally:
            optimizer.zero_grad(set_to_none=True)

    return step


def of_trl(model: Path, device: torch.device, work: Path, vocabulary: int) -> Callable[[int], None]:
    """A step as TRL makes one, with precomputed reference values."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    from prefopt.models.load import choose_precision

    config = DPOConfig(
        output_dir=str(work / "longest-trl"),
        per_device_train_batch_size=1,
        max_steps=1,
        max_length=None,
        bf16=choose_precision("auto", device, adapter=False).autocast is not None,
        use_cpu=device.type == "cpu",
        gradient_checkpointing=True,
        precompute_ref_log_probs=True,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    short = Dataset.from_list([{"prompt": "a b c", "chosen": " d e", "rejected": " f g"}])
    tokenizer = AutoTokenizer.from_pretrained(model)
    trainer = DPOTrainer(model=str(model), args=config, train_dataset=short, processing_class=tokenizer)

    def step(length: int) -> None:
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        row = dict(zip(names, pair_ids(length, vocabulary), strict=True)) | {"ref_chosen_logps": 0.0, "ref_rejected_logps": 0.0}
        trainer.train_dataset = Dataset.from_list([row])
        try:
            trainer.train()
        finally:
            trainer.model.zero_grad(set_to_none=True)
            if trainer.optimizer is not None:
                trainer.optimizer.zero_grad(set_to_none=True)

    return step


if __name__ == "__main__":
    sys.exit(main())
