"""A small model of the same architecture, on which is proved in float32 what half precision would hide."""

import copy

import torch
from transformers import PretrainedConfig, PreTrainedModel

from prefopt.models.policy import on_device, set_attention, transformers_logging_at


def twin_of(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """The same architecture in float32 with random weights, a small vocabulary, and only as many layers as show every kind.

    Args:
        model: whose config is taken; it stays as it is.
        device: where to.
    """
    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    kinds = list(getattr(text, "layer_types", None) or [])
    depth = min(text.num_hidden_layers, max(2, *(kinds.index(kind) + 1 for kind in kinds)) if kinds else 2)
    small = {"vocab_size": min(512, text.vocab_size), "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    shallow = {"num_hidden_layers": depth} | ({"layer_types": kinds[:depth]} if "layer_types" in text.to_dict() and kinds else {})
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    try:
        return _random_model(model, config, small | shallow, device)
    except (ValueError, TypeError, IndexError, AttributeError):  # other lists in the config count layers too: keep its depth
        return _random_model(model, config, small | {"num_hidden_layers": len(kinds) or text.num_hidden_layers}, device)


def _random_model(model: PreTrainedModel, config: PretrainedConfig, changes: dict[str, object], device: torch.device) -> PreTrainedModel:
    config = copy.deepcopy(config)
    for name, value in changes.items():
        setattr(config.get_text_config(), name, value)
    # The user's random state is not ours to move.
    with torch.random.fork_rng(devices=[]), transformers_logging_at("ERROR"):
        torch.manual_seed(0)
        twin: PreTrainedModel = type(model)._from_config(config, dtype=torch.float32)
    set_attention(twin, None)
    return on_device(twin, device)
