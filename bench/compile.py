"""Whether torch.compile pays: python -m bench.compile

The same optimizer step twice in one process, in turns: as it is, and with the norms and feed-forward parts of all layers compiled
(attention, with its trees, stays as it is). Shapes change with every batch, so they are compiled for changing shapes. What compiling
takes is told beside.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from bench.packing import LENGTHS, trees_of
from bench.versus.shapes import SHAPES
from torch import nn

from prefopt.engine.batch import pack
from prefopt.engine.head import HeadShape
from prefopt.methods.dpo import dpo_loss
from prefopt.models.policy import EnginePath, Policy
from prefopt.trees import Completion, PromptTree, token_ids


class Steps:
    """A model with its optimizer, and steps of DPO on micro-batches (the reference: uniform).

    Args:
        shape: of bench.versus.
        device: where.
        autocast: dtype of products; None: float32.
        compiled: whether norms and feed-forward parts are.
    """

    def __init__(self, shape: str, device: torch.device, autocast: torch.dtype | None, *, compiled: bool) -> None:
        from transformers import Qwen2ForCausalLM

        torch.manual_seed(0)
        with device:
            model = Qwen2ForCausalLM._from_config(SHAPES[shape].config(), dtype=torch.float32)
        self.policy = Policy(model, EnginePath("flat", HeadShape()))
        self.device, self.autocast = device, autocast
        if compiled:
            for module in model.modules():
                if type(module).__name__.endswith(("MLP", "RMSNorm")):
                    nn.Module.compile(module, dynamic=True)
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=1e-6, fused=True)

    def step(self, trees: Sequence[PromptTree]) -> tuple[float, float]:
        """Seconds of a step, and its loss."""
        batch = pack(trees, sharing="flat", device=self.device)
        self.wait()
        began = time.perf_counter()
        with torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            chosen, rejected = self.policy(batch).sum().view(-1, 2).unbind(1)
        loss = dpo_loss(chosen, rejected, torch.zeros_like(chosen), torch.zeros_like(rejected), beta=0.1).mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        value = float(loss.detach())
        self.wait()
        return time.perf_counter() - began, value

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def micro_batches(number: int, vocabulary: int, max_tokens: int) -> list[list[PromptTree]]:
    """Pairs of hh-rlhf's lengths, random tokens, filled up to a number of tokens."""
    rng = np.random.default_rng(0)
    lengths = trees_of(LENGTHS)
    made: list[list[PromptTree]] = []
    for _ in range(number):
        own: list[PromptTree] = []
        while True:
            tree = lengths[int(rng.integers(len(lengths)))]
            if sum(other.num_tokens for other in own) + tree.num_tokens > max_tokens:
                if own:
                    break
                continue  # longer than a whole micro-batch
            parts = [
                token_ids(rng.integers(0, vocabulary, count)) for count in (len(tree.prompt_ids), *(len(c.ids) for c in tree.completions))
            ]
            own.append(PromptTree(parts[0], tuple(Completion(part) for part in parts[1:])))
        made.append(own)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.compile", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="0.5b" if torch.cuda.is_available() else "32m")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=("bf16", "float32"), default="bf16")
    parser.add_argument(
        "--max-tokens", type=int, default=8192 if torch.cuda.is_available() else 2048, help="of a micro-batch, which is a step here"
    )
    parser.add_argument("--blocks", type=int, default=10, help="steps of each, in turns")
    parser.add_argument("--out", type=Path, help="a JSON line is added to it")
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    autocast = torch.bfloat16 if given.precision == "bf16" else None
    sides = {name: Steps(given.shape, device, autocast, compiled=name == "compiled") for name in ("as it is", "compiled")}
    batches = micro_batches(given.blocks + 2, SHAPES[given.shape].vocabulary, given.max_tokens)
    first: dict[str, float] = {}
    losses: dict[str, list[float]] = {name: [] for name in sides}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number, trees in enumerate(batches):
        for name, side in sides.items():
            took, loss = side.step(trees)
            losses[name].append(loss)
            if number == 0:
                first[name] = took
            elif number > 1:  # the second step may compile again, for changing shapes
                seconds[name].append(took)
    ratios = sorted(own / other for own, other in zip(seconds["compiled"], seconds["as it is"], strict=True))
    found: dict[str, Any] = {
        "bench": "compile",
        "shape": given.shape,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "precision": given.precision,
        "torch": torch.__version__,
        "seconds": {name: median(own) for name, own in seconds.items()},
        "first_step": first,
        "time_against_as_it_is": {"median": median(ratios), "low": ratios[0], "high": ratios[-1]},
        "largest_loss_difference": max(abs(a - b) for a, b in zip(losses["as it is"], losses["compiled"], strict=True)),
    }
    print(json.dumps(found, indent=1), flush=True)
    if given.out:
        with given.out.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(found) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
