"""The settings under which a way of training fits into a memory, tried from those that cost nothing to those that cost most.

max_tokens                  down to 2,048 tokens a micro-batch costs little
gradient_checkpointing      as few layers as it takes; up to a third more time
max_tokens                  down to the longest example
optim adamw-8bit            moments in 8 bits, where bitsandbytes is installed
optim adamw-bf16            all weights trained in bf16 with compensated sums, where optimi is; before 8 bits on a CPU, where those are slow
offload_activations         on a GPU
parallel fsdp               on as few GPUs as it takes
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from prefopt.methods.method import Method
from prefopt.training.cut import fullest_row
from prefopt.training.memory.estimate import MemoryEstimate, estimate_memory, num_layers, trains_adapter
from prefopt.training.optimizers.kinds import KINDS
from prefopt.training.settings import RunSettings

CHEAP_TOKENS = 2048
"""Tokens of a micro-batch below which a GPU has too little to do at once."""


@dataclass(frozen=True, slots=True)
class Examples:
    """What is trained on, as far as memory depends on it.

    Attributes:
        lengths: tokens of a prompt and of each completion, on average.
        mean, spread: positions of an example, and their standard deviation.
        longest: positions of the largest example.
        per_step: examples of an optimizer step.
    """

    lengths: tuple[int, ...]
    mean: float
    spread: float
    longest: int
    per_step: int


@dataclass(frozen=True, slots=True)
class Fit:
    """A way of training with the settings under which it fits, or the closest to it.

    Attributes:
        settings: all of them.
        changes: those that differ from the run as it was asked for.
        estimate: what one process takes.
        fits: whether there is room for it.
        gpus: how many share the run.
    """

    settings: RunSettings
    estimate: MemoryEstimate
    fits: bool
    changes: dict[str, Any] = field(default_factory=dict)
    gpus: int = 1

    @property
    def recomputing(self) -> int:
        """Layers that recompute."""
        given = self.settings.gradient_checkpointing
        return given if isinstance(given, int) else 0


def find_fit(method: Method, settings: RunSettings, examples: Examples, *, room: int, device: torch.device, gpus: int) -> Fit:
    """The settings that fit with the least cost; where none do, those that take least.

    Args:
        method: of the run.
        settings: as it would be run if there were room.
        examples: what is trained on.
        room: bytes that a process may take.
        device: of the run.
        gpus: how many there are at most.

    Raises:
        Exception: the model's config cannot be read.
    """
    least: Fit | None = None
    for changes, count in _ladder(settings, device, gpus):
        changed = settings.model_copy(update=changes)
        if _estimate(method, changed, examples, device, count, exact=False).certain > room and least is not None:
            continue
        found = _with_room(method, changed, examples, room=room, device=device, count=count)
        found = Fit(found.settings, found.estimate, found.fits, {**changes, **found.changes}, count)
        if found.fits:
            return found
        if least is None or found.estimate.total < least.estimate.total:
            least = found
    assert least is not None, "the first rung is always looked at"
    return least


def _ladder(settings: RunSettings, device: torch.device, gpus: int) -> Iterator[tuple[dict[str, Any], int]]:
    """What may be given up beside tokens and time, and on how many GPUs."""
    yield {}, 1
    if not trains_adapter(settings):
        for changes in _fewer_bits(settings, device):
            if KINDS[changes["optim"]].is_installed():
                yield changes, 1
    if device.type == "cuda":
        yield {"offload_activations": True}, 1
        count = 2
        while count <= gpus and not settings.load_in_4bit:
            yield {"parallel": "fsdp"}, count
            count *= 2


def _fewer_bits(settings: RunSettings, device: torch.device) -> list[dict[str, Any]]:
    """Optimizers that hold their numbers in fewer bits than the usual one, in the order in which they are tried."""
    eight: dict[str, Any] = {"optim": "adamw-8bit"}
    if settings.precision == "float32":
        return [eight]
    bf16 = {"optim": "adamw-bf16", "precision": "bf16"}
    return [bf16, eight] if device.type == "cpu" else [eight, bf16]


def not_installed(settings: RunSettings, device: torch.device) -> list[str]:
    """Optimizers that would take less memory and were not tried, because their libraries are missing."""
    if trains_adapter(settings):
        return []
    return [changes["optim"] for changes in _fewer_bits(settings, device) if not KINDS[changes["optim"]].is_installed()]


def _with_room(method: Method, settings: RunSettings, examples: Examples, *, room: int, device: torch.device, count: int) -> Fit:
    """Fewer tokens at a time and recomputing layers, as much as it takes."""

    def at(tokens: int, layers: int) -> Fit:
        changes: dict[str, Any] = {} if tokens == settings.max_tokens else {"max_tokens": tokens}
        if layers:
            changes["gradient_checkpointing"] = layers
        changed = settings.model_copy(update=changes)
        estimate = _estimate(method, changed, examples, device, count)
        return Fit(changed, estimate, estimate.total <= room, changes)

    depth = num_layers(method, settings, device)
    sizes = [settings.max_tokens]
    while sizes[-1] > max(CHEAP_TOKENS, examples.longest):
        sizes.append(max(CHEAP_TOKENS, examples.longest, sizes[-1] // 2))
    smallest = max(16, min(sizes[-1], examples.longest))
    for tokens in sizes:
        if (found := at(tokens, 0)).fits:
            return found
    for tokens in (sizes[0], sizes[-1], smallest):
        if not (found := at(tokens, depth)).fits:
            continue
        low, high = 0, depth  # it falls layer by layer: halving the distance finds the first that fits
        while high - low > 1:
            middle = (low + high) // 2
            here = at(tokens, middle)
            low, high, found = (low, middle, here) if here.fits else (middle, high, found)
        return found
    return found


def _estimate(
    method: Method, settings: RunSettings, examples: Examples, device: torch.device, count: int, *, exact: bool = True
) -> MemoryEstimate:
    own = examples.per_step / count
    positions = fullest_row(examples.mean, examples.spread, examples.longest, count=own, max_tokens=settings.max_tokens)
    return estimate_memory(
        method,
        settings,
        positions=positions,
        device=device,
        num_processes=count,
        exact=exact,
        tree=examples.lengths,
        accumulates=examples.mean * own > settings.max_tokens,
    )
