"""A model without its weights: how much of it is trained, and what a forward pass keeps for the backward pass.

The model is built from its config alone, of tensors that have a shape and a type and no memory behind them, and run on a
small batch of such tensors. What autograd keeps is counted on the way. So it is known for every architecture and adapter,
without a formula for each of them. It is the same for every layer, or nearly, so a deep model is run twice with few layers.

Shapes: T positions of the batch.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from prefopt.engine.batch import Sharing, TreeBatch, pack
from prefopt.engine.head import HeadShape
from prefopt.models.load import Precision, checkpoint_activations, locate, new_adapter
from prefopt.models.policy import EnginePath, Policy, hold_trained, no_dropout, plain_head_of, transformers_logging_at
from prefopt.models.quantise import kept_in_4bit, packed_bytes, to_be_packed
from prefopt.models.settings import ModelSettings
from prefopt.trees import Completion, PromptTree, token_ids

NUM_BRANCH = 127
"""Tokens of a prompt and of each completion in the batch. A prime: what is kept of positions comes in multiples of it, and what
is kept of weights (copies in bf16) does not, because no model is that wide."""

NUM_TREES = 2

FEW, MANY = 4, 8
"""Layers that are run of a deep model. Layers of several kinds repeat after two or four in most architectures."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What autograd keeps of a forward pass beside the weights, in bytes.

    Attributes:
        fixed: whatever the batch: copies of trained weights in bf16.
        per_position: for each position of the batch.
    """

    fixed: float
    per_position: float

    def of(self, positions: int) -> float:
        """Bytes for that many positions."""
        return self.fixed + self.per_position * positions

    def times(self, number: float) -> "Kept":
        """That many times as much."""
        return Kept(self.fixed * number, self.per_position * number)

    def plus(self, other: "Kept") -> "Kept":
        """Both."""
        return Kept(self.fixed + other.fixed, self.per_position + other.per_position)


@dataclass(frozen=True, slots=True)
class Skeleton:
    """What a config and the settings say of a model.

    Attributes:
        frozen_bytes: weights that are not trained, as they are held.
        largest_packed: weights of the largest layer that is held in four bits; 0: none is.
        num_trained: weights that are.
        outside_bytes: all weights that belong to no layer: embeddings, head.
        num_layers, hidden, vocabulary: its sizes.
        intermediate: width of the feed-forward layers; of experts, that of all which one position uses.
        kept: of a forward pass, as the settings have it.
        computed: what would be kept without gradient checkpointing.
    """

    frozen_bytes: int
    largest_packed: int
    num_trained: int
    outside_bytes: int
    num_layers: int
    hidden: int
    vocabulary: int
    intermediate: int
    kept: Kept
    computed: Kept


def read_skeleton(settings: ModelSettings, precision: Precision, *, num_completions: int, exact: bool = True) -> Skeleton:
    """Build the model of the settings without its weights, and count.

    Args:
        settings: the model, its adapter, how completions share their prompt, gradient checkpointing.
        precision: of the run.
        num_completions: branches of an example: 2 for pairs.
        exact: run it; else what it keeps is told by a rule of thumb, in a tenth of the time.

    Raises:
        Exception: whatever reading the config of a model and adding an adapter raise.
    """
    with torch.device("meta"), torch.random.fork_rng(devices=[]), transformers_logging_at("ERROR"):
        model, packed = _build(settings, precision)
    text = model.config.get_text_config()
    parameters = list(model.parameters())
    in_layers = {id(parameter) for stack in _stacks(model) for parameter in stack.parameters()}
    num_trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    counts = {
        "frozen_bytes": sum(
            packed_bytes(tensor.numel()) if id(tensor) in packed else tensor.nbytes
            for tensor in (*parameters, *model.buffers())
            if not tensor.requires_grad
        ),
        "largest_packed": max((tensor.numel() for tensor in parameters if id(tensor) in packed), default=0),
        "outside_bytes": sum(parameter.nbytes for parameter in parameters if id(parameter) not in in_layers),
    }
    kept, computed = _rule_of_thumb(text, num_trained, settings, precision)
    if exact:
        with suppress(Exception):  # experts that are chosen by value, kernels that need real tensors: the rule has to do
            kept, computed = _count_kept(model, settings, precision.autocast, num_completions)
    return Skeleton(
        **counts,
        num_trained=num_trained,
        num_layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        vocabulary=text.vocab_size,
        intermediate=_intermediate(text),
        kept=kept,
        computed=computed,
    )


def _intermediate(text: Any) -> int:
    experts = getattr(text, "num_experts_per_tok", None)
    width = getattr(text, "moe_intermediate_size", None) if experts else None
    width = width or getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * text.hidden_size
    return int(width) * (experts or 1)


def _rule_of_thumb(text: Any, num_trained: int, settings: ModelSettings, precision: Precision) -> tuple[Kept, Kept]:
    """What a layer keeps in most architectures: about 16 numbers per hidden unit, and 4 per unit of the feed-forward layer."""
    width = 4 if precision.autocast is None else 3  # some of the numbers are in bf16, some in float32
    copies = 0.0 if precision.autocast is None else 2.0 * num_trained / text.num_hidden_layers
    layer = Kept(copies, width * (16 * text.hidden_size + 4 * _intermediate(text)))
    computed = layer.times(text.num_hidden_layers)
    if not settings.gradient_checkpointing:
        return computed, computed
    return Kept(layer.fixed, layer.per_position + 4 * text.hidden_size * text.num_hidden_layers), computed


def _build(settings: ModelSettings, precision: Precision) -> tuple[PreTrainedModel, set[int]]:
    """As `load_model` puts it together, without reading a weight; and the parameters, by `id`, that would be packed into four bits."""
    source, adapter_folder = locate(settings.model)
    adapter_folder = settings.adapter or adapter_folder
    config = AutoConfig.from_pretrained(source, trust_remote_code=settings.trust_remote_code)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=precision.weights, trust_remote_code=settings.trust_remote_code)
    packed = to_be_packed(model) if settings.load_in_4bit or kept_in_4bit(config) else []
    for weight in packed:
        weight.requires_grad_(False)
    if adapter_folder:
        adapter_config = PeftConfig.from_pretrained(adapter_folder)
        adapter_config.inference_mode = False
        get_peft_model(model, adapter_config)
    elif settings.lora_rank:
        new_adapter(model, settings, seed=0)
    hold_trained(model, precision.trained)
    no_dropout(model)
    model.train()
    return model, {id(weight) for weight in packed}


def _count_kept(model: PreTrainedModel, settings: ModelSettings, autocast: torch.dtype | None, num_completions: int) -> tuple[Kept, Kept]:
    """What the forward pass keeps, and what it would keep without checkpointing.

    With checkpointing that is the inputs of the layers, and what one layer keeps when it is computed again.
    """
    sharing: Sharing = "plain" if settings.sharing == "plain" else "flat"
    depth = model.config.get_text_config().num_hidden_layers
    few, many = min(FEW, depth // 2), min(MANY, depth)
    with _without_memory():
        _pretend_to_be_on_a_cpu(model)
        policy = Policy(model, EnginePath(sharing, HeadShape() if plain_head_of(model) is not None else None))
        ids = token_ids([0] * NUM_BRANCH)
        batch = pack([PromptTree(ids, (Completion(ids),) * num_completions)] * NUM_TREES, sharing=sharing)
        with _only_layers(model, many):
            computed = _count(policy, batch, autocast)
        with _only_layers(model, few):
            layer = computed.plus(_count(policy, batch, autocast).times(-1)).times(1 / (many - few))
        computed = computed.plus(layer.times(depth - many))
        if not settings.gradient_checkpointing:
            return computed, computed
        checkpoint_activations(model)
        with _only_layers(model, many):
            inputs = _count(policy, batch, autocast).times(depth / many)
    return layer.plus(inputs), computed


@contextmanager
def _without_memory() -> Iterator[None]:
    """Tensors made in here have no memory. What torch logs of operations that do not know such tensors is for its authors."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        logger.setLevel(before)


def _pretend_to_be_on_a_cpu(model: PreTrainedModel) -> None:
    """Autocast does nothing for the meta device: its tensors make room for others, as empty, that claim to lie on a CPU."""
    known: dict[int, nn.Parameter] = {}  # a weight that has two names keeps both
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in known:
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
                    known[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                module._parameters[name] = known[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")


def _stacks(model: PreTrainedModel) -> list[nn.ModuleList]:
    """The lists of layers."""
    depth = model.config.get_text_config().num_hidden_layers
    return [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == depth]


@contextmanager
def _only_layers(model: PreTrainedModel, num: int) -> Iterator[None]:
    """The model with its first layers only."""
    stacks = _stacks(model)
    before = [stack._modules for stack in stacks]
    for stack in stacks:
        stack._modules = dict(islice(stack._modules.items(), num))
    try:
        yield
    finally:
        for stack, modules in zip(stacks, before, strict=True):
            stack._modules = modules


def _count(policy: Policy, batch: TreeBatch, autocast: torch.dtype | None) -> Kept:
    """Run it. A tensor that is kept by two operations, and a weight itself, take no more memory."""
    known = {tensor.untyped_storage()._cdata for tensor in policy.parameters()}
    kept: list[Tensor] = []  # held, so that no new storage takes the place of one that is gone

    def note(tensor: Tensor) -> Tensor:
        if (storage := tensor.untyped_storage())._cdata not in known:
            known.add(storage._cdata)
            kept.append(tensor)
        return tensor

    noting = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with noting, torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        result = policy(batch)
    assert result.values_N.requires_grad, "the forward pass runs with gradients"
    of_weights = sum(tensor.untyped_storage().nbytes() for tensor in kept if tensor.numel() % NUM_BRANCH)
    return Kept(of_weights, (sum(tensor.untyped_storage().nbytes() for tensor in kept) - of_weights) / batch.num_tokens)
