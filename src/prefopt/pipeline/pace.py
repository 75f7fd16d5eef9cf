"""How long steps of a model will take on this machine: a few of its layers are run, with weights of no meaning, and timed.

    seconds of a micro-batch = outside + layers x one layer + recomputing layers x one layer's forward pass
    seconds of a step        = its micro-batches + what clipping and the optimizer take per trained weight x trained weights

Time in the layers is taken as proportional to their operations, what is outside of them (the head, above all) to the scored tokens.
The layers are those of the model itself with its adapter, in 4 bits where the run holds them so, on examples of the lengths that it
will see, so what this machine makes of these sizes is in the figures: no efficiency is assumed.

Operations of a forward pass over one prompt and its completions: 2WT + 2VHS + 4HAL. W weights in the matrices of all L layers, T tokens
with the prompt counted once, V x H the head on the S tokens of the completions, A pairs of a query and a key that it sees. Training takes
three times that, or twice under an adapter, because no gradient of the frozen weights is needed.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from prefopt.engine.batch import Sharing, TreeBatch, pack
from prefopt.machine import keep_freed_memory
from prefopt.models.load import Precision
from prefopt.models.policy import Policy
from prefopt.models.quantise import has_bitsandbytes, pack_layers
from prefopt.models.settings import ModelKind, ModelSettings
from prefopt.training.memory.skeleton import build, only_layers, replace_tensors, stacks
from prefopt.training.memory.trace import path_of
from prefopt.training.optimizer import clip_gradients, make_optimizer, set_learning_rate
from prefopt.trees import PromptTree

SECONDS = 3.0
"""How long the probe of one way of training may compute, about."""

RATE_SECONDS = 0.3
"""How long the machine's matrix rate is looked at, at least."""

ROUNDS = 3
"""Micro-batches that are timed; the median counts."""

SAMPLE = 2**23
"""Trained weights of which the optimizer's step is timed on a CPU, at least: more than caches hold. In 8 bits each takes 0.14 µs."""

BLOCK = 2**20
"""Numbers that are drawn; a weight is filled with them again and again, which takes less time than drawing all."""


@dataclass(frozen=True, slots=True)
class Work:
    """What operations are counted from.

    Attributes:
        layer_weights: in the matrices of one layer.
        num_layers, hidden, vocabulary: of the model.
        num_trained: weights that are trained.
        adapter: the others are frozen.
        kind: of the model; a reward model's head has one row in the place of the vocabulary's.
    """

    layer_weights: int
    num_layers: int
    hidden: int
    vocabulary: int
    num_trained: int
    adapter: bool
    kind: ModelKind = "language"

    @property
    def times(self) -> int:
        """Forward and backward pass, in forward passes."""
        return 2 if self.adapter else 3

    def layer_flops(self, tree: PromptTree, sharing: Sharing) -> float:
        """Operations of one layer's forward pass over an example."""
        prompt, completions = len(tree.prompt_ids), [len(completion.ids) for completion in tree.completions]
        if sharing == "plain":
            rows = [prompt + length for length in completions]
            tokens, seen = sum(rows), sum(row * (row + 1) / 2 for row in rows)
        else:
            tokens = prompt + sum(completions)
            seen = prompt * (prompt + 1) / 2 + sum(prompt * length + length * (length + 1) / 2 for length in completions)
        return 2.0 * self.layer_weights * tokens + 4.0 * self.hidden * seen

    def head_flops(self, tree: PromptTree) -> float:
        """Operations of the head's forward pass over an example."""
        rows = self.vocabulary if self.kind == "language" else 1
        return 2.0 * rows * self.hidden * sum(completion.num_scored for completion in tree.completions)


@dataclass(frozen=True, slots=True)
class Pace:
    """What was found, in seconds.

    Attributes:
        sizes: of the model.
        layer, outside: forward and backward pass per operation of a layer's forward pass, and per operation of the head's.
        layer_forward, outside_forward: the forward pass without gradients.
        update: clipping and the optimizer, per trained weight.
        sharing: how completions share their prompt.
        is_measured: on this machine; else from a rate that was given.
    """

    sizes: Work
    layer: float
    outside: float
    layer_forward: float
    outside_forward: float
    update: float
    sharing: Sharing
    is_measured: bool = True

    def micro_batch(self, trees: Sequence[PromptTree], *, recomputing: int = 0) -> float:
        """Forward and backward pass."""
        layer = sum(self.sizes.layer_flops(tree, self.sharing) for tree in trees)
        head = sum(map(self.sizes.head_flops, trees))
        return layer * (self.sizes.num_layers * self.layer + recomputing * self.layer_forward) + head * self.outside

    def forward(self, trees: Sequence[PromptTree]) -> float:
        """A forward pass without gradients, as for the reference."""
        layer = sum(self.sizes.layer_flops(tree, self.sharing) for tree in trees)
        return layer * self.sizes.num_layers * self.layer_forward + sum(map(self.sizes.head_flops, trees)) * self.outside_forward

    def optimizer(self) -> float:
        """Clipping and a step of the optimizer."""
        return self.update * self.sizes.num_trained


def work_of(settings: ModelSettings, precision: Precision, *, adapter: bool, kind: ModelKind = "language") -> Work:
    """Read off the model's config."""
    model, _ = build(settings, precision, kind)
    text = model.config.get_text_config()
    in_layers = [parameter for layers in stacks(model) for parameter in layers.parameters() if parameter.ndim >= 2]
    return Work(
        sum(parameter.numel() for parameter in in_layers) // text.num_hidden_layers,
        text.num_hidden_layers,
        text.hidden_size,
        text.vocab_size,
        sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        adapter,
        kind,
    )


def assumed_pace(sizes: Work, rate: float, sharing: Sharing) -> Pace:
    """The pace of a device that computes so many operations per second, whatever they are.

    Args:
        sizes: of the model.
        rate: operations per second.
        sharing: how completions share their prompt.
    """
    return Pace(sizes, sizes.times / rate, sizes.times / rate, 1 / rate, 1 / rate, 0.0, sharing, is_measured=False)


def matrix_rate(sizes: Work, positions: int, dtype: torch.dtype, device: torch.device) -> float:
    """The machine's rate at products of these sizes, in operations per second."""
    width = max(1, round(sizes.layer_weights / sizes.hidden / 8)) * 8
    given = torch.randn(positions, sizes.hidden, dtype=dtype, device=device)
    weight = torch.randn(width, sizes.hidden, dtype=dtype, device=device)
    return 2.0 * positions * sizes.hidden * width / _timed(lambda: torch.nn.functional.linear(given, weight), device, RATE_SECONDS)


def measure_pace(
    settings: ModelSettings,
    precision: Precision,
    sizes: Work,
    trees: Sequence[PromptTree],
    *,
    sharing: Sharing,
    device: torch.device,
    rate: float,
    optim: str = "adamw",
) -> Pace:
    """Run a few of the model's layers and time them.

    Args:
        settings: the model and its adapter; one in 4 bits is timed so where bitsandbytes is installed, else whole.
        precision: of the run.
        sizes: of the model.
        trees: a micro-batch, or several, one after the other.
        sharing: how completions share their prompt.
        device: where.
        rate: of the machine's matrix products, by which the probe is kept short.
        optim: name of the optimizer's kind.

    Raises:
        Exception: the model cannot be run so.
    """
    if device.type == "cpu":
        keep_freed_memory()  # as in training
    per_layer = sizes.times * sum(sizes.layer_flops(tree, sharing) for tree in trees) * (ROUNDS + 1) / (0.4 * rate)
    many = max(3, min(sizes.num_layers, int(SECONDS / per_layer))) if sizes.num_layers > 3 else sizes.num_layers
    few = 1 if many < sizes.num_layers else 0
    found = {}
    for count in (few, many) if few else (many, max(1, many // 2)):
        found[count] = _time_layers(settings, precision, sizes.kind, trees, count, sharing, device, optim if count == many else None)
    ordered = sorted(found.items())
    (low, at_low), (high, at_high) = ordered[0], ordered[-1]  # the same, of a model of one layer
    layer_work = sum(sizes.layer_flops(tree, sharing) for tree in trees)
    head_work = sum(map(sizes.head_flops, trees))

    def split(name: str) -> tuple[float, float]:
        one = max(0.0, (at_high[name] - at_low[name]) / (high - low)) if high > low else at_high[name]
        rest = max(0.0, at_high[name] - high * one)
        return one / layer_work, rest / head_work

    layer, outside = split("train")
    layer_forward, outside_forward = split("forward")
    return Pace(sizes, layer, outside, layer_forward, outside_forward, at_high["update"], sharing)


def _time_layers(
    settings: ModelSettings,
    precision: Precision,
    kind: ModelKind,
    trees: Sequence[PromptTree],
    count: int,
    sharing: Sharing,
    device: torch.device,
    optim: str | None,
) -> dict[str, float]:
    """Seconds of the whole micro-batch with so many layers: `train` and `forward`; and with an optimizer `update`, per trained weight."""
    model, packed = build(settings, precision, kind)
    numbers = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)) * 0.02

    def fill(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)
        flat = numbers.repeat(-(-tensor.numel() // BLOCK))[: tensor.numel()]
        return flat.reshape(tensor.shape).to(dtype=tensor.dtype, device=device)

    with only_layers(model, count):
        in_4bit = [name for name, module in model.named_modules() if id(module._parameters.get("weight")) in packed]
        replace_tensors(model, fill)
        if in_4bit and has_bitsandbytes():
            pack_layers(model, in_4bit, precision.autocast or torch.float32)
        policy = Policy(model, path_of(model, sharing))
        # No two micro-batches of a run have the same length: each shape is new to the libraries, which prepare themselves for it.
        batches = [pack(trees[place:] or trees, sharing=sharing, device=device) for place in range(ROUNDS + 1)]
        shares = [sum(tree.num_tokens for tree in batch.trees) / sum(tree.num_tokens for tree in trees) for batch in batches]
        times: dict[str, list[float]] = {"train": [], "forward": [], "update": []}
        update = None if optim is None else _Update(policy, optim, device)

        def forward(batch: TreeBatch) -> None:
            with torch.no_grad(), torch.autocast(device.type, dtype=precision.autocast, enabled=precision.autocast is not None):
                policy(batch)

        def train(batch: TreeBatch) -> None:
            with torch.autocast(device.type, dtype=precision.autocast, enabled=precision.autocast is not None):
                logps = policy(batch)
            (logps.values_N if logps.scalar_T is None else logps.scalar_T).sum().backward()

        for batch, share in zip(batches, shares, strict=True):
            times["forward"].append(_timed(partial(forward, batch), device) / share)
            times["train"].append(_timed(partial(train, batch), device) / share)
            if update is None:
                policy.zero_grad(set_to_none=True)
            else:
                times["update"].append(update())
        return {name: sorted(values[1:])[(len(values) - 1) // 2] for name, values in times.items() if values}  # the first one warms up


class _Update:
    """What follows the backward pass: clipping, the optimizer's step. On a CPU the step is that of some of the weights, the smallest
    tensors first, because one in 8 bits could take minutes for all."""

    def __init__(self, policy: Policy, optim: str, device: torch.device) -> None:
        named = [(name, parameter) for name, parameter in policy.named_parameters() if parameter.requires_grad]
        self.trained = sum(parameter.numel() for _, parameter in named)
        some: list[tuple[str, torch.nn.Parameter]] = []
        self.sampled = 0
        for name, parameter in sorted(named, key=lambda pair: pair[1].numel()):
            if device.type == "cpu" and self.sampled >= SAMPLE:
                break
            some.append((name, parameter))
            self.sampled += parameter.numel()
        self.policy, self.device = policy, device
        self.optimizer = make_optimizer(some, weight_decay=0.0, kind=optim)
        set_learning_rate(self.optimizer, 1e-9)

    def __call__(self) -> float:
        """Seconds per trained weight; afterwards there are no gradients."""
        clip = _timed(partial(clip_gradients, self.policy, 1.0), self.device)
        step = _timed(self.optimizer.step, self.device)
        self.policy.zero_grad(set_to_none=True)
        return clip / self.trained + step / self.sampled


def _timed(work: Callable[[], object], device: torch.device, at_least: float = 0.0) -> float:
    """Seconds of one round; of as many as take the time, where one is asked for."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    if at_least:
        work()
    wait()
    began, rounds = time.perf_counter(), 0
    while True:
        work()
        wait()
        rounds += 1
        if (passed := time.perf_counter() - began) >= at_least:
            return passed / rounds
