"""Weights from a folder or the hub: a language model, or a reward model, which is a sequence-classification model of one label.

A reward model begins as a language model without its head: the layers are read, and a new linear layer `score` makes one number of
the last hidden state. Weights are read from safetensors only, and no code that comes with a model runs unless asked for by name.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel
from transformers.utils.peft_utils import find_adapter_config_file

from prefopt.errors import ModelError
from prefopt.models.policy import score_head_of, transformers_logging_at
from prefopt.models.settings import ModelKind

CLASSIFIER = "ForSequenceClassification"
"""How the library calls its classes of reward models, behind the architecture's name."""

READERS: dict[ModelKind, Any] = {"language": AutoModelForCausalLM, "reward": AutoModelForSequenceClassification}
"""What makes a model of the kind, from weights or from its config."""

START = 0.1
"""Standard deviation of the scores that a new score layer gives, about: its weights are drawn with START / √(D + 1). Small, so that the
loss begins near log 2; not 0, so that gradients reach the layers below from the first step. Stiennon et al. 2020, arXiv 2009.01325,
draw with 1 / √(D + 1)."""


def read_model(
    source: str,
    *,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    packing: Mapping[str, Any] | None = None,
    kind: ModelKind = "language",
    seed: int = 0,
    may_begin: bool = True,
) -> PreTrainedModel:
    """A model from a folder or the hub, safetensors only.

    Args:
        source: the folder, or the hub's name.
        dtype: of the weights in memory.
        trust_remote_code: run code that comes with it.
        packing: from `four_bit_arguments`, for a model in four bits.
        kind: `language` for a causal LM. `reward` for a sequence-classification model of one label: as its folder holds it, or made of a
            causal LM's, with a new score layer.
        seed: of a new score layer.
        may_begin: whether a reward model may be made of a causal LM.

    Raises:
        ModelError: it cannot be found or read, weights are missing from it, it is an adapter, it is of the other kind, or it wants to run
            code of the hub.
    """
    config = safe_config(source, trust_remote_code=trust_remote_code)
    is_reward = is_reward_config(config)
    refuse_other_kind(source, kind, is_reward=is_reward, may_begin=may_begin or not config)
    more: dict[str, Any] = dict(packing or {}) | ({"num_labels": 1} if kind == "reward" and not is_reward else {})
    try:
        with transformers_logging_at("ERROR"):
            loaded: tuple[PreTrainedModel, dict[str, Any]] = READERS[kind].from_pretrained(
                source, dtype=dtype, use_safetensors=True, trust_remote_code=trust_remote_code, output_loading_info=True, **more
            )
    except Exception as error:  # the library lets errors of many kinds through; all mean that the folder cannot be read
        if kind == "reward" and (without := without_class(error, config)):
            raise ModelError(without) from None
        raise ModelError(
            f"cannot load a model from {source}: {one_line(error)}. A model folder needs config.json and *.safetensors." + wants_code(error)
        ) from None
    model, report = loaded
    missing = set(report["missing_keys"])
    if kind == "reward":
        check_scores(model, source)
        if not is_reward:
            draw_score_layer(model, seed)
            missing -= {name for name, _ in model.named_parameters() if name.startswith("score.")}
    if missing:
        raise ModelError(
            f"{source} lacks {len(missing)} of the model's weights ({', '.join(sorted(missing)[:3])}, ...), which would start at random. "
            "The folder is damaged or belongs to another architecture."
        )
    return model


NOT_A_SPEAKER = (
    "{} holds a reward model, which scores answers and cannot write any. Score answers with it (prefopt score), or train it further "
    "(prefopt train reward); for anything else give a language model."
)

NOT_A_SCORER = (
    "{0} is an adapter of a language model, and a reward model needs one with a score layer. To train a reward model of it, make one "
    "model of it and its base (prefopt merge {0} --out DIR), and give that as model."
)


def safe_config(source: str, *, trust_remote_code: bool) -> dict[str, Any]:
    """The config of a model; empty where it cannot be read, which whoever loads the model says better.

    Raises:
        ModelError: it is an adapter, or wants to run code of the hub.
    """
    config: dict[str, Any] = {}
    try:
        config = PreTrainedConfig.get_config_dict(source)[0]
        # The library would put an adapter that stands beside the weights into the model without a word, from a pickle too.
        is_adapter = find_adapter_config_file(source) is not None
        kernel = None if trust_remote_code else _hub_kernel(config)
    except Exception:
        is_adapter, kernel = False, None
    if is_adapter:
        raise ModelError(f"{source} holds an adapter. Give the whole model that it belongs to as model, and this as adapter.")
    if kernel is not None:
        raise ModelError(
            f"the config of {source} asks for {kernel}, code of the hub that would run on this machine. "
            "Delete that line of its config.json, or set trust_remote_code if you trust it."
        )
    return config


def context_of(config: PreTrainedConfig) -> int | None:
    """Tokens of the longest text that a model of this config reads; None where it does not say."""
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    return longest if isinstance(longest, int) and longest > 0 else None


def refuse_other_kind(source: str, kind: ModelKind, *, is_reward: bool, may_begin: bool) -> None:
    """Each kind of model is good for something else.

    Raises:
        ModelError: a reward model is to write, or a language model to score.
    """
    if kind == "language" and is_reward:
        raise ModelError(NOT_A_SPEAKER.format(source))
    if kind == "reward" and not (is_reward or may_begin):
        raise ModelError(f"{source} is a language model, and gives no scores. Train a reward model of it: prefopt train reward.")


def refuse_other_adapter(name: str, kind: ModelKind, *, found: ModelKind) -> None:
    """An adapter makes one kind of model of its base.

    Raises:
        ModelError: it makes the other one.
    """
    if found != kind:
        raise ModelError((NOT_A_SPEAKER if found == "reward" else NOT_A_SCORER).format(name))


def is_reward_config(config: Mapping[str, Any]) -> bool:
    """Whether a model's config.json is that of a reward model."""
    named = config.get("architectures")
    return isinstance(named, list) and any(isinstance(name, str) and name.endswith(CLASSIFIER) for name in named)


def without_class(error: Exception, config: Mapping[str, Any]) -> str:
    """The message where the library has no class for reward models of that architecture; empty where that is not what is wrong."""
    if "Unrecognized configuration class" not in str(error):
        return ""
    return (
        f"transformers has no sequence-classification class for {config.get('model_type')} models, so that a reward model of one could be "
        "neither saved nor loaded. Begin with a model of another architecture: llama, mistral, qwen2, qwen3, gemma, gemma2, gemma3_text, "
        "phi3, gpt2, gpt_neox and many more have one."
    )


def check_scores(model: PreTrainedModel, source: str) -> None:
    """Whether the model gives one score by one linear layer over its decoder; that layer is float32 from then on.

    Raises:
        ModelError: it has several labels, or another kind of head.
    """
    head = score_head_of(model)
    if head is None:
        raise ModelError(
            f"{type(model).__name__} has no linear layer `score` over a decoder, as reward models have. Begin with a decoder-only model."
        )
    if model.config.num_labels != 1:
        raise ModelError(
            f"{source} is a classifier of {model.config.num_labels} labels; a reward model gives one number. Give a reward model "
            "(num_labels 1), or the language model to make one of."
        )
    head.float()  # a number that is compared with others must not be rounded to 8 bits


def draw_score_layer(model: PreTrainedModel, seed: int) -> None:
    """A new score layer, the same for the same seed on every machine."""
    head = score_head_of(model)
    assert head is not None, "check_scores found one"
    generator = torch.Generator().manual_seed(seed % 2**63)
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
                continue
            width = START / (parameter.shape[-1] + 1) ** 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float32) * width)


def wants_code(error: Exception) -> str:
    """What to do where the library says that it was not allowed to run the model's own code."""
    if "trust_remote_code" not in str(error):
        return ""
    return " It comes with Python code of its own, which runs only if you set trust_remote_code; look at that code first."


def _hub_kernel(config: object) -> str | None:
    """The repository of the hub that a config names as its attention or experts, where it names one."""
    if not isinstance(config, dict):
        return None
    for name, value in config.items():
        named = [value] if isinstance(value, str) else [*value.values()] if isinstance(value, dict) else []
        if name.endswith("_implementation"):
            if repository := next((entry for entry in named if isinstance(entry, str) and "/" in entry), None):
                return repository
        elif repository := _hub_kernel(value):
            return repository
    return None


def one_line(error: Exception) -> str:
    """What an error says, in one line that is not too long."""
    text = " ".join(str(error).split()).rstrip(".")
    return (text[:297] + "...") if len(text) > 300 else text or type(error).__name__
