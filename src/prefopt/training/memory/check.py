"""Whether a run will fit into memory, told before it starts, from the model's config alone.

    certain    weights, gradients and AdamW's two moments: all there when the optimizer steps
    likely     activations of a micro-batch, what the largest operation takes besides, and what the C library keeps back

A run whose certain part does not fit is refused, with what would help and how much. The likely part is an estimate, good to
about a quarter (docs/memory.md has the measurements), so where it is what exceeds the memory, the run is only warned.
"""

import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from prefopt.data.store import Sizes
from prefopt.engine.batch import Sharing
from prefopt.engine.head import CHUNK_LOGITS
from prefopt.errors import RunError
from prefopt.methods.method import Method
from prefopt.models.load import Precision, choose_precision, locate
from prefopt.models.settings import ModelSettings
from prefopt.training.assemble import as_reference, reference_settings
from prefopt.training.group.processes import Processes
from prefopt.training.memory.available import Available, available_memory
from prefopt.training.memory.skeleton import Skeleton, read_skeleton
from prefopt.training.optimizers.kinds import KINDS
from prefopt.training.settings import RunSettings
from prefopt.trees import PromptTree

LIBRARIES = 90_000_000
"""What torch loads and keeps on its first forward and backward pass on a CPU: kernels, thread pools, caches of shapes."""

HEAP_LIMIT = 2**25
"""Tensors up to 32 MiB come from the heap of glibc, which is left with holes; larger ones go back to the system when they are
freed. MALLOC_MMAP_THRESHOLD_ in the environment moves that border."""

HEAP_HOLES = {(False, False): 0.75, (True, False): 1.7, (False, True): 0.5, (True, True): 1.0}
"""The holes as a share of all activations that are computed, by (an adapter is trained, gradient checkpointing). Measured."""

MARGIN = 3.0
"""Times the rule of thumb that must be there for it to be enough; else the activations are counted."""

LORA_RANK = 16
"""The rank that is proposed."""

MAX_PROCESSES = 64
"""More are not proposed."""


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the memory that a run takes."""

    name: str
    num_bytes: int
    certain: bool


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """What one process of a run takes, beside Python and its libraries.

    Attributes:
        parts: all that is there at once at the fullest moment.
        loading: what reading the model takes, if that is more than the certain parts.
    """

    parts: tuple[Part, ...]
    loading: int = 0

    @property
    def certain(self) -> int:
        """Bytes that will be needed in any case."""
        return max(self.loading, sum(part.num_bytes for part in self.parts if part.certain))

    @property
    def total(self) -> int:
        """Bytes at the fullest moment."""
        return max(self.loading, sum(part.num_bytes for part in self.parts))

    def lines(self) -> list[str]:
        """The parts for people, one per line, and their sum."""
        rows = [(part.name, size(part.num_bytes)) for part in self.parts if part.num_bytes] + [("in all", size(self.total))]
        width = max(len(name) for name, _ in rows)
        return [f"{name:<{width}}  {number:>9}" for name, number in rows]


@dataclass(frozen=True, slots=True)
class MemoryCheck:
    """A run before it starts, and what there is for it.

    Attributes:
        method, settings: of the run.
        processes: how many share it.
        device: that it computes on.
        available: what a process may take; as it was before the model was loaded.
    """

    method: Method
    settings: RunSettings
    processes: int
    device: torch.device
    available: Available

    def refuse(self) -> None:
        """Stop a run that cannot fit.

        Raises:
            RunError: weights, gradients and moments are more than there is; says what helps.
        """
        if self.estimate(self.settings.max_tokens, exact=False).certain <= self.available.num_bytes:
            return
        estimate = self.estimate(self.settings.max_tokens)
        needed = ", ".join(f"{part.name} {size(part.num_bytes)}" for part in estimate.parts if part.certain and part.num_bytes)
        rest = sum(part.num_bytes for part in estimate.parts if not part.certain)
        reading = f"reading the model takes {size(estimate.loading)} on each process; " if estimate.certain == estimate.loading else ""
        raise RunError(
            f"the run needs at least {size(estimate.certain)} of memory, and {size(self.available.num_bytes)} {self.available.where} are "
            f"free ({reading}{needed}; activations and the like take up to {size(rest)} more). {self._advice(self.settings.max_tokens)} "
            "--memory-check off starts it all the same."
        )

    def note(self, trees: Sequence[PromptTree], sharing: Sharing) -> str | None:
        """A warning where the run may not fit, now that its examples are known; None where it should.

        Args:
            trees: examples of the run.
            sharing: how completions share their prompt.
        """
        sizes = Sizes.of(trees)
        costs_E = (sizes.prompt if sharing != "plain" else sizes.prompt * sizes.branches) + sizes.answers
        step = float(costs_E.mean()) * min(self.settings.batch_size, len(trees))
        positions = min(self.settings.max_tokens, max(int(costs_E.max()), math.ceil(step / self.processes)))
        if MARGIN * self.estimate(positions, exact=False).total <= self.available.num_bytes:
            return None
        estimate = self.estimate(positions)
        if estimate.total <= self.available.num_bytes:
            return None
        parts = ", ".join(f"{part.name} {size(part.num_bytes)}" for part in estimate.parts if part.num_bytes)
        return (
            f"note: memory may run out: the run may need {size(estimate.total)} ({parts}), and {size(self.available.num_bytes)} "
            f"{self.available.where} were free. {self._advice(positions)}"
        )

    def estimate(self, positions: int, processes: int | None = None, *, exact: bool = True, **changes: Any) -> MemoryEstimate:
        """What a process takes, with some settings changed.

        Args:
            positions: of the largest micro-batch.
            processes: how many share the run, if not as many as now.
            exact: as `estimate_memory`.
            changes: settings by name.
        """
        settings = self.settings.model_copy(update=changes)
        count = processes or self.processes
        return estimate_memory(self.method, settings, positions=positions, device=self.device, num_processes=count, exact=exact)

    def _advice(self, positions: int) -> str:
        """What would make it fit, the most effective first."""
        now = self.estimate(positions)
        found = [(self.estimate(at, count, **changes), words, changes) for words, changes, at, count in self._remedies(positions)]
        helpful = sorted((entry for entry in found if entry[0].total < 0.97 * now.total), key=lambda entry: entry[0].total)
        if not helpful:
            return "Take a smaller model, or more memory."
        all_at_once = {name: value for *_, changes in helpful for name, value in changes.items()}
        lines = [f"{words}: {size(estimate.total)}{self._verdict(estimate)}" for estimate, words, _ in helpful]
        if len(all_at_once) > 1 and not any(estimate.total <= self.available.num_bytes for estimate, *_ in helpful):
            best = self.estimate(min(positions, all_at_once.get("max_tokens", positions)), **all_at_once)
            lines.append(f"all of them{' but fsdp' if len(all_at_once) < len(helpful) else ''}: {size(best.total)}{self._verdict(best)}")
        return f"In all it would take about {size(now.total)}, and with\n  " + "\n  ".join(lines) + "\nOr take a smaller model."

    def _verdict(self, estimate: MemoryEstimate) -> str:
        return ", which fits" if estimate.total <= self.available.num_bytes else ""

    def _remedies(self, positions: int) -> list[tuple[str, dict[str, Any], int, int | None]]:
        """Each with its words, the settings that it changes, the positions of a micro-batch then, and the number of processes."""
        settings = self.settings
        found: list[tuple[str, dict[str, Any], int, int | None]] = []
        if not trains_adapter(settings):
            found.append((f"--lora-rank {LORA_RANK}", {"lora_rank": LORA_RANK}, positions, None))
        elif precision_of(settings, self.device).autocast is None:
            found.append(("--precision bf16", {"precision": "bf16"}, positions, None))
        if trains_adapter(settings) and not settings.load_in_4bit and settings.parallel == "ddp":
            found.append(("--load-in-4bit on", {"load_in_4bit": True}, positions, None))
        if not settings.gradient_checkpointing:
            found.append(("--gradient-checkpointing on", {"gradient_checkpointing": True}, positions, None))
        if (half := positions // 2) >= settings.max_length:
            found.append((f"--max-tokens {half}", {"max_tokens": half}, half, None))
        if self.method.needs.reference and not reference_settings(settings).reference_cache:
            found.append(("--reference-cache on", {"reference_cache": True}, positions, None))
        if self.device.type == "cuda" and (count := self._enough_processes(positions)):
            found.append((f"--parallel fsdp on {count} GPUs", {"parallel": "fsdp"}, positions, count))
        return found

    def _enough_processes(self, positions: int) -> int | None:
        count = self.processes if self.settings.parallel == "ddp" and self.processes > 1 else 2 * self.processes
        while count <= MAX_PROCESSES:
            if self.estimate(positions, count, parallel="fsdp").total <= self.available.num_bytes:
                return count
            count *= 2
        return None


def check_memory(method: Method, settings: RunSettings, processes: Processes) -> MemoryCheck | None:
    """Look whether the run can fit, before anything of the model is read.

    Returns:
        what `note` asks once the examples are known; None where it was switched off or cannot be told.

    Raises:
        RunError: it cannot fit.
    """
    if not settings.memory_check:
        return None
    available = available_memory(processes.device)
    if available is None:
        return None
    _known_skeleton.cache_clear()  # another model may lie in the same folder by now
    check = MemoryCheck(method, settings, processes.count, processes.device, available)
    try:
        check.estimate(settings.max_tokens, exact=False)
    except Exception:  # the config cannot be read, or the adapter not be put in: loading the model will say what is wrong
        return None
    check.refuse()
    return check


def estimate_memory(
    method: Method, settings: RunSettings, *, positions: int, device: torch.device, num_processes: int = 1, exact: bool = True
) -> MemoryEstimate:
    """What one process of the run takes, beside Python and its libraries.

    Args:
        method: whether it has a reference, and how many completions an example has.
        settings: of the run.
        positions: of the largest micro-batch.
        device: that it computes on.
        num_processes: that share the run.
        exact: count what a forward pass keeps; else estimate it by a rule of thumb, in a tenth of the time.

    Raises:
        Exception: whatever reading the model's config raises.
    """
    skeleton = _skeleton(settings, device, method, exact=exact)
    adapter = trains_adapter(settings)
    precision = precision_of(settings, device)
    kind = KINDS[settings.optim]
    trained = precision.trained.itemsize * skeleton.num_trained
    share = num_processes if settings.parallel == "fsdp" else 1
    reference = _reference_bytes(method, settings, device, skeleton)
    width = "4 bits" if settings.load_in_4bit else "float32" if precision.weights == torch.float32 else "bf16"
    likely = int(skeleton.kept.of(positions))
    parts = [
        Part(f"frozen weights ({width})", skeleton.frozen_bytes // share if adapter else 0, certain=True),
        Part("trained weights", trained // share, certain=True),
        Part("gradients", trained // share, certain=True),
        Part(kind.state_name, int(kind.state_bytes * skeleton.num_trained) // share, certain=True),
        Part("the reference model", reference // share, certain=True),
        Part(f"activations of {positions:,} positions", likely, certain=False),
        Part("the largest operation", _largest_operation(skeleton, positions, device, adapter=adapter), certain=False),
        Part("one layer written out", precision.weights.itemsize * skeleton.largest_packed, certain=False),
    ]
    if share > 1:  # the layer that runs and the one that is fetched meanwhile, and what is outside of the layers
        layers = (skeleton.frozen_bytes + trained - skeleton.outside_bytes) // skeleton.num_layers
        parts.append(Part("gathered weights", skeleton.outside_bytes + 2 * layers, certain=False))
    if device.type == "cpu":
        parts.append(Part("kernels and caches", LIBRARIES, certain=False))
        parts.append(Part("holes in the heap", _heap_holes(skeleton, positions, (adapter, settings.gradient_checkpointing)), certain=False))
    # A process that is to keep a part of the weights reads all of them first, into the machine's memory.
    loading = skeleton.frozen_bytes + trained if share > 1 and device.type == "cpu" else 0
    return MemoryEstimate(tuple(parts), loading)


def trains_adapter(settings: ModelSettings) -> bool:
    """Whether the run trains an adapter, and not all weights."""
    return bool(settings.lora_rank or settings.adapter or locate(settings.model)[1])


def precision_of(settings: RunSettings, device: torch.device) -> Precision:
    """The arithmetic of a run, as its settings, its optimizer and the hardware have it."""
    return choose_precision(settings.precision, device, adapter=trains_adapter(settings), trained=KINDS[settings.optim].trained)


def _skeleton(settings: RunSettings, device: torch.device, method: Method, *, exact: bool) -> Skeleton:
    num_completions = 2 if method.needs.completions == "pair" else 1
    own = ModelSettings.model_validate({name: getattr(settings, name) for name in ModelSettings.model_fields})
    return _known_skeleton(own.model_dump_json(), precision_of(settings, device), num_completions, exact)


@cache  # a refusal looks at the same model several times
def _known_skeleton(settings: str, precision: Precision, num_completions: int, exact: bool) -> Skeleton:
    own = ModelSettings.model_validate_json(settings)
    return read_skeleton(own, precision, num_completions=num_completions, exact=exact)


def _reference_bytes(method: Method, settings: RunSettings, device: torch.device, skeleton: Skeleton) -> int:
    """What the reference takes while the run trains. Data that brings its values needs none; that is not known yet."""
    reference = reference_settings(settings)
    if not method.needs.reference or reference.reference_cache:
        return 0
    if reference.reference is not None:
        found = _skeleton(as_reference(settings, reference.reference), device, method, exact=False)
        return found.frozen_bytes + precision_of(settings, device).weights.itemsize * found.num_trained
    if settings.lora_rank:  # the policy with its new adapter switched off
        return 0
    trained = precision_of(settings, device).trained.itemsize * skeleton.num_trained
    return trained + (0 if trains_adapter(settings) else skeleton.frozen_bytes)


def _largest_operation(skeleton: Skeleton, positions: int, device: torch.device, *, adapter: bool) -> int:
    """What comes and goes at the fullest moment, when the backward pass begins: in the head, or in the last feed-forward layer."""
    logits = min(CHUNK_LOGITS.get(device.type, CHUNK_LOGITS["cuda"]), positions * skeleton.vocabulary)
    head = 3 * 4 * logits + (0 if adapter else 4 * skeleton.vocabulary * skeleton.hidden)
    return max(head, 4 * 4 * positions * skeleton.intermediate)


def _heap_holes(skeleton: Skeleton, positions: int, kind: tuple[bool, bool]) -> int:
    if not sys.platform.startswith("linux") or os.environ.get("MALLOC_MMAP_THRESHOLD_"):
        return 0
    from_heap = 4 * positions * skeleton.hidden <= HEAP_LIMIT
    return int(HEAP_HOLES[kind] * skeleton.computed.of(positions)) if from_heap else 0


def size(num_bytes: float) -> str:
    """Bytes for people, in units of 1000 as the run's metrics have them: 1.2 GB."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.0f} MB"
