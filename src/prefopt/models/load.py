"""A model folder or hub name -> model, tokenizer and adapter, ready to train.

Weights are read from safetensors only, and no code that comes with a model runs unless asked for by name.
"""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from prefopt.errors import ModelError
from prefopt.models.policy import hold_trained, no_dropout, on_device, score_head_of, transformers_logging_at
from prefopt.models.quantise import four_bit_arguments, in_4bit, one_arithmetic, refuse_copies, refuse_full
from prefopt.models.read import one_line, read_model, refuse_other_adapter, wants_code
from prefopt.models.settings import ModelKind, ModelSettings

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

TASKS: dict[ModelKind, str] = {"language": "CAUSAL_LM", "reward": "SEQ_CLS"}
"""What peft calls an adapter of such a model."""

RSLORA_ALPHA = 16
"""Over the root of the rank: at rank 64 the factor 2, which a plain adapter has at every rank."""


@dataclass(frozen=True, slots=True)
class Precision:
    """Arithmetic of a run.

    Attributes:
        autocast: dtype of matrix products; None: float32 throughout.
        weights: dtype in which frozen weights are held.
        trained: the same of trained ones. float32, for at a learning rate of 5e-7 an update is smaller than the gap between two bf16
            numbers, and would be lost; bf16 only under an optimizer that keeps what rounding takes.
    """

    autocast: torch.dtype | None
    weights: torch.dtype
    trained: torch.dtype = torch.float32

    def __str__(self) -> str:
        if self.autocast is None:
            return "float32"
        return "bf16, trained weights in " + ("float32" if self.trained == torch.float32 else "bf16 with compensated sums")


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """What a run trains.

    Attributes:
        model: the causal LM, or the sequence-classification model that is a reward model; adapter layers are put into it.
        tokenizer: its tokenizer.
        adapter: the peft wrapper of the same model; None: all weights are trained.
        adapter_is_new: the adapter starts as the identity, so that switching it off gives the model before training.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    adapter: PeftModel | None
    adapter_is_new: bool

    @property
    def kind(self) -> ModelKind:
        """What it is."""
        return "language" if score_head_of(self.model) is None else "reward"


def choose_precision(wanted: str, device: torch.device, *, adapter: bool, trained: torch.dtype = torch.float32) -> Precision:
    """bf16 where the hardware has bf16 matrix units, or as asked.

    Args:
        wanted: `auto`, `bf16` or `float32`.
        device: of the run.
        adapter: weights are frozen, but for an adapter's.
        trained: in which the optimizer wants the trained weights; where that is bf16, the run is.
    """
    if trained == torch.bfloat16:
        return Precision(trained, trained, trained)
    if wanted == "auto":
        wanted = "bf16" if _has_bf16(device) else "float32"
    if wanted == "float32":
        return Precision(None, torch.float32)
    return Precision(torch.bfloat16, torch.bfloat16 if adapter else torch.float32)


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def load_tokenizer(settings: ModelSettings) -> PreTrainedTokenizerBase:
    """The tokenizer of the model.

    Raises:
        ModelError: the model or its tokenizer cannot be found or read.
    """
    source, adapter = locate(settings.model)
    if settings.trust_remote_code:
        warnings.warn(f"trust_remote_code is on: Python code from {source} runs on this machine", stacklevel=2)
    for place in filter(None, (adapter, source)):  # an adapter's own tokenizer has the tokens that were added for it
        try:
            with transformers_logging_at("ERROR"):
                tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(place, trust_remote_code=settings.trust_remote_code)
            return tokenizer
        except Exception as error:  # as in read_model
            problem = error
    if is_hub_name(source):
        raise ModelError(
            f"there is no folder {source} here, and the hub gave no model of that name: {one_line(problem)}. Check the spelling."
        )
    raise ModelError(
        f"no usable tokenizer in {source}: {one_line(problem)}. A model folder needs tokenizer.json and tokenizer_config.json."
        + wants_code(problem)
    )


def load_model(
    settings: ModelSettings,
    *,
    precision: Precision,
    device: torch.device,
    seed: int,
    frozen: bool = False,
    kind: ModelKind = "language",
) -> LoadedModel:
    """The model, with a new or an existing adapter where asked for, in training mode, without dropout.

    Args:
        settings: which, and how it is held.
        precision: of the run.
        device: where to.
        seed: of a new adapter, and of a new score layer.
        frozen: none of it will be trained, so that all of it may be in four bits.
        kind: what it is to be; a reward model may be made of a language model's folder.

    Raises:
        ModelError: something cannot be found, read or put together; says what, and what to do.
    """
    source, adapter_folder = locate(settings.model)
    if adapter_folder and settings.adapter:
        raise ModelError(f"{settings.model} is an adapter, and so is {settings.adapter}: give the base model and one of the two")
    adapter_folder = settings.adapter or adapter_folder
    if adapter_folder and settings.lora_rank:
        raise ModelError(f"{settings.model} is an adapter already: leave lora_rank out to go on from it, or give its base model")
    has_adapter = bool(adapter_folder or settings.lora_rank)
    if settings.load_in_4bit and not (has_adapter or frozen):
        refuse_full(settings.model)
    tokenizer = load_tokenizer(settings)
    packing = four_bit_arguments(precision.autocast or torch.float32, device) if settings.load_in_4bit else None
    model = read_model(
        source,
        dtype=precision.weights,
        trust_remote_code=settings.trust_remote_code,
        packing=packing,
        kind=kind,
        seed=seed,
        may_begin=not frozen or adapter_folder is not None,  # a score layer that nothing trains or replaces says nothing
    )
    model = on_device(model, device)
    if in_4bit(model):  # its folder may hold it so, whatever the settings say
        one_arithmetic(model)
        if not (has_adapter or frozen):
            refuse_full(f"{settings.model}, which is kept")
    embeddings = model.get_input_embeddings().weight
    assert isinstance(embeddings, torch.Tensor)
    if len(tokenizer) > len(embeddings):
        raise ModelError(
            f"the tokenizer of {source} has {len(tokenizer)} tokens and the model's embeddings {len(embeddings)}: "
            "they do not belong together. Resize the embeddings and save the model before training."
        )
    adapter: PeftModel | None = None
    if adapter_folder:
        adapter = _existing_adapter(model, adapter_folder, kind)
    elif settings.lora_rank:
        adapter = new_adapter(model, settings, seed, kind)
    hold_trained(model, precision.trained)  # peft leaves modules_to_save in the precision of the base
    no_dropout(model)
    if settings.gradient_checkpointing not in ("off", "auto"):  # for auto it is known once the examples are
        checkpoint_activations(model, None if settings.gradient_checkpointing == "on" else int(settings.gradient_checkpointing))
    model.train()
    return LoadedModel(model, tokenizer, adapter, adapter_is_new=adapter is not None and not adapter_folder)


def locate(name: str) -> tuple[str, str | None]:
    """Where the weights are, and where the adapter is, if the name is that of an adapter or of a run.

    Raises:
        ModelError: a path that does not exist, or a folder that holds no model.
    """
    path = _folder(name)
    if path is None:
        return name, None
    if (path / "config.json").is_file():
        if (path / ADAPTER_CONFIG).is_file():
            raise ModelError(
                f"{path} holds both a whole model (config.json) and an adapter ({ADAPTER_CONFIG}), and one of them would be passed over. "
                "Put them into folders of their own, and give the model as model and the adapter as adapter."
            )
        return str(path), None
    if not (path / ADAPTER_CONFIG).is_file():
        raise ModelError(f"{path} holds no model: there is no config.json in it. Give the folder that the model was saved to.")
    base = _base_of(path)
    if not base:
        raise ModelError(f"{path} is an adapter and does not name its base model. Give the base as model and this folder as adapter.")
    try:
        source = _folder(base)
    except ModelError as error:
        raise ModelError(
            f"{path} is an adapter of {base}: {error} If the base has moved, give it as model and this folder as adapter."
        ) from None
    if source is not None and not (source / "config.json").is_file():
        raise ModelError(f"{path} is an adapter of {base}, which holds no model. Give a whole model as model and this folder as adapter.")
    return str(source or base), str(path)


def is_hub_name(name: str) -> bool:
    """Whether a model of that name can only be on the hub."""
    return _folder(name) is None


def _folder(name: str) -> Path | None:
    """The folder of that name, of a run the one of its model; None: a name for the hub."""
    try:
        path = Path(name).expanduser()
        if path.is_dir():
            # A run holds its model beside its config.yaml.
            return path / "model" if not (path / "config.json").is_file() and (path / "model").is_dir() else path
        exists = path.exists()
    except (OSError, ValueError, RuntimeError) as error:  # no permission, too long for a name, no such home folder
        raise ModelError(f"{name[:200]} cannot be looked at: {one_line(error)}. Give the folder of a model, or a hub name.") from None
    if exists:
        raise ModelError(f"{path} is a file. Give the folder that holds the model's config.json and *.safetensors.")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"no folder {name}. Give the folder of a model, or a hub name such as org/model.")
    return None


def _base_of(adapter: Path) -> str | None:
    try:
        base: str | None = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
        if base is not None and not isinstance(base, str):
            raise ValueError(f"base_model_name_or_path is {base!r:.80}, and must be text")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ModelError(f"{adapter / ADAPTER_CONFIG} cannot be read: {error}. The folder is damaged.") from None
    return base


def new_adapter(model: PreTrainedModel, settings: ModelSettings, seed: int, kind: ModelKind = "language") -> PeftModel:
    """Put a new LoRA adapter into the model, which starts as the identity. Of a reward model it has the whole score layer too.

    Raises:
        ModelError: the model has no such layers; names those that it has.
    """
    config = LoraConfig(
        task_type=TASKS[kind],
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha or (RSLORA_ALPHA if settings.rslora else 2 * settings.lora_rank),  # type: ignore[arg-type]  # floats do
        use_rslora=settings.rslora,
        use_dora=settings.dora,
        target_modules=settings.target_modules or "all-linear",
        modules_to_save=settings.modules_to_save or None,
    )
    refuse_copies(model, settings.modules_to_save)
    with torch.random.fork_rng(devices=[]), quiet_peft():
        torch.manual_seed(seed % 2**63)
        names = sorted({name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)})
        try:
            # The library is content when one of several names is found.
            for setting in ("target_modules", "modules_to_save"):
                if missing := _not_in(model, getattr(settings, setting)):
                    raise ValueError(f"{setting}: the model has no module {', '.join(missing)}")
            adapter = get_peft_model(model, config)
        except ValueError as error:
            raise ModelError(f"cannot add the adapter: {one_line(error)}. Linear layers of this model: {', '.join(names)}.") from None
        except (RuntimeError, MemoryError) as error:
            raise ModelError(
                f"an adapter of rank {settings.lora_rank} has no room in memory: {one_line(error)}. Lower lora_rank."
            ) from None
    if (base := Path(model.name_or_path or "")).is_dir():  # who loads the adapter will not stand where we stand
        adapter.peft_config[adapter.active_adapter].base_model_name_or_path = str(base.resolve())
    return adapter


def _existing_adapter(model: PreTrainedModel, name: str, kind: ModelKind) -> PeftModel:
    folder = _folder(name) or downloaded_adapter(name)
    if not (folder / ADAPTER_CONFIG).is_file():
        what = "a whole model, not an adapter. Give it as model, without adapter" if (folder / "config.json").is_file() else "no adapter"
        raise ModelError(f"{name} holds {what}.")
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise ModelError(f"{folder} lacks adapter_model.safetensors. Weights are read from safetensors only.")
    refuse_other_adapter(name, kind, found=adapter_kind(folder))
    of_another = f"the adapter {name} was not made for {model.name_or_path or 'this model'}"
    remedy = "Give the model that it was trained on as model."
    try:
        with quiet_peft(), warnings.catch_warnings():
            # A warning is all that peft has for weights that the adapter lacks, and they would start at random.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            adapter = PeftModel.from_pretrained(model, str(folder), is_trainable=True)
            used = get_peft_model_state_dict(adapter, save_embedding_layers=False)
        with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as stored:
            # Of these peft says nothing at all, and half of what the adapter has learned would be passed over.
            unused = sorted(key for key in stored.keys() if "lora_" in key and key not in used)  # noqa: SIM118 (no mapping)
    except Exception as error:  # as in read_model
        if any(sign in str(error) for sign in ("size mismatch", "Target modules")):
            raise ModelError(f"{of_another}: its layers have other shapes or names. {remedy}") from None
        raise ModelError(f"cannot put the adapter {name} into the model: {one_line(error)}") from None
    if unused:
        raise ModelError(f"{of_another}: {len(unused)} of its weights belong to layers that it does not have ({unused[0]}). {remedy}")
    return adapter


def adapter_kind(folder: Path) -> ModelKind:
    """What an adapter makes of its base."""
    try:
        task = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("task_type")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ModelError(f"{folder / ADAPTER_CONFIG} cannot be read: {error}. The folder is damaged.") from None
    return "reward" if task == TASKS["reward"] else "language"


def _not_in(model: PreTrainedModel, given: list[str]) -> list[str]:
    """Those names that are neither the whole name of a module nor the end of one."""
    names = [f".{name}" for name, _ in model.named_modules()]
    return [entry for entry in given if not any(name.endswith(f".{entry}") for name in names)]


def downloaded_adapter(name: str) -> Path:
    """An adapter of the hub, of its weights the safetensors only: left to itself peft takes a pickle where there are none."""
    try:
        return Path(snapshot_download(name, allow_patterns=[ADAPTER_CONFIG, ADAPTER_WEIGHTS]))
    except Exception as error:  # as in read_model
        raise ModelError(
            f"there is no folder {name} here, and the hub gave no adapter of that name: {one_line(error)}. Check the spelling."
        ) from None


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Silences what peft asks of transformers and should not any more; the user cannot change it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".is_gradient_checkpointing. is deprecated", category=FutureWarning)
        yield


def checkpoint_activations(model: PreTrainedModel, num_layers: int | None = None) -> None:
    """Let the model's layers compute their activations again in the backward pass.

    Args:
        model: in place.
        num_layers: how many, the first ones; None: all. The first, because when the backward pass comes to them the activations
            of those after them are gone, and there is room for what is computed again.

    Raises:
        ModelError: it cannot, or has not so many layers.
    """
    how = {"use_reentrant": False}
    layers = layers_that_recompute(model)
    if num_layers is not None:
        if not layers:
            raise ModelError(
                f"gradient_checkpointing: the layers of {type(model).__name__} cannot be recomputed one by one. Use on, or off."
            )
        if num_layers > len(layers):
            raise ModelError(
                f"gradient_checkpointing: {num_layers} layers were asked for, and the model has {len(layers)}. Use on for all."
            )
    try:
        if hasattr(model, "activation_checkpointing_enable"):
            model.activation_checkpointing_enable(activation_checkpointing_kwargs=how)
        else:  # its name before transformers 5.23
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
    except ValueError as error:
        raise ModelError(f"gradient_checkpointing: {one_line(error)}. Leave it off for this model.") from None
    for layer in layers[len(layers) if num_layers is None else num_layers :]:
        layer.gradient_checkpointing = False


def layers_that_recompute(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """The layers of a model that can be told one by one to compute their activations again, in their order."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
