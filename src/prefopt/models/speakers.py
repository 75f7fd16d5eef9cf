"""The models that answer: a policy, and the model that it is compared with.

Where the two are the same weights with other adapters, or with none, the weights are in memory once and the adapter is
switched for every turn to speak.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefopt.engine.batch import pack
from prefopt.engine.extent import batches
from prefopt.errors import ConfigError, ModelError
from prefopt.models.load import (
    ADAPTER_CONFIG,
    LoadedModel,
    choose_precision,
    downloaded_adapter,
    is_hub_name,
    load_model,
    load_tokenizer,
    locate,
)
from prefopt.models.policy import EnginePath, Policy
from prefopt.models.read import context_of
from prefopt.models.save import own_end_ids
from prefopt.models.settings import ModelSettings
from prefopt.trees import PromptTree

SECOND_ADAPTER = "prefopt_reference"
"""Name of the reference's adapter where it sits on the same weights as the policy's."""

SCORED_TOKENS = 4096
"""Positions in one forward pass that scores answers."""


@dataclass(frozen=True, slots=True)
class Weights:
    """Where the weights of one speaker are.

    Attributes:
        source: folder or hub name of the whole model.
        adapter: folder or hub name of the adapter on it; None: the model alone.
    """

    source: str
    adapter: str | None

    @classmethod
    def of(cls, model: str, adapter: str | None = None) -> "Weights":
        """Of a model, or of an adapter that names its base.

        Raises:
            ModelError: as `prefopt.models.load.locate`.
        """
        source, own = locate(model)
        return cls(source, own if adapter is None else adapter_folder(adapter))

    def settings(self, trust_remote_code: bool) -> ModelSettings:
        """What loads it: an adapter by its own name where it names this base, for its tokenizer has the tokens that were added for it."""
        try:
            alone = self.adapter is not None and locate(self.adapter) == (self.source, self.adapter)
        except ModelError:  # it names a base that is not there any more
            alone = False
        model, adapter = (str(self.adapter), None) if alone else (self.source, self.adapter)
        return ModelSettings(model=model, adapter=adapter, trust_remote_code=trust_remote_code)

    def shares_weights(self, other: "Weights") -> bool:
        """Whether both are the same model, whatever adapters are on it."""
        return self.source == other.source or (
            Path(self.source).is_dir() and Path(other.source).is_dir() and Path(self.source).resolve() == Path(other.source).resolve()
        )


def adapter_folder(name: str) -> str:
    """The folder of an adapter: of a run the one of its model, of a hub name the one that it was downloaded to.

    Raises:
        ModelError: there is none.
    """
    if is_hub_name(name):
        return str(downloaded_adapter(name))
    path = Path(name).expanduser()
    inside = path / "model"
    return str(inside if not (path / ADAPTER_CONFIG).is_file() and inside.is_dir() else path)


def device_named(wanted: str) -> torch.device:
    """The device that a setting names: `auto`, `cpu` or `cuda`.

    Raises:
        ConfigError: a GPU is asked for and there is none.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device cuda: there is no GPU that torch can use here. Give cpu, or auto.")
    return torch.device("cuda" if wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available()) else "cpu")


class Switch:
    """Which adapter of a model is on.

    It stays as it is until another one is wanted: for a model of many layers switching takes as long as a small forward pass.

    Args:
        adapter: the peft wrapper, its adapter on.
    """

    def __init__(self, adapter: PeftModel) -> None:
        self.adapter = adapter
        self._layers: Any = adapter.base_model
        self.on: str | None = str(adapter.active_adapter)

    def to(self, name: str | None) -> None:
        """Switches to that adapter; None: all off."""
        if name == self.on:
            return
        if name is None:
            self._layers.disable_adapter_layers()
        elif self.on is None:
            self._layers.enable_adapter_layers()
        if name is not None and self.adapter.active_adapter != name:
            self.adapter.set_adapter(name)
        self.on = name


@dataclass(frozen=True, slots=True)
class Speaker:
    """A model that answers.

    Attributes:
        role: `policy` or `reference`.
        weights: where it comes from.
        model: the causal LM; two speakers may hold the same one.
        tokenizer: its own.
        switch: turns its adapters on and off; the same one where two speakers hold the same model; None: it has no adapter.
        active: the adapter that is on while it speaks; None: none is.
        autocast: dtype of matrix products; None: float32.
    """

    role: str
    weights: Weights
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    switch: Switch | None
    active: str | None
    autocast: torch.dtype | None

    @contextmanager
    def speaking(self) -> Iterator[PreTrainedModel]:
        """The model as this speaker, ready to generate: its adapter on, or off."""
        with torch.no_grad(), torch.autocast(self.model.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            if self.switch is not None:
                self.switch.to(self.active)
            yield self.model

    @property
    def context(self) -> int | None:
        """Tokens of the longest text that it can read, where its config says so."""
        return context_of(self.model.config)

    @property
    def end_ids(self) -> set[int]:
        """The tokens by which the model itself says that generation ends."""
        end = self.tokenizer.eos_token_id
        return {*own_end_ids(LoadedModel(self.model, self.tokenizer, None, False)), *([end] if isinstance(end, int) else [])}

    def logps(self, trees: list[PromptTree]) -> Tensor:
        """Log-probability of each completion in the order of the trees, summed over its tokens: float32 [C], in nats, on the CPU."""
        # Every completion with its own prompt is right for every model without proof.
        policy = Policy(self.model, EnginePath("plain", None))
        with self.speaking():
            groups = batches(trees, sharing="plain", max_tokens=SCORED_TOKENS)
            return torch.cat([policy(pack(group, sharing="plain", device=self.model.device)).sum().cpu() for group in groups])


def load_speakers(
    policy: Weights,
    reference: Weights | None,
    *,
    precision: str,
    device: torch.device,
    load_in_4bit: bool = False,
    trust_remote_code: bool = False,
) -> tuple[Speaker, ...]:
    """The policy, and behind it the reference where there is one.

    Args:
        policy, reference: where they are.
        precision: `auto`, `bf16` or `float32`, as in training.
        device: where to.
        load_in_4bit: hold the weights under the adapters in four bits.
        trust_remote_code: run code that comes with the models.

    Raises:
        ModelError: one cannot be found, read or put together.
        ConfigError: four bits are wanted, and bitsandbytes is not installed.
    """

    def load(weights: Weights, role: str) -> Speaker:
        chosen = choose_precision(precision, device, adapter=weights.adapter is not None or load_in_4bit)
        settings = weights.settings(trust_remote_code).model_copy(update={"load_in_4bit": load_in_4bit})
        loaded = load_model(settings, precision=chosen, device=device, seed=0, frozen=True)
        loaded.model.eval().requires_grad_(False)
        switch = None if loaded.adapter is None else Switch(loaded.adapter)
        active = None if switch is None else switch.on
        return Speaker(role, weights, loaded.model, loaded.tokenizer, switch, active, chosen.autocast)

    def on_the_weights_of(one: Speaker, weights: Weights, role: str) -> Speaker:
        active = _second_adapter(one, weights)
        return replace(one, role=role, weights=weights, active=active, tokenizer=load_tokenizer(weights.settings(trust_remote_code)))

    if reference is None:
        return (load(policy, "policy"),)
    if not policy.shares_weights(reference):
        return load(policy, "policy"), load(reference, "reference")
    if policy.adapter is None and reference.adapter is not None:
        other = load(reference, "reference")
        return on_the_weights_of(other, policy, "policy"), other
    one = load(policy, "policy")
    return one, on_the_weights_of(one, reference, "reference")


def _second_adapter(one: Speaker, other: Weights) -> str | None:
    """Puts another adapter on a speaker's weights, beside its own; the name under which it can be switched on."""
    if other.adapter is None:
        return None
    assert one.switch is not None, "the one that is loaded has an adapter if one of the two has"
    try:
        with warnings.catch_warnings():
            # A warning is all that peft has for weights that the adapter lacks, and they would be random.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            one.switch.adapter.load_adapter(other.adapter, SECOND_ADAPTER, is_trainable=False, torch_device=str(one.model.device))
    except Exception as error:  # peft lets errors of many kinds through; all mean that the adapter cannot be read
        raise ModelError(f"cannot put the adapter {other.adapter} beside {one.weights.adapter}: {' '.join(str(error).split())}") from None
    one.model.eval().requires_grad_(False)
    return SECOND_ADAPTER
