"""The steps, most important first: what is run, and how long it may take."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LENGTHS = str(ROOT / "bench" / "lengths" / "hh.json")
TESTS = [f"tests/{room}/test_on_gpu.py" for room in ("engine", "models", "training")]
OTHER_TESTS = ["tests/engine", "tests/methods", "tests/models", "tests/training/test_step.py", "tests/training/test_cut.py"]


@dataclass(frozen=True, slots=True)
class Setup:
    """Where the steps run.

    Attributes:
        device: `cuda`, or `cpu` for a rehearsal.
        memory_gb: of the GPU.
        work: folder for what a step writes; emptied by whoever made it.
        settings: names of prefopt's settings, for steps that need one that may not be there.
    """

    device: str
    memory_gb: float
    work: Path
    settings: frozenset[str]

    @property
    def rehearses(self) -> bool:
        """Whether it is a rehearsal."""
        return self.device == "cpu"

    def named(self, part: str) -> str:
        """The setting with that in its name; empty: there is none."""
        return next((name for name in sorted(self.settings) if part in name), "")

    def result(self, step: str) -> Path:
        """Where a step leaves what it measured."""
        return self.work / f"{step}.json"


@dataclass(frozen=True, slots=True)
class Step:
    """One step.

    Attributes:
        name: of the step, in file and log.
        part: of the call that it belongs to; the third part is more than is needed.
        says: what it does.
        limit_s: seconds after which it is ended.
        needs: what stands in the name of a setting of prefopt without which it is left out; empty: none.
        command: what is run, given the setup.
    """

    name: str
    part: int
    says: str
    limit_s: float
    command: Callable[[Setup], list[str]]
    needs: str = ""


def python(module: str, *words: str) -> list[str]:
    """A module of this interpreter."""
    return [sys.executable, "-m", module, *words]


def facts(setup: Setup) -> list[str]:
    return python("bench.gpu.machine", "--device", setup.device, "--out", str(setup.result("facts")))


FLEX = "flex or gemma2 or gpt_oss or deepseek_v3"
REST = f"not ({FLEX})"
"""Tests for which FlexAttention is compiled, which takes some ten seconds each, and the others."""


def correct(name: str, which: str, rehearsed: str) -> Callable[[Setup], list[str]]:
    """Tests that are marked `gpu`; the figures that they note stand in their file as properties."""

    def command(setup: Setup) -> list[str]:
        # Another version of a library may warn of what will change, which says nothing about numbers.
        words = ["-q", "-W", "default", "-p", "no:cacheprovider", "--timeout", "120", f"--junitxml={setup.result(name)}", "-m", "gpu"]
        return python("pytest", *words, "-k", rehearsed if setup.rehearses else which, *TESTS)

    return command


def versions(setup: Setup) -> list[str]:
    """Tests that need no GPU, with the versions of this machine."""
    some = ["tests/training/test_cut.py"] if setup.rehearses else OTHER_TESTS
    parallel = [] if setup.rehearses else ["-n", "8"]
    words = ["-q", "-W", "default", "-p", "no:cacheprovider", "-m", "not slow and not gpu", f"--junitxml={setup.result('versions')}"]
    return python("pytest", *words, *parallel, *some)


def versus(name: str, shape: str, contestants: str, *words: str, blocks: int = 3, batch: int = 64) -> Callable[[Setup], list[str]]:
    """bench.versus on pairs of hh-rlhf's lengths, one contestant after the other."""

    def command(setup: Setup) -> list[str]:
        size = ["--shape", shape, "--batch", str(batch), "--blocks", str(blocks), "--block-steps", "2", "--precision", "bf16"]
        if setup.rehearses:
            size = ["--shape", "1m", "--batch", "4", "--blocks", "1", "--block-steps", "1", "--precision", "float32"]
        return python(
            "bench.versus",
            *("--workload", "lengths", "--lengths", LENGTHS, "--max-length", "256" if setup.rehearses else "1024"),
            *("--device", setup.device, "--contestants", contestants, "--apart", "--limit", "150"),
            *size,
            *words,
            *best_pass(shape, contestants, setup),
            *("--work", str(setup.work), "--name", name, "--out", str(setup.result(name))),
        )

    return command


PASSES = {"0.5b": (8, 16), "1.5b": (4, 8)}
"""Pairs per pass of TRL without checkpointing: the most whose activations, 2 and 4 MB per token, fit with rows of 1,024 tokens
into 80 GB, and into 140 GB. The third part of the steps tries others."""


def best_pass(shape: str, contestants: str, setup: Setup) -> list[str]:
    """TRL's pairs per pass, where it is not searched for."""
    if "trl-best" not in contestants or shape not in PASSES:
        return []
    size = 2 if setup.rehearses else PASSES[shape][setup.memory_gb > 100]
    return ["--set", f"trl-best:per_device_train_batch_size={size}"]


def searched(shape: str) -> Callable[[Setup], list[str]]:
    """TRL with its batch per pass searched for."""

    def command(setup: Setup) -> list[str]:
        made = versus(f"search-{shape}", shape, "trl-best", blocks=2)(setup)
        place = made.index("--set")
        return made[:place] + made[place + 2 :]

    return command


def memory(name: str, *words: str) -> Callable[[Setup], list[str]]:
    """A LoRA of rank 16 on a Llama of 7 billion weights; its peak is what is asked for."""
    thrifty = ("--checkpointing", "on", "--set", "prefopt:max_tokens=4096", "--lora-rank", "16")
    return versus(name, "7b", "prefopt", *thrifty, *words, blocks=2)


def longest(side: str) -> Callable[[Setup], list[str]]:
    """The longest pair that one trainer can make a step of in a fixed memory."""

    def command(setup: Setup) -> list[str]:
        size = ["--shape", "1m", "--most", "256", "--first", "64"] if setup.rehearses else ["--shape", "0.5b", "--memory", "24"]
        out = ("--out", str(setup.result(f"longest-{side}")), "--work", str(setup.work))
        return python("bench.longest", "--side", side, "--device", setup.device, *size, *out)

    return command


def head(setup: Setup) -> list[str]:
    size = ["--sizes", "64,512,32", "--rounds", "1", "--turns", "1", "--names", "plain", "ours"] if setup.rehearses else ["--rounds", "4"]
    return python("bench.head", "--device", setup.device, *size, "--out", str(setup.result("head")))


def compiled(setup: Setup) -> list[str]:
    size = ["--shape", "1m", "--max-tokens", "256", "--blocks", "1"] if setup.rehearses else ["--shape", "0.5b"]
    return python("bench.compile", "--device", setup.device, *size, "--out", str(setup.result("compile")))


def setting(step: str, shape: str, part: str, value: str) -> Callable[[Setup], list[str]]:
    """prefopt with and without a setting, named by a part of its name: time, memory and losses."""

    def command(setup: Setup) -> list[str]:
        told = "false" if part == "offload" and setup.rehearses else value  # from a CPU there is nowhere to move activations to
        return versus(step, shape, "prefopt,prefopt-again", "--set", f"prefopt-again:{setup.named(part)}={told}")(setup)

    return command


SIDES = "prefopt,trl,trl-best"
MODES = ("--checkpointing", "as-it-comes", "--set", "trl-best:gradient_checkpointing=false")
"""TRL recomputes activations as it comes, and not at its best; prefopt does not."""

FOUR_BITS = ("--set", "prefopt:load_in_4bit=true")

STEPS: Sequence[Step] = (
    Step("facts", 1, "the GPU, versions, rates of matrix products and of copies", 60, facts),
    Step(
        "correct",
        1,
        "GPU against CPU: attention, architectures, losses of a run, going on to the bit",
        150,
        correct("correct", REST, "llama or losses or over"),
    ),
    Step("versus-0.5b", 1, "0.5B in full against TRL as it comes and at its best", 170, versus("versus-0.5b", "0.5b", SIDES, *MODES)),
    Step("versus-1.5b", 1, "1.5B in full against TRL as it comes and at its best", 230, versus("versus-1.5b", "1.5b", SIDES, *MODES)),
    Step("correct-flex", 2, "GPU against CPU: what FlexAttention computes", 170, correct("correct-flex", FLEX, "narrow or gemma2")),
    Step("memory-7b", 2, "7B, LoRA on bf16 weights: peak memory", 120, memory("memory-7b")),
    Step("memory-7b-4bit", 2, "7B, LoRA on 4-bit weights: peak memory", 120, memory("memory-7b-4bit", *FOUR_BITS), "load_in_4bit"),
    Step("longest-prefopt", 2, "longest sequence in 24 GB, prefopt", 60, longest("prefopt")),
    Step("longest-trl", 2, "longest sequence in 24 GB, TRL", 75, longest("trl")),
    Step("head", 2, "the head against Liger, cut-cross-entropy and torch", 120, head),
    Step("compile", 2, "torch.compile of norms and feed-forward parts", 90, compiled),
    Step("offload", 2, "activations kept in main memory", 100, setting("offload", "0.5b", "offload", "true"), "offload"),
    Step("adamw8bit", 2, "AdamW with 8-bit states", 100, setting("adamw8bit", "0.5b", "optim", "adamw-8bit"), "optim"),
    Step("noise", 3, "0.5B, prefopt against itself", 120, versus("noise", "0.5b", "prefopt,prefopt-again")),
    Step("search-0.5b", 3, "TRL's pairs per pass, 0.5B", 300, searched("0.5b")),
    Step("search-1.5b", 3, "TRL's pairs per pass, 1.5B", 300, searched("1.5b")),
    Step("versions", 3, "tests that need no GPU, with this machine's versions", 200, versions),
)
