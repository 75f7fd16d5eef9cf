"""How much memory a run takes, from its settings and the model's config alone.

    certain    weights, gradients and the optimizer's state: all there when the optimizer steps
    likely     what a micro-batch holds at its fullest moment besides, what the libraries keep, and the holes in the C library's heap

On a CPU it is what the process holds beyond Python and its libraries as they are before the run. On a GPU it is what tensors take;
what torch's allocator loses to fragments, and what CUDA takes for itself, has not been measured.
"""

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache

import torch

from prefopt.engine.head import CHUNK_LOGITS
from prefopt.engine.offload import UNDER_WAY
from prefopt.machine import ENVIRONMENT
from prefopt.methods.method import Method
from prefopt.models.load import Precision, choose_precision, locate
from prefopt.models.settings import ModelKind, ModelSettings
from prefopt.training.assemble import as_reference, reference_settings
from prefopt.training.memory.heap import has_holes
from prefopt.training.memory.skeleton import Skeleton, read_skeleton
from prefopt.training.memory.trace import Load, Step, forget_steps, trace_step
from prefopt.training.optimizers.kinds import KINDS
from prefopt.training.settings import RunSettings

LIBRARIES = 90_000_000
"""What torch loads and keeps on its first forward and backward pass on a CPU: kernels, thread pools, caches of shapes."""

KERNEL = 800_000
"""Bytes of a kernel that oneDNN wrote for one shape of a bf16 product. It keeps as many as `prefopt.machine` says; torch keeps the same."""

USUAL_HOLES = 0.4
"""Holes in the heap as a share of all activations that are computed, where the step cannot be traced."""

USUAL_LENGTHS = (160, 160, 160)
"""Tokens of an example's prompt and completions, where nothing is known of them."""


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

    def lines(self, besides: str = "", num_bytes: int = 0) -> list[str]:
        """The parts for people, one per line, and their sum.

        Args:
            besides: what else is to be counted.
            num_bytes: how much that is.
        """
        parts = [(part.name, part.num_bytes) for part in self.parts] + [(besides, num_bytes)]
        rows = [(name, size(count)) for name, count in parts if count] + [("in all", size(self.total + num_bytes))]
        width = max(len(name) for name, _ in rows)
        return [f"{name:<{width}}  {number:>9}" for name, number in rows]


def estimate_memory(
    method: Method,
    settings: RunSettings,
    *,
    positions: int,
    device: torch.device,
    num_processes: int = 1,
    exact: bool = True,
    tree: Sequence[int] | None = None,
    accumulates: bool = True,
) -> MemoryEstimate:
    """What one process of the run takes, beside Python and its libraries.

    Args:
        method: whether it has a reference, and how many completions an example has.
        settings: of the run; where gradient checkpointing is left to the run, no layer recomputes.
        positions: of the largest micro-batch.
        device: that it computes on.
        num_processes: that share the run.
        exact: run the step without memory; else a rule of thumb has to do, in a tenth of the time.
        tree: tokens of an example's prompt and of each of its completions, on average; None: not known.
        accumulates: a step has several micro-batches.

    Raises:
        Exception: whatever reading the model's config raises.
    """
    kind = method.needs.model
    skeleton = _skeleton(settings, device, kind)
    adapter = trains_adapter(settings)
    precision = precision_of(settings, device)
    optimizer = KINDS[settings.optim]
    trained = precision.trained.itemsize * skeleton.num_trained
    share = num_processes if settings.parallel == "fsdp" else 1
    reference = _reference_bytes(method, settings, device, skeleton)
    width = "4 bits" if settings.load_in_4bit else "float32" if precision.weights == torch.float32 else "bf16"
    step = _rule_of_thumb(skeleton, positions, device, adapter=adapter)
    if exact:
        with suppress(Exception):  # experts that are chosen by value, kernels that need real numbers: the rule has to do
            lengths = tuple(tree) if tree is not None else USUAL_LENGTHS[: 1 + _num_completions(method)]
            step = _traced(settings, device, positions, lengths, accumulates, kind)
    parts = [
        Part(f"frozen weights ({width})", skeleton.frozen_bytes // share if adapter else 0, certain=True),
        Part("trained weights", trained // share, certain=True),
        Part("gradients", trained // share, certain=True),
        Part(optimizer.state_name, int(optimizer.state_bytes * skeleton.num_trained) // share, certain=True),
        Part("the reference model", reference // share, certain=True),
        Part(f"activations of {positions:,} positions", max(0, int(step.peak - step.gradients)), certain=False),
        Part("one layer written out", precision.weights.itemsize * skeleton.largest_packed, certain=False),
    ]
    if share > 1:  # the layer that runs and the one that is fetched meanwhile, and what is outside of the layers
        layers = (skeleton.frozen_bytes + trained - skeleton.outside_bytes) // skeleton.num_layers
        parts.append(Part("gathered weights", skeleton.outside_bytes + 2 * layers, certain=False))
    if device.type == "cpu":
        parts.append(Part("kernels and caches", LIBRARIES + (_written_kernels() if precision.autocast is not None else 0), certain=False))
        parts.append(Part("holes in the heap", int(step.holes), certain=False))
    # A process that is to keep a part of the weights reads all of them first, into the machine's memory.
    loading = skeleton.frozen_bytes + trained if share > 1 and device.type == "cpu" else 0
    return MemoryEstimate(tuple(parts), loading)


def _written_kernels() -> int:
    """Bytes of the kernels that are kept of a run in bf16."""
    kept = (os.environ.get(name) or default for name, default in ENVIRONMENT.items() if name.endswith("CACHE_CAPACITY"))
    return KERNEL * max((int(number) for number in kept if number.isdecimal()), default=0)


def forget() -> None:
    """What is known of models: another one may lie in the same folder by now."""
    _known_skeleton.cache_clear()
    forget_steps()


def num_layers(method: Method, settings: RunSettings, device: torch.device) -> int:
    """Layers of the model that the method would train."""
    return _skeleton(settings, device, method.needs.model).num_layers


def layers_recomputing(settings: ModelSettings) -> int | None:
    """How many layers recompute; None: all. None of them where that is left to the run."""
    given = settings.gradient_checkpointing
    return given if isinstance(given, int) else None if given == "on" else 0


def trains_adapter(settings: ModelSettings) -> bool:
    """Whether the run trains an adapter, and not all weights."""
    return bool(settings.lora_rank or settings.adapter or locate(settings.model)[1])


def precision_of(settings: RunSettings, device: torch.device) -> Precision:
    """The arithmetic of a run, as its settings, its optimizer and the hardware have it."""
    return choose_precision(settings.precision, device, adapter=trains_adapter(settings), trained=KINDS[settings.optim].trained)


def _num_completions(method: Method) -> int:
    return {"pair": 2, "ranked": 4}.get(method.needs.completions, 1)


def _model_settings(settings: RunSettings) -> ModelSettings:
    return ModelSettings.model_validate({name: getattr(settings, name) for name in ModelSettings.model_fields})


def _skeleton(settings: RunSettings, device: torch.device, kind: ModelKind) -> Skeleton:
    return _known_skeleton(_model_settings(settings).model_dump_json(), precision_of(settings, device), kind)


@cache  # a refusal looks at the same model several times
def _known_skeleton(settings: str, precision: Precision, kind: ModelKind) -> Skeleton:
    return read_skeleton(ModelSettings.model_validate_json(settings), precision, kind)


def _traced(settings: RunSettings, device: torch.device, positions: int, tree: tuple[int, ...], accumulates: bool, kind: ModelKind) -> Step:
    # What a step keeps is the same for a frozen base however it is held.
    own = _model_settings(settings).model_copy(update={"gradient_checkpointing": "off", "load_in_4bit": False})
    load = Load(positions, tree, accumulates, layers_recomputing(settings), device.type, in_heap=device.type == "cpu" and has_holes())

    precision = precision_of(settings, device)
    skeleton = _skeleton(settings, device, kind)
    step = trace_step(own, precision, load, depth=skeleton.num_layers, kind=kind)
    if not settings.offload_activations:
        return step
    # One layer's activations, as where all recompute, without what they recompute from; and what is on its way.
    one = trace_step(own, precision, replace(load, recomputing=None), depth=skeleton.num_layers, kind=kind)
    inputs = 4 * skeleton.hidden * positions * skeleton.num_layers
    return replace(step, peak=min(step.peak, one.peak - inputs + UNDER_WAY))


def _reference_bytes(method: Method, settings: RunSettings, device: torch.device, skeleton: Skeleton) -> int:
    """What the reference takes while the run trains. Data that brings its values needs none; that is not known yet."""
    reference = reference_settings(settings)
    if not method.needs.reference or reference.reference_cache:
        return 0
    if reference.reference is not None:
        found = _skeleton(as_reference(settings, reference.reference), device, method.needs.model)
        return found.frozen_bytes + precision_of(settings, device).weights.itemsize * found.num_trained
    if settings.lora_rank and reference.sync_reference_every_steps is None:  # the policy with its new adapter switched off
        return 0
    trained = precision_of(settings, device).trained.itemsize * skeleton.num_trained
    return trained + (0 if trains_adapter(settings) else skeleton.frozen_bytes)


def _rule_of_thumb(skeleton: Skeleton, positions: int, device: torch.device, *, adapter: bool) -> Step:
    """What is kept, and what comes and goes when the backward pass begins: in the head, or in the last feed-forward layer."""
    logits = min(CHUNK_LOGITS.get(device.type, CHUNK_LOGITS["cuda"]), positions * skeleton.vocabulary)
    head = 3 * 4 * logits + (0 if adapter else 4 * skeleton.vocabulary * skeleton.hidden)
    kept = skeleton.kept.of(positions) + max(head, 4 * 4 * positions * skeleton.intermediate)
    from_heap = device.type == "cpu" and has_holes()
    return Step(kept, 0.0, USUAL_HOLES * skeleton.computed.of(positions) if from_heap else 0.0)


def size(num_bytes: float) -> str:
    """Bytes for people, in units of 1000 as the run's metrics have them: 1.2 GB."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.0f} MB"
