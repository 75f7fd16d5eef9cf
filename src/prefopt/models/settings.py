"""What users say about the model."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from prefopt.config import REQUIRED, Setting, Settings

SWITCHES = {"true": "on", "yes": "on", "false": "off", "no": "off"}
"""Other words for on and off, as they are understood wherever a setting is a switch."""


class ModelSettings(Settings):
    """The model that is trained, and how much of it."""

    model: str = Setting(REQUIRED, help="Folder or hub name of the model that training starts from.")
    adapter: str | None = Setting(
        None, help="Folder or hub name of a LoRA adapter to go on from; as it is at the start it is also the reference."
    )
    lora_rank: int = Setting(0, ge=0, help="Rank of a new LoRA adapter; 0 trains all weights.")
    lora_alpha: float | None = Setting(
        None,
        gt=0,
        help="What the adapter does is multiplied by this over the rank; the default is twice the rank. With rslora, over the root of the "
        "rank, and the default is 16.",
    )
    rslora: bool = Setting(
        False,
        help="Scale the adapter by the root of its rank (rank-stabilised LoRA, arXiv 2312.03732): for comparing ranks at one lora_alpha.",
    )
    dora: bool = Setting(
        False,
        help="Train the length of each weight's columns beside the adapter, which then turns them only (DoRA, arXiv 2402.09353): slower, "
        "and now and then better at low ranks.",
    )
    target_modules: list[str] = Setting([], help="Modules that get an adapter, by name; the default is every linear layer but the head.")
    modules_to_save: list[str] = Setting(
        [], help="Modules trained in full beside the adapter, for example the embeddings after adding tokens."
    )
    load_in_4bit: bool = Setting(
        False,
        help="Hold the frozen weights under an adapter in 4 bits (QLoRA: NF4 with double quantisation, by bitsandbytes): every linear "
        "layer but the head.",
    )
    precision: Literal["auto", "bf16", "float32"] = Setting(
        "auto",
        help="Arithmetic of the forward pass; `auto` is bf16 where the hardware has it. Trained weights are kept in float32, unless "
        "optim says otherwise.",
    )
    gradient_checkpointing: Literal["off", "on", "auto"] | Annotated[int, Field(ge=1)] = Setting(
        "auto",
        help="Layers that recompute their activations in the backward pass, the first ones: less memory, and up to a third more time; "
        "`on` is all of them, `auto` as few as the run needs to fit into memory, mostly none. Results do not depend on it.",
    )
    sharing: Literal["auto", "flat", "fork", "plain"] = Setting(
        "auto", help="How completions share their prompt; `auto` takes the fastest way that proves equal on this model."
    )
    trust_remote_code: bool = Setting(False, help="Run Python code that comes with the model. It can do anything on your machine.")

    @field_validator("gradient_checkpointing", mode="before")
    @classmethod
    def _switch_or_number(cls, value: Any) -> Any:
        """A switch is on or off however it is spelled; a number of layers may come as text."""
        if isinstance(value, bool):
            return "on" if value else "off"
        word = value.strip().lower() if isinstance(value, str) else value
        if word in ("on", "off", "auto"):
            return word
        if isinstance(word, str) and word in SWITCHES:
            return SWITCHES[word]
        if isinstance(word, str) and word.isascii() and word.isdecimal():
            word = int(word)
        if not isinstance(word, int) or word < 0:
            raise ValueError("must be off, on, auto or a number of layers")
        return word or "off"

    @model_validator(mode="after")
    def _adapter_settings_need_an_adapter(self) -> "ModelSettings":
        if self.adapter is not None and self.lora_rank:
            raise ValueError("adapter goes on from an existing adapter and lora_rank makes a new one: give one of the two")
        given = [name for name in ("lora_alpha", "rslora", "dora", "target_modules", "modules_to_save") if getattr(self, name)]
        if given and not self.lora_rank:
            raise ValueError(f"{', '.join(given)} shape a new adapter: give lora_rank too (for example 16)")
        return self


class ReferenceSettings(Settings):
    """What runs of methods with a reference add."""

    reference: str | None = Setting(
        None, help="Folder or hub name of another reference model; the default is the model as it is at the start."
    )
    reference_cache: bool = Setting(
        True, help="Compute the reference once, before training, and keep it on disk for later runs; off holds a reference model in memory."
    )
    kl_budget: float | None = Setting(
        None, gt=0, help="KL from the reference, in nats per completion, beyond which the watch speaks; its page says what the default is."
    )
