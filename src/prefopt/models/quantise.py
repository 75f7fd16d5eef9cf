"""A frozen base in four bits, under an adapter that is trained (QLoRA, arXiv 2305.14314).

Every linear layer but the head is held in NF4: 4 bits for a weight, in blocks of 64 with a scale each, and the scales in 8 bits in
blocks of 256 (double quantisation). bitsandbytes does it, on a GPU and on a CPU. A product with such a layer rounds nothing further:
its weights are written out in the run's arithmetic, multiplied, and let go.
"""

from collections.abc import Collection, Iterator
from importlib import import_module
from importlib.util import find_spec
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from prefopt.errors import ConfigError, ModelError

FOUR_BITS = "4 bits (NF4, double quantisation)"
"""How it is held, in words; also what tells cached reference values apart."""

BLOCK, SCALES_BLOCK = 64, 256
"""Weights to a scale, and scales to a scale of their own."""

INSTALL = "pip install 'prefopt[bits]'"


def has_bitsandbytes() -> bool:
    """Whether weights can be held in four bits here."""
    return find_spec("bitsandbytes") is not None


def need_bitsandbytes(setting: str) -> None:
    """bitsandbytes must be there.

    Args:
        setting: that asks for it, as it is given.

    Raises:
        ConfigError: it is not; names the command that installs it.
    """
    if not has_bitsandbytes():
        raise ConfigError(f"{setting} needs the library bitsandbytes, which is not installed. Install it: {INSTALL}")


def four_bit_arguments(compute: torch.dtype, device: torch.device) -> dict[str, Any]:
    """What `from_pretrained` is given for a model in four bits.

    Args:
        compute: arithmetic of products.
        device: where the weights are put, each as it is read: at no time is the model there whole in more bits.
    """
    need_bitsandbytes("load_in_4bit")
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
    )
    return {"quantization_config": config, "device_map": {"": device}}


def pack_layers(model: nn.Module, names: Collection[str], compute: torch.dtype) -> None:
    """Hold layers of a model that is there in four bits, as reading it so would have done.

    Args:
        model: changed in place.
        names: of the layers.
        compute: arithmetic of products.

    Raises:
        ConfigError: bitsandbytes is not installed.
    """
    need_bitsandbytes("load_in_4bit")
    library: Any = import_module("bitsandbytes.nn")
    for name in names:
        layer = model.get_submodule(name)
        weight, bias = layer.weight, layer.bias
        assert isinstance(weight, Tensor)
        weight = weight.detach().T.contiguous() if isinstance(layer, Conv1D) else weight.detach()
        with torch.device("meta"):
            own = library.Linear4bit(weight.shape[1], weight.shape[0], bias=False, compute_dtype=compute)
        own.weight = library.Params4bit(weight, requires_grad=False, compress_statistics=True, quant_type="nf4", module=own)
        own.weight = own.weight.to(weight.device)  # which packs it
        own.bias = bias
        model.set_submodule(name, own)
    one_arithmetic(model)


def four_bit_layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The layers that are held in four bits, by name, whether we or their folder asked for it."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and _state_of(module.weight) is not None:
            yield name, module


def in_4bit(model: nn.Module) -> bool:
    """Whether any of the model's layers is."""
    return any(True for _ in four_bit_layers(model))


def one_arithmetic(model: nn.Module) -> None:
    """Let a layer compute the same whether the model trains or is looked at.

    On a CPU with bf16 products bitsandbytes would rearrange the weights when they are first used in evaluation mode, and from then
    on multiply in bf16 whatever was asked for: another function than the one that is trained, and without a gradient.
    """
    for _, layer in four_bit_layers(model):
        layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]  # an attribute of its own


def refuse_full(what: str) -> None:
    """Weights in four bits cannot be trained themselves.

    Raises:
        ModelError: always.
    """
    raise ModelError(
        f"{what} in 4 bits cannot be trained itself: between two of 16 levels there is no room for a step. Give lora_rank too (for example "
        "16), or an adapter to go on from; or train all weights without load_in_4bit."
    )


def refuse_copies(model: nn.Module, modules_to_save: list[str]) -> None:
    """A layer in four bits cannot be trained in full beside the adapter.

    Raises:
        ModelError: some of the modules hold such layers; names them.
    """
    packed = [name for name, _ in four_bit_layers(model)]
    given = [module for module in modules_to_save if any(f".{module}." in f".{name}." for name in packed)]
    if given:
        raise ModelError(
            f"modules_to_save: {', '.join(given)} is held in 4 bits and cannot be trained in full. What can: the head, the embeddings and "
            "the norms. Leave it to the adapter, or leave out load_in_4bit."
        )


def num_weights(tensor: Tensor) -> int:
    """How many weights a parameter stands for: two to a byte where they are packed."""
    state = _state_of(tensor)
    return tensor.numel() if state is None else int(torch.Size(state.shape).numel())


def num_parameters(model: nn.Module) -> int:
    """Weights of a model, however they are held."""
    return sum(map(num_weights, model.parameters()))


def kept_in_4bit(config: PreTrainedConfig) -> bool:
    """Whether a model's folder holds it in four bits already."""
    found = getattr(config, "quantization_config", None)
    return isinstance(found, dict) and bool(found.get("load_in_4bit"))


def to_be_packed(model: PreTrainedModel) -> list[Tensor]:
    """The weights of a model that is not packed yet which would be: those of every linear layer but the head, or a reward model's score."""
    head = model.get_output_embeddings() or getattr(model, "score", None)
    shared = {id(parameter) for parameter in ([] if head is None else head.parameters())}
    layers = (module for module in model.modules() if type(module) is nn.Linear or isinstance(module, Conv1D))
    return [layer.weight for layer in layers if layer is not head and id(layer.weight) not in shared]


def packed_bytes(count: int) -> int:
    """Bytes that so many weights of a layer take: with their scales 4.127 bits each."""
    blocks = ceil(count / BLOCK)
    return ceil(count / 2) + blocks + 4 * ceil(blocks / SCALES_BLOCK)


def quantisation_of(model: PreTrainedModel) -> str:
    """How the model's weights are compressed, in words; empty: not at all."""
    if in_4bit(model):
        config = getattr(model.config, "quantization_config", None)
        kind = getattr(config, "bnb_4bit_quant_type", None), getattr(config, "bnb_4bit_use_double_quant", None)
        return FOUR_BITS if kind == ("nf4", True) else f"4 bits ({kind[0]}{', double quantisation' if kind[1] else ''})"
    return str(getattr(model.config, "quantization_config", "") or "")


def _state_of(tensor: Tensor) -> Any:
    """What bitsandbytes knows of a packed weight; None: it is not packed."""
    return getattr(tensor, "quant_state", None)
