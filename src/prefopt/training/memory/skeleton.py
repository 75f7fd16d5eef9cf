"""A model without its weights: how much of it is trained, and by a rule of thumb what a forward pass keeps for the backward pass.

The model is built from its config alone, of tensors that have a shape and a type and no memory behind them. So its size is known
for every architecture and adapter, without a formula for each of them. `prefopt.training.memory.trace` runs it.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, PreTrainedModel

from prefopt.models.load import TASKS, Precision, locate, new_adapter, quiet_peft
from prefopt.models.policy import hold_trained, no_dropout, transformers_logging_at
from prefopt.models.quantise import kept_in_4bit, packed_bytes, to_be_packed
from prefopt.models.read import READERS, check_scores, is_reward_config, refuse_other_adapter, refuse_other_kind
from prefopt.models.settings import ModelKind, ModelSettings


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
        kept: of a forward pass by a rule of thumb, as the settings have it.
        computed: what would be kept if no layer recomputed.
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


def read_skeleton(settings: ModelSettings, precision: Precision, kind: ModelKind = "language") -> Skeleton:
    """Build the model of the settings without its weights, and count.

    Args:
        settings: the model, its adapter, gradient checkpointing.
        precision: of the run.
        kind: of the model.

    Raises:
        Exception: whatever reading the config of a model and adding an adapter raise.
    """
    model, packed = build(settings, precision, kind)
    text = model.config.get_text_config()
    parameters = list(model.parameters())
    in_layers = {id(parameter) for stack in stacks(model) for parameter in stack.parameters()}
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
    depth, given = text.num_hidden_layers, settings.gradient_checkpointing
    again = depth if given == "on" else min(int(given), depth) if isinstance(given, int) else 0
    inputs = Kept(0.0, 4 * text.hidden_size * again)
    return layer.times(max(1, depth - again)).plus(inputs), computed


def build(settings: ModelSettings, precision: Precision, kind: ModelKind = "language") -> tuple[PreTrainedModel, set[int]]:
    """As `load_model` puts it together, without reading a weight; and the parameters, by `id`, that would be packed into four bits.

    Raises:
        ModelError: the model, or its adapter, is of the other kind.
        Exception: whatever reading the config of a model and adding an adapter raise.
    """
    source, adapter_folder = locate(settings.model)
    adapter_folder = settings.adapter or adapter_folder
    with torch.device("meta"), torch.random.fork_rng(devices=[]), transformers_logging_at("ERROR"):
        config = AutoConfig.from_pretrained(source, trust_remote_code=settings.trust_remote_code)
        code = settings.trust_remote_code
        refuse_other_kind(source, kind, is_reward=is_reward_config({"architectures": config.architectures}), may_begin=True)
        if kind == "reward":
            config.num_labels = 1
        model: PreTrainedModel = READERS[kind].from_config(config, dtype=precision.weights, trust_remote_code=code)
        if kind == "reward":
            check_scores(model, source)
        packed = to_be_packed(model) if settings.load_in_4bit or kept_in_4bit(config) else []
        for weight in packed:
            weight.requires_grad_(False)
        if adapter_folder:
            adapter_config = PeftConfig.from_pretrained(adapter_folder)
            adapter_config.inference_mode = False
            refuse_other_adapter(adapter_folder, kind, found="reward" if adapter_config.task_type == TASKS["reward"] else "language")
            with quiet_peft():
                get_peft_model(model, adapter_config)
        elif settings.lora_rank:
            new_adapter(model, settings, seed=0, kind=kind)
        hold_trained(model, precision.trained)
    no_dropout(model)
    model.train()
    return model, {id(weight) for weight in packed}


@contextmanager
def without_memory() -> Iterator[None]:
    """Tensors made in here have no memory. What torch logs of operations that do not know such tensors is for its authors."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        logger.setLevel(before)


def pretend_to_be_on_a_cpu(model: PreTrainedModel) -> None:
    """Autocast does nothing for the meta device: its tensors make room for others, as empty, that claim to lie on a CPU."""
    replace_tensors(model, lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu"))


def replace_tensors(model: PreTrainedModel, make: Callable[[Tensor], Tensor]) -> None:
    """Other tensors of the same shapes and types in place of the model's; a weight that has two names keeps both."""
    known: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in known:
                    known[id(parameter)] = nn.Parameter(make(parameter), requires_grad=parameter.requires_grad)
                module._parameters[name] = known[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = make(buffer)


def stacks(model: PreTrainedModel) -> list[nn.ModuleList]:
    """The lists of layers."""
    depth = model.config.get_text_config().num_hidden_layers
    return [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == depth]


@contextmanager
def only_layers(model: PreTrainedModel, num: int) -> Iterator[None]:
    """The model with its first layers only."""
    lists = stacks(model)
    before = [layers._modules for layers in lists]
    for layers in lists:
        layers._modules = dict(islice(layers._modules.items(), num))
    try:
        yield
    finally:
        for layers, modules in zip(lists, before, strict=True):
            layers._modules = modules
