"""Our chunked language-model head against what others offer: python -m bench.head

For N scored positions, a vocabulary of V and a width of D: the time of one forward and backward pass, the most memory beside what
is there before, and how far gradients are from those of plain logits in float32. The contestants run in turns.

    plain     all logits at once, log-softmax in float32
    ours      prefopt.engine.head: chunks, computed again in the backward pass
    torch     torch.nn.functional.linear_cross_entropy in its own chunks, where this torch has it
    liger     Liger's fused linear cross-entropy (needs Triton and a GPU)
    cce       cut-cross-entropy (the same)

A preference loss pulls at every token with a factor of its own, so gradients of weighted tokens are asked for. Liger's can only be
summed, so it is asked for that: the same work, and its gradients are compared with those of the sum.
"""

import argparse
import gc
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bench.versus.turns import status_bytes
from torch import Tensor

NAMES = ("plain", "ours", "torch", "liger", "cce")
SIZES = {
    "cpu": [(1024, 16384, 512), (4096, 16384, 512), (1024, 49152, 576)],
    "cuda": [(4096, 32000, 4096), (8192, 151936, 896), (8192, 151936, 1536), (16384, 151936, 1024), (16384, 128256, 4096)],
}
"""N, V, D: scored positions of a micro-batch, and models as bench.versus has them."""

Run = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""hidden [N, D], weight [V, D], target [N], pull [N] -> Σ pull·log π."""


def plain(hidden: Tensor, weight: Tensor, target: Tensor, pull: Tensor) -> Tensor:
    logps = (hidden @ weight.T).float().log_softmax(-1).gather(-1, target[:, None]).squeeze(-1)
    return (pull * logps).sum()


def ours(hidden: Tensor, weight: Tensor, target: Tensor, pull: Tensor) -> Tensor:
    from prefopt.engine.head import head_logps

    return (pull * head_logps(hidden, weight, None, target)[0]).sum()


def of_torch(hidden: Tensor, weight: Tensor, target: Tensor, pull: Tensor) -> Tensor:
    from torch.nn import LinearCrossEntropyOptions
    from torch.nn.functional import linear_cross_entropy

    losses = linear_cross_entropy(hidden, weight, target, reduction="none", options=LinearCrossEntropyOptions())
    return -(pull * losses).sum()


def liger(hidden: Tensor, weight: Tensor, target: Tensor, pull: Tensor) -> Tensor:
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    total: Tensor = -LigerFusedLinearCrossEntropyLoss(reduction="sum", accum_dtype=torch.float32)(weight, hidden, target)
    return total


def cce(hidden: Tensor, weight: Tensor, target: Tensor, pull: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return -(pull * linear_cross_entropy(hidden, weight, target, reduction="none")).sum()


RUNS: dict[str, Run] = {"plain": plain, "ours": ours, "torch": of_torch, "liger": liger, "cce": cce}
UNWEIGHTED = ("liger",)


class Trial:
    """One contestant at one size.

    Args:
        name: of the contestant.
        size: N, V, D.
        dtype, device: of hidden states and weight.
    """

    def __init__(self, name: str, size: tuple[int, int, int], dtype: torch.dtype, device: str) -> None:
        scored, vocabulary, width = size
        generator = torch.Generator(device).manual_seed(0)

        def draw(*shape: int, scale: float) -> Tensor:
            return (torch.randn(*shape, generator=generator, device=device) * scale).to(dtype)

        self.name, self.device = name, device
        self.hidden = draw(scored, width, scale=1.0).requires_grad_()
        self.weight = draw(vocabulary, width, scale=width**-0.5).requires_grad_()
        self.target = torch.randint(0, vocabulary, (scored,), generator=generator, device=device)
        pull = torch.rand(scored, generator=generator, device=device) - 0.5
        self.pull = torch.ones_like(pull) if name in UNWEIGHTED else pull

    def once(self) -> float:
        """Seconds of a forward and backward pass."""
        self.hidden.grad = self.weight.grad = None
        self.wait()
        began = time.perf_counter()
        RUNS[self.name](self.hidden, self.weight, self.target, self.pull).backward()
        self.wait()
        return time.perf_counter() - began

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def memory(self) -> int:
        """The most bytes beside those that are there before and after: the two gradients are counted in."""
        self.hidden.grad = self.weight.grad = None
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.once()
            return torch.cuda.max_memory_allocated() - before
        before = status_bytes("VmRSS")
        self.once()
        return max(0, status_bytes("VmHWM") - before)

    def errors(self) -> tuple[float, float]:
        """How far the gradients of hidden states and weight are from float32's, relative; computed in rows, to fit beside it."""
        self.once()
        weight = self.weight.detach().float()
        total = torch.zeros_like(weight)
        apart = norm = 0.0
        for start in range(0, len(self.hidden), 512):
            rows = slice(start, start + 512)
            hidden = self.hidden.detach()[rows].float()
            slope = -(hidden @ weight.T).softmax(-1) * self.pull[rows, None]
            slope.scatter_add_(1, self.target[rows, None], self.pull[rows, None])
            expected = slope @ weight
            assert self.hidden.grad is not None
            apart += float((self.hidden.grad[rows].float() - expected).square().sum())
            norm += float(expected.square().sum())
            total += slope.T @ hidden
        assert self.weight.grad is not None
        return (apart / norm) ** 0.5, float((self.weight.grad.float() - total).norm() / total.norm())


def try_one(name: str, size: tuple[int, int, int], dtype: str, device: str, rounds: int, *, again: bool = False) -> dict[str, Any]:
    """A contestant by itself: memory first, because a process's peak never falls; then its error, then its times; `again`: times only."""
    try:
        trial = Trial(name, size, getattr(torch, dtype), device)
        if again or device == "cuda":
            trial.once()  # compiles; on a CPU it would raise the peak
        found: dict[str, Any] = {"name": name, "size": size}
        if not again:
            found |= {"peak": trial.memory(), "errors": trial.errors()}
        return found | {"seconds": [trial.once() for _ in range(rounds)]}
    except torch.OutOfMemoryError:
        return {"name": name, "size": size, "failure": "out of memory"}
    except Exception as error:  # a library that is not there, or not for this device: the others go on
        return {"name": name, "size": size, "failure": f"{type(error).__name__}: {str(error).strip().split(chr(10))[0][:160]}"}


def measure(names: Sequence[str], size: tuple[int, int, int], dtype: str, device: str, rounds: int, turns: int) -> list[dict[str, Any]]:
    """All contestants at one size, in turns; what fails once is not tried again."""
    found: dict[str, dict[str, Any]] = {}
    for _ in range(turns):
        for name in names:
            before = found.get(name)
            if before and "failure" in before:
                continue
            run = try_one if device == "cuda" else apart
            own = run(name, size, dtype, device, rounds, again=before is not None)
            if before and "failure" not in own:
                before["seconds"] += own["seconds"]
            else:
                found[name] = own
            if device == "cuda":
                gc.collect()
                torch.cuda.empty_cache()
    return list(found.values())


def apart(name: str, size: tuple[int, int, int], dtype: str, device: str, rounds: int, *, again: bool = False) -> dict[str, Any]:
    """In a process of its own, whose peak is its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(try_one, name, size, dtype, device, rounds, again=again).result()
        except Exception as error:  # killed, most likely for memory
            return {"name": name, "size": size, "failure": f"its process ended: {error}"}


def table(found: Sequence[dict[str, Any]]) -> str:
    """Markdown: one row for each contestant at each size."""
    lines = ["| N | V | D | head | ms, median (range) | against ours | memory, MB | gradient error: hidden, weight |", "|---" * 8 + "|"]
    base = {tuple(row["size"]): median(row["seconds"]) for row in found if row["name"] == "ours" and "failure" not in row}
    for row in found:
        start = "| " + " | ".join(f"{number:,}" for number in row["size"]) + f" | {row['name']} | "
        if "failure" in row:
            lines.append(f"{start}{row['failure']} | | | |")
            continue
        times = row["seconds"]
        own = base.get(tuple(row["size"]))
        against = f"{median(times) / own:.2f}x" if own else ""
        errors = ", ".join(f"{error:.0e}" for error in row["errors"])
        lines.append(
            f"{start}{median(times) * 1e3:.1f} ({min(times) * 1e3:.1f}-{max(times) * 1e3:.1f}) | {against} | {row['peak'] / 1e6:,.0f} | "
            f"{errors} |"
        )
    return "\n".join(lines)


def size_of(text: str) -> tuple[int, int, int]:
    """N,V,D."""
    scored, vocabulary, width = (int(part) for part in text.split(","))
    return scored, vocabulary, width


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.head", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of hidden states and weight")
    parser.add_argument("--sizes", type=size_of, nargs="+", metavar="N,V,D", help="default: those of usual models")
    parser.add_argument("--names", nargs="+", choices=NAMES, help="default: all on a GPU, those without Triton on a CPU")
    parser.add_argument("--rounds", type=int, default=5, help="passes of a turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON lines, one for each contestant and size, written as they come")
    given = parser.parse_args(arguments)
    names = given.names or (NAMES if given.device == "cuda" else NAMES[:3])
    found = []
    for size in given.sizes or SIZES[given.device]:
        rows = measure(names, size, given.dtype, given.device, given.rounds, given.turns)
        found += rows
        if given.out:
            with given.out.open("a", encoding="utf-8") as lines:
                lines.writelines(json.dumps({"bench": "head", "device": given.device, "dtype": given.dtype, **row}) + "\n" for row in rows)
    device = torch.cuda.get_device_name() if given.device == "cuda" else "CPU"
    print(f"{given.dtype} on {device}, torch {torch.__version__}; {given.turns} turns of {given.rounds} passes\n")
    print(table(found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
