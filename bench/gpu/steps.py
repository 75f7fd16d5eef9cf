"""The steps, most important first: what is run, and how long it may take."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BARS_GB = 140.0
"""Memory of the GPU that the bars were set for."""

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
BITS = "main_memory or pinned or offloaded or fewer_bits or four_bits or float64 or saving"
REST = f"not ({FLEX} or {BITS})"
"""Tests for which FlexAttention is compiled, which takes some ten seconds each; those of activations in main memory, optimizers in
fewer bits and bases in four; and the others."""

STEPS_LIMIT_S = 460.0
"""All limits of a part together: the runner's 470 seconds less what a step may take to end."""


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


TOGETHER = 60.0
"""GB of a GPU that holds two or three of prefopt's runs on 0.5B in full at once: 8 GB each, and the activations of one at a time."""


def versus(
    name: str, shape: str, contestants: str, *words: str, blocks: int = 10, steps: int = 1, batch: int = 64, together_gb: float = inf
) -> Callable[[Setup], list[str]]:
    """bench.versus on pairs of hh-rlhf's lengths, if `words` name no other workload.

    Args:
        name: of the step.
        shape, contestants, words: flags of bench.versus.
        blocks, steps: blocks, and optimizer steps of each.
        batch: examples of a step.
        together_gb: memory of a GPU that holds all contestants at once, so that they can take turns; else they run one after the
            other. A rehearsal does what the GPU that the bars were set for would do.
    """

    def command(setup: Setup) -> list[str]:
        size = ["--shape", shape, "--batch", str(batch), "--blocks", str(blocks), "--block-steps", str(steps), "--precision", "bf16"]
        if setup.rehearses:
            tiny = shape if shape == "hybrid" else "1m"  # the smallest of its kind
            size = ["--shape", tiny, "--batch", "4", "--blocks", "1", "--block-steps", "1", "--precision", "float32"]
        made = [] if "--workload" in words else ["--workload", "lengths", "--lengths", LENGTHS]
        longest = ["--max-length", "256" if setup.rehearses else "1024"] if made else []
        if setup.rehearses and not made:
            longest = ["--prompt-tokens", "48", "--completion-tokens", "8"]
        apart = (BARS_GB if setup.rehearses else setup.memory_gb) < together_gb
        return python(
            "bench.versus",
            *(*made, *longest, "--device", setup.device, "--contestants", contestants, *(["--apart"] if apart else [])),
            *("--limit", "150", *size, *words),
            *best_pass(shape, contestants, setup),
            *("--work", str(setup.work), "--name", name, "--out", str(setup.result(name))),
        )

    return command


PASSES = {"0.5b": (8, 16), "1.5b": (4, 8)}
"""Pairs per pass of TRL without checkpointing: the most whose activations, 2 and 4 MB per token, fit with rows of 1,024 tokens
into 80 GB, and into 140 GB: arithmetic, not a search. The steps search-0.5b and search-1.5b try others."""


def best_pass(shape: str, contestants: str, setup: Setup) -> list[str]:
    """TRL's pairs per pass, where it is not searched for."""
    if "trl-best" not in contestants or shape not in PASSES:
        return []
    size = 2 if setup.rehearses else PASSES[shape][setup.memory_gb > 100]
    return ["--set", f"trl-best:per_device_train_batch_size={size}"]


def searched(shape: str) -> Callable[[Setup], list[str]]:
    """TRL with its batch per pass searched for."""

    def command(setup: Setup) -> list[str]:
        made = versus(f"search-{shape}", shape, "trl-best", blocks=1)(setup)
        place = made.index("--set")
        return made[:place] + made[place + 2 :]

    return command


def memory(name: str, *words: str) -> Callable[[Setup], list[str]]:
    """A LoRA of rank 16 on a Llama of 7 billion weights; its peak is what is asked for."""
    thrifty = ("--checkpointing", "on", "--set", "prefopt:max_tokens=4096", "--lora-rank", "16")
    return versus(name, "7b", "prefopt", *thrifty, *words, blocks=2, steps=2)


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


def planned(setup: Setup) -> list[str]:
    """What `prefopt plan` predicts, against runs."""
    return python(
        "bench.plan_check", "--device", setup.device, "--made", "1m" if setup.rehearses else "0.5b", "--add", str(setup.result("plan"))
    )


def setting(step: str, shape: str, part: str, value: str) -> Callable[[Setup], list[str]]:
    """prefopt with and without a setting, named by a part of its name: time, memory and losses."""

    def command(setup: Setup) -> list[str]:
        told = "false" if part == "offload" and setup.rehearses else value  # from a CPU there is nowhere to move activations to
        words = ("--set", f"prefopt-again:{setup.named(part)}={told}", "--precision", "bf16")  # a rehearsal too: some are for bf16 only
        return versus(step, shape, "prefopt,prefopt-again", *words, together_gb=TOGETHER)(setup)

    return command


SIDES = "prefopt,prefopt-again,trl,trl-best"
MODES = ("--checkpointing", "as-it-comes", "--set", "trl-best:gradient_checkpointing=false")
"""TRL recomputes activations as it comes, and not at its best; prefopt does not."""

OURS = "prefopt,prefopt-again,prefopt-plain"
FORKED = ("--set", "prefopt:sharing=fork", "--set", "prefopt-plain:sharing=plain")
KS = "prefopt@k2,prefopt-again@k2,prefopt@k4,prefopt@k8"
FOUR_BITS = ("--set", "prefopt:load_in_4bit=true")
LORA = ("--lora-rank", "16", "--checkpointing", "as-it-comes")

STEPS: Sequence[Step] = (
    Step("facts", 1, "the GPU, versions, rates of matrix products and of copies", 30, facts),
    Step(
        "correct",
        1,
        "GPU against CPU: attention, architectures, losses of a run, going on to the bit",
        150,
        correct("correct", REST, "llama or losses or over"),
    ),
    Step("versus-1.5b", 1, "1.5B in full against TRL as it comes and at its best", 280, versus("versus-1.5b", "1.5b", SIDES, *MODES)),
    Step(
        "versus-0.5b",
        2,
        "0.5B in full against TRL as it comes and at its best, in turns",
        200,
        versus("versus-0.5b", "0.5b", SIDES, *MODES, steps=2, together_gb=120),
    ),
    Step("memory-7b", 2, "7B, LoRA on bf16 weights: peak memory", 80, memory("memory-7b")),
    Step("memory-7b-4bit", 2, "7B, LoRA on 4-bit weights: peak memory", 80, memory("memory-7b-4bit", *FOUR_BITS), "load_in_4bit"),
    Step("plan", 2, "what `prefopt plan` predicts: memory and time, 0.5B in full and with LoRA", 100, planned),
    Step("correct-flex", 3, "GPU against CPU: what FlexAttention computes", 110, correct("correct-flex", FLEX, "narrow or gemma2")),
    Step("longest-prefopt", 3, "longest sequence in 24 GB, prefopt", 60, longest("prefopt")),
    Step("longest-trl", 3, "longest sequence in 24 GB, TRL", 70, longest("trl")),
    Step(
        "long-prompt",
        3,
        "prompts of 2,048 tokens, completions of 64: sharing on and off, in turns",
        80,
        versus("long-prompt", "0.5b", OURS, "--workload", "long-prompt", batch=16, together_gb=TOGETHER),
    ),
    Step(
        "no-prefix",
        3,
        "no shared prefix: sharing on and off, in turns",
        70,
        versus("no-prefix", "0.5b", OURS, "--workload", "no-prefix", batch=32, together_gb=TOGETHER),
    ),
    Step(
        "k",
        3,
        "2, 4 and 8 completions of a prompt, in turns",
        70,
        versus("k", "0.5b", KS, "--workload", "k2", batch=16, together_gb=TOGETHER),
    ),
    Step(
        "correct-bits",
        4,
        "GPU against CPU: activations in main memory, optimizers in fewer bits, four-bit bases",
        100,
        correct("correct-bits", BITS, BITS),
    ),
    Step("hybrid", 4, "a hybrid: sharing on and off, in turns", 90, versus("hybrid", "hybrid", OURS, together_gb=TOGETHER)),
    Step("adamw8bit", 4, "AdamW with 8-bit states, in turns", 65, setting("adamw8bit", "0.5b", "optim", "adamw-8bit"), "optim"),
    Step("adamw-bf16", 4, "AdamW with bf16 weights, in turns", 65, setting("adamw-bf16", "0.5b", "optim", "adamw-bf16"), "optim"),
    Step("offload", 4, "activations kept in main memory, in turns", 70, setting("offload", "0.5b", "offload", "true"), "offload"),
    Step("fork", 4, "0.5B made to fork: sharing on and off, in turns", 70, versus("fork", "0.5b", OURS, *FORKED, together_gb=TOGETHER)),
    Step("head", 5, "the head against Liger, cut-cross-entropy and torch", 110, head),
    Step("compile", 5, "torch.compile of norms and feed-forward parts", 80, compiled),
    Step(
        "versus-8b",
        5,
        "8B, LoRA of rank 16 against TRL as it comes, four blocks",
        270,
        versus("versus-8b", "8b", "prefopt,trl", *LORA, blocks=4, batch=16),
    ),
    Step("search-0.5b", 6, "TRL's pairs per pass, 0.5B", 110, searched("0.5b")),
    Step("search-1.5b", 6, "TRL's pairs per pass, 1.5B", 170, searched("1.5b")),
    Step("versions", 6, "tests that need no GPU, with this machine's versions", 180, versions),
)
