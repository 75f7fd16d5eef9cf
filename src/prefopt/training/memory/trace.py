"""What a training step holds at its fullest moment, found by running it on tensors that have no memory.

Forward and backward pass run operation by operation, with every shape and type and without a number; each storage is noted when it
comes and when it goes. So what autograd keeps, what comes and goes inside a layer and gradients that arrive while activations
leave are counted as they are, whatever the architecture. A deep model is run with few layers and with some more, and what a layer
adds is taken times their number.
"""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from prefopt.engine import head
from prefopt.engine.batch import Sharing, TreeBatch, pack
from prefopt.engine.head import HeadShape
from prefopt.models.load import Precision, checkpoint_activations, layers_that_recompute
from prefopt.models.policy import EnginePath, Policy, plain_head_of, score_head_of
from prefopt.models.settings import ModelKind, ModelSettings
from prefopt.training.memory.heap import Event, heap_holes
from prefopt.training.memory.skeleton import build, only_layers, pretend_to_be_on_a_cpu, without_memory
from prefopt.trees import Completion, PromptTree, token_ids

LAYERS = {False: (2, 4), True: (4, 8)}
"""Layers of a deep model that are run: few and some more, of those that recompute and of those that do not. More where holes in the heap
are to be told (True), which do not grow as evenly."""

MOST = 16384
"""Positions that are run; each example is some operations."""

INSIDE = {torch.ops.aten.logsumexp.default: 1.0}
"""Operations that hold that many times their input besides while they run, of which nothing outside is told."""

ABOUT = (176, 96, 24)
"""Bytes of the objects about a storage: its tensor, itself, its shape."""

NODE = (500, 32)
"""Bytes of an operation's node in autograd's graph, and of what belongs to it, about. Such small things come to lie where a tensor was
a moment ago, and the next one of its size no longer fits there."""


class Trace(NamedTuple):
    """What came and went in one micro-batch, beside weights and the optimizer's state.

    Attributes:
        events: in their order; what is there from before comes first.
        peak: bytes at the fullest moment, gradients that are there by then included.
    """

    events: tuple[Event, ...]
    peak: int


class _Noting(TorchDispatchMode):
    """Notes storages as operations make them and as they go, and the small objects about them."""

    def __init__(self, known: Sequence[Tensor], *, in_heap: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch gives it no types
        self.about: tuple[int, ...] = ABOUT if in_heap else ()
        self.node: tuple[int, ...] = NODE if in_heap else ()
        self.events: list[Event] = []
        self.now = self.peak = self.count = 0
        self.there: dict[int, object] = {tensor.untyped_storage()._cdata: None for tensor in known}
        self.nodes: list[list[int]] = []
        self.again: list[list[int]] = []
        self.is_backward = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if not tensors:
            return out
        is_new = sum(self.note(tensor) for tensor in tensors) > 0
        if func in INSIDE:
            extra = int(INSIDE[func] * args[0].untyped_storage().nbytes())
            self._go(self._come(extra), extra)
        if torch.is_grad_enabled():
            if is_new:
                (self.again if self.is_backward else self.nodes).append([self._come(size) for size in self.node])
        elif self.is_backward:
            while self.again:  # of what a layer computed again only the tensors are needed
                self._drop(self.again)
            self._drop(self.nodes)  # the graph goes as the backward pass comes down it
        return out

    def note(self, tensor: Tensor) -> bool:
        """A tensor that is there now; whether its storage is new."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.there:
            return False
        num_bytes = storage.nbytes()
        number, *about = [self._come(size) for size in (num_bytes, *self.about)]

        def gone(_: object) -> None:
            self.there.pop(key, None)
            for own, size in zip((number, *about), (num_bytes, *self.about), strict=True):
                self._go(own, size)

        self.there[key] = weakref.ref(storage, gone)
        return True

    def end(self) -> None:
        """The rest of the graph goes."""
        while self.nodes:
            self._drop(self.nodes)

    def _drop(self, nodes: list[list[int]]) -> None:
        for number, size in zip(nodes.pop() if nodes else (), self.node, strict=False):
            self._go(number, size)

    def _come(self, num_bytes: int) -> int:
        self.count += 1
        self.events.append((self.count, num_bytes))
        self.now += num_bytes
        self.peak = max(self.peak, self.now)
        return self.count

    def _go(self, number: int, num_bytes: int) -> None:
        self.events.append((number, -1))
        self.now -= num_bytes


@dataclass(frozen=True, slots=True)
class Step:
    """What a step holds at its fullest moment, beside weights and the optimizer's state.

    Attributes:
        peak: bytes, gradients that are there by then included.
        gradients: bytes of all gradients.
        holes: what the C library holds besides, by `prefopt.training.memory.heap`; 0 where that was not asked for.
    """

    peak: float
    gradients: float
    holes: float = 0.0

    def scaled(self, factor: float) -> "Step":
        """That many times as much."""
        return Step(self.peak * factor, self.gradients * factor, self.holes * factor)

    def plus(self, other: "Step") -> "Step":
        """Both."""
        return Step(self.peak + other.peak, self.gradients + other.gradients, self.holes + other.holes)


@dataclass(frozen=True, slots=True)
class Load:
    """What a process runs at once.

    Attributes:
        positions: of the largest micro-batch.
        tree: tokens of an example's prompt and of each of its completions.
        accumulates: a step has several micro-batches, so that gradients are there while the later ones run.
        recomputing: layers that compute their activations again; None: all.
        device_type: `cpu` or `cuda`: chunks of the head's logits are larger on a GPU.
        in_heap: also find what the C library's heap holds.
    """

    positions: int
    tree: tuple[int, ...]
    accumulates: bool
    recomputing: int | None
    device_type: str
    in_heap: bool

    def trees(self, sharing: Sharing) -> list[PromptTree]:
        """Examples that fill the micro-batch, the last of them with what is left."""
        prompt, *completions = self.tree
        per_tree = sum(self.tree) if sharing == "flat" else len(completions) * (prompt + max(completions))
        number, rest = divmod(self.positions, per_tree)
        found = [_tree(self.tree)] * number
        share = rest / per_tree
        if share > 0.05 or not found:
            found.append(_tree(tuple(max(2, round(length * share)) for length in self.tree)))
        return found


def _tree(lengths: Sequence[int]) -> PromptTree:
    ids = [token_ids([0] * length) for length in lengths]
    return PromptTree(ids[0], tuple(Completion(own) for own in ids[1:]))


def trace_step(settings: ModelSettings, precision: Precision, load: Load, *, depth: int, kind: ModelKind = "language") -> Step:
    """Run a step of the model of the settings on tensors without memory.

    Args:
        settings: the model, its adapter, how completions share their prompt.
        precision: of the run.
        load: what is run.
        depth: layers of the model.
        kind: of the model.

    Raises:
        Exception: the model cannot be run so: experts that are chosen by value, kernels that need real numbers.
    """
    if load.positions > MOST:  # it grows in proportion
        half, whole = (trace_step(settings, precision, replace(load, positions=size), depth=depth, kind=kind) for size in (MOST // 2, MOST))
        return whole.plus(whole.plus(half.scaled(-1)).scaled((load.positions - MOST) / (MOST - MOST // 2)))
    text = settings.model_dump_json()
    recomputing = depth if load.recomputing is None else min(load.recomputing, depth)
    at = partial(_with_layers, text, precision, kind, replace(load, recomputing=None))
    few, many = LAYERS[load.in_heap]
    few_again, few_kept = min(few, recomputing), min(few, depth - recomputing)
    many_again, many_kept = min(many, recomputing), min(many, depth - recomputing)
    found = base = at(few_again, few_kept)
    if many_kept > few_kept:
        layers = at(few_again, many_kept).plus(base.scaled(-1))
        found = found.plus(layers.scaled((depth - recomputing - few_kept) / (many_kept - few_kept)))
    if many_again > few_again:
        layers = at(many_again, few_kept).plus(base.scaled(-1))
        found = found.plus(layers.scaled((recomputing - few_again) / (many_again - few_again)))
    return found


def forget_steps() -> None:
    """Another model may lie in the same folder by now."""
    _with_layers.cache_clear()


@cache  # looking for the layers that must recompute asks for the same few again
def _with_layers(settings: str, precision: Precision, kind: ModelKind, load: Load, again: int, kept: int) -> Step:
    """A step of a model of few layers, the first of which recompute."""
    own = ModelSettings.model_validate_json(settings)
    model, _ = build(own, precision, kind)
    sharing: Sharing = "plain" if own.sharing == "plain" else "flat"
    with without_memory(), _chunks_of(load.device_type):
        pretend_to_be_on_a_cpu(model)
        policy = Policy(model, path_of(model, sharing))
        if again:
            checkpoint_activations(model, again if layers_that_recompute(model) else None)
        with only_layers(model, again + kept):
            return _step(policy, pack(load.trees(sharing), sharing=sharing), precision.autocast, load)


def path_of(model: PreTrainedModel, sharing: Sharing) -> EnginePath:
    """How the model runs as a rule, where nothing is to be proved."""
    if score_head_of(model) is not None:
        return EnginePath(sharing, None, scores=True)
    return EnginePath(sharing, HeadShape() if plain_head_of(model) is not None else None)


def _step(policy: Policy, batch: TreeBatch, autocast: torch.dtype | None, load: Load) -> Step:
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    weights = [*policy.parameters(), *policy.buffers()]
    if load.accumulates and not load.in_heap:
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        traces = []
    else:
        traces = [_micro_batch(policy, batch, autocast, weights, load.in_heap)]
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    there = sum(gradient.nbytes for gradient in gradients)
    peaks = [trace.peak for trace in traces]
    if load.accumulates:
        traces.append(_micro_batch(policy, batch, autocast, [*weights, *gradients], load.in_heap))
        peaks.append(there + traces[-1].peak)
    for parameter in parameters:
        parameter.grad = None
    return Step(max(peaks), there, heap_holes(traces[0].events) if load.in_heap else 0.0)


def _micro_batch(policy: Policy, batch: TreeBatch, autocast: torch.dtype | None, known: Sequence[Tensor], in_heap: bool) -> Trace:
    with _Noting(known, in_heap=in_heap) as noting:
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            logps = policy(batch)
        given = logps.values_N if logps.scalar_T is None else logps.scalar_T
        assert given.requires_grad, "the forward pass runs with gradients"
        loss = given.sum()
        noting.is_backward = True
        loss.backward()
        del logps, given, loss
        noting.end()
    return Trace(tuple(noting.events), noting.peak)


@contextmanager
def _chunks_of(device_type: str) -> Iterator[None]:
    """The head's logits in chunks as large as on that device."""
    before = head.CHUNK_LOGITS["cpu"]
    head.CHUNK_LOGITS["cpu"] = head.CHUNK_LOGITS.get(device_type, before)
    try:
        yield
    finally:
        head.CHUNK_LOGITS["cpu"] = before
