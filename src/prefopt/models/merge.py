"""Base and adapter as one model.

All arithmetic is float32, whatever the files hold: merged in bf16, W + D would be rounded at once, and most of what a
preference method changes is smaller than the gap between two bf16 numbers. What rounding would cost is measured layer by
layer, while the base's weights are still there to compare with.

Peft's own names: a tuner layer wraps a layer of the base and computes W + D; a training wrapper holds a layer that was
trained in full.
"""

import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefopt.engine.batch import pack
from prefopt.errors import ModelError, RunError
from prefopt.models.load import LoadedModel, Precision, adapter_kind, load_model
from prefopt.models.policy import EnginePath, Policy, score_head_of, transformers_logging_at
from prefopt.models.save import mend_generation_config, stop_at
from prefopt.models.settings import ModelSettings
from prefopt.trees import PromptTree

MERGED = "prefopt_merge.json"
"""A file of the merged model's folder: what was merged, how that was checked, and how its prompts are written."""

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "float16": torch.float16}
"""In which weights can be saved, by the names of the settings."""


@dataclass(frozen=True, slots=True)
class ModuleChange:
    """What merging did to one layer, and what saving in the wanted precision does to that.

    Attributes:
        name: of the layer.
        change: ‖D‖, D = merged weights − base weights.
        rounding: ‖round(W + D) − (W + D)‖.
        num_changed: numbers of the layer that merging changed.
        num_vanished: those of them that rounding makes the base's own, rounded, again.
        base_is_rounded: the base's weights are numbers of the wanted precision already.
    """

    name: str
    change: float
    rounding: float
    num_changed: int
    num_vanished: int
    base_is_rounded: bool

    @property
    def lost(self) -> float:
        """How far rounding moves the weights, relative to how far the adapter moved them."""
        return self.rounding / self.change if self.change else 0.0


@dataclass(frozen=True, slots=True)
class Change:
    """The same of all layers together."""

    modules: tuple[ModuleChange, ...]

    @property
    def lost(self) -> float:
        """‖round(W + D) − (W + D)‖ / ‖D‖ over all merged weights; 0 where the adapter changes nothing."""
        change = sum(module.change**2 for module in self.modules)
        return float((sum(module.rounding**2 for module in self.modules) / change) ** 0.5) if change else 0.0

    @property
    def vanished(self) -> float:
        """Share of the changed numbers that come back as the base's own."""
        changed = sum(module.num_changed for module in self.modules)
        return sum(module.num_vanished for module in self.modules) / changed if changed else 0.0

    @property
    def is_nothing(self) -> bool:
        """Whether the adapter changes no weight."""
        return not any(module.num_changed for module in self.modules)

    @property
    def worst(self) -> ModuleChange:
        """The layer that loses most."""
        return max(self.modules, key=lambda module: module.lost)

    @property
    def base_is_rounded(self) -> bool:
        """Whether the base's weights are numbers of the wanted precision already."""
        return all(module.base_is_rounded for module in self.modules)


def load_to_merge(base: str, adapter: str, *, device: torch.device, trust_remote_code: bool = False) -> LoadedModel:
    """Base and adapter in float32, not merged yet.

    Args:
        base: folder or hub name of a whole model.
        adapter: the adapter's folder.
        device: where to.
        trust_remote_code: run code that comes with the base.

    Raises:
        ModelError: one cannot be read, they do not belong together, or the adapter is no change of weights.
    """
    refuse_other_kinds(adapter)
    settings = ModelSettings(model=base, adapter=adapter, trust_remote_code=trust_remote_code)
    with warnings.catch_warnings():
        # Complications that tied embeddings have when they are merged: untie_where_adapted sees to them.
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        loaded = load_model(settings, precision=Precision(None, torch.float32), device=device, seed=0, kind=adapter_kind(Path(adapter)))
    assert loaded.adapter is not None, "an adapter was given"
    if getattr(loaded.model, "is_quantized", False):
        raise ModelError(f"{base} is quantised, and its weights cannot take a change. Give the model that it was made of with --model.")
    loaded.model.eval().requires_grad_(False)
    return loaded


def refuse_other_kinds(adapter: str) -> None:
    """Stops at adapters that are no change of weights.

    Raises:
        ModelError: it is one, or its config cannot be read.
    """
    try:
        config = PeftConfig.from_pretrained(adapter)
    except Exception as error:  # the library lets errors of many kinds through
        raise ModelError(f"the config of the adapter {adapter} cannot be read: {' '.join(str(error).split())[:300]}") from None
    if config.is_prompt_learning or config.is_adaption_prompt:
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise ModelError(
            f"{adapter} is an adapter of the type {kind}, which adds inputs instead of changing weights, "
            "so it cannot be merged. Serve it beside its base."
        )


@torch.no_grad()
def merge_weights(loaded: LoadedModel, dtype: torch.dtype) -> tuple[PreTrainedModel, Change]:
    """One model; the adapter is in its weights afterwards, and nothing of peft is left.

    Args:
        loaded: from `load_to_merge`; not to be used any more.
        dtype: in which the weights will be saved, to measure what that costs. The model returned is in float32.

    Raises:
        ModelError: the adapter holds numbers that are not finite, or cannot be merged.
    """
    assert loaded.adapter is not None, "load_to_merge puts one in"
    untie_where_adapted(loaded.model)
    changes: list[ModuleChange] = []
    try:
        for name, layer in changed_layers(loaded.adapter):
            changes += merge_layer(name, layer, str(loaded.adapter.active_adapter), dtype)
        with warnings.catch_warnings():
            # The layers are merged; what is left to do is to take their wrappers away.
            warnings.filterwarnings("ignore", message="All adapters are already merged")
            warnings.filterwarnings("ignore", message="Input and output embeddings are no longer tied")
            model: PreTrainedModel = loaded.adapter.merge_and_unload()
    except ValueError as error:
        raise ModelError(f"the adapter cannot be merged: {' '.join(str(error).split())}") from None
    return model, Change(tuple(changes))


def untie_where_adapted(model: PreTrainedModel) -> None:
    """Gives the head weights of its own where it shares them with the embeddings and one of the two is adapted.

    The adapter changes the one and not the other; merged into weights that both share it would change both.
    """
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    own_inputs, own_outputs = unwrapped(inputs), unwrapped(outputs)
    if own_outputs is None or own_inputs is None or (inputs is own_inputs and outputs is own_outputs):
        return
    shared, weight = getattr(own_inputs, "weight", None), getattr(own_outputs, "weight", None)
    if isinstance(weight, nn.Parameter) and isinstance(shared, Tensor) and weight.data_ptr() == shared.data_ptr():
        own_outputs.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        for config in {id(config): config for config in (model.config, model.config.get_text_config())}.values():
            config.tie_word_embeddings = False


def unwrapped(module: nn.Module | None) -> nn.Module | None:
    """The base's own layer inside of what peft puts around it."""
    inner = getattr(module, "original_module", None) or getattr(module, "base_layer", None)
    return unwrapped(inner) if isinstance(inner, nn.Module) else module


def changed_layers(adapter: PeftModel) -> Iterator[tuple[str, BaseTunerLayer | ModulesToSaveWrapper]]:
    """The layers that the adapter changes, by their names in the base; each once, the outermost."""
    outermost: list[str] = []
    model: nn.Module = adapter.get_base_model()
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer | ModulesToSaveWrapper) and not any(name.startswith(f"{outer}.") for outer in outermost):
            outermost.append(name)
            yield name.removesuffix(".token_adapter"), module


def merge_layer(name: str, layer: BaseTunerLayer | ModulesToSaveWrapper, active: str, dtype: torch.dtype) -> list[ModuleChange]:
    """Merges one layer where it is still apart, and measures what that changed: one entry per tensor.

    Raises:
        ValueError: from peft, where the adapter holds numbers that are not finite.
    """
    if isinstance(layer, ModulesToSaveWrapper):
        if active not in layer.modules_to_save:
            return []
        before, after = dict(layer.original_module.named_parameters()), dict(layer.modules_to_save[active].named_parameters())
        return [measure(f"{name}.{key}", before[key], after[key], dtype) for key in before]
    base = layer.get_base_layer()
    before = {key: parameter.detach().clone() for key, parameter in base.named_parameters()}
    layer.merge(safe_merge=True)
    return [
        measure(f"{name}.{key}", before[key], parameter, dtype)
        for key, parameter in base.named_parameters()
        if key == "weight" or not torch.equal(before[key], parameter)
    ]


def measure(name: str, before: Tensor, after: Tensor, dtype: torch.dtype) -> ModuleChange:
    """One tensor before and after merging, and after rounding."""
    before, after = before.detach(), after.detach()
    rounded = after.to(dtype).float()
    rounded_before = before.to(dtype).float()
    changed = after != before
    return ModuleChange(
        name=name,
        change=float(torch.linalg.vector_norm(after - before, dtype=torch.float64)),
        rounding=float(torch.linalg.vector_norm(rounded - after, dtype=torch.float64)),
        num_changed=int(changed.sum()),
        num_vanished=int((changed & (rounded == rounded_before)).sum()),
        base_is_rounded=torch.equal(before, rounded_before),
    )


@torch.no_grad()
def token_values(model: PreTrainedModel, trees: Sequence[PromptTree], *, together: bool = False) -> Tensor:
    """What the model gives for every scored token of the trees in order, float32 [N], on the CPU: its log-probability in nats, or of a
    reward model the score of the text before it.

    Args:
        model: in evaluation mode.
        trees: at least one.
        together: run them as one padded batch instead of one after the other. The numbers should be the same, and how far they are
            not is the arithmetic's own noise.
    """
    policy = Policy(model, EnginePath("plain", None, scores=score_head_of(model) is not None))
    found: list[Tensor] = []
    for group in [list(trees)] if together else [[tree] for tree in trees]:
        batch = pack(group, sharing="plain", device=model.device)
        given = policy(batch)
        values_N = given.values_N if given.scalar_T is None else given.scalar_T[batch.predict_from_N]
        found.append(values_N.float().cpu())
    return torch.cat(found)


def cast_weights(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Rounds what is saved. Not the model as a whole: it also holds numbers that every loading computes anew, such as the
    frequencies of rotary positions, and rounding those here would say nothing about the saved model."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def write_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, *, end_of_turn: str) -> None:
    """Model, tokenizer and generation config in a new folder, the weights in the precision that they have.

    Args:
        model: the merged model.
        tokenizer: with its chat template.
        folder: is made.
        end_of_turn: the token that closes answers: generation stops at it.

    Raises:
        RunError: it cannot be written; nothing is left of it.
    """
    stop_at(LoadedModel(model, tokenizer, None, False), end_of_turn)
    mend_generation_config(model)
    try:
        folder.mkdir(parents=True)
        with transformers_logging_at("ERROR"):
            model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except Exception as error:  # for a full disk OSError, SafetensorError, and a bare Exception from tokenizers
        shutil.rmtree(folder, ignore_errors=True)
        raise RunError(f"cannot write the merged model in {folder.parent}: {error}. Make room, or give another folder as out.") from None


@contextmanager
def adapter_off(loaded: LoadedModel) -> Iterator[PreTrainedModel]:
    """The base alone."""
    assert loaded.adapter is not None, "load_to_merge puts one in"
    with loaded.adapter.disable_adapter():
        yield loaded.model
