"""What users say about the model."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from prefopt.config import REQUIRED, Setting, Settings

ModelKind = Literal["language", "reward"]
"""What a model gives: probabilities of words, or, a reward model, one score of a prompt with an answer and no words."""

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
            shape = "shapes" if len(given) == 1 else "shape"
            raise ValueError(f"{', '.join(given)} {shape} a new adapter: give lora_rank too (for example 16)")
        return self


SYNC_WEIGHT = 0.6
"""The policy's share in a reference that follows it, where none is given."""


class ReferenceSettings(Settings):
    """What runs of methods with a reference add."""

    reference: str | None = Setting(
        None, help="Folder or hub name of another reference model; the default is the model as it is at the start."
    )
    reference_cache: bool = Setting(
        True, help="Compute the reference once, before training, and keep it on disk for later runs; off holds a reference model in memory."
    )
    sync_reference_every_steps: int | None = Setting(
        None,
        ge=1,
        help="Steps after which the reference follows the policy (TR-DPO): it is then in memory, and what it gives is not cached. Left "
        "out: it stays where it was.",
    )
    sync_reference_weight: float = Setting(
        SYNC_WEIGHT, gt=0, le=1, help="The policy's share in the new reference: 1 makes it the policy, 0.5-0.6 is usual for a soft update."
    )
    kl_budget: float | None = Setting(
        None, gt=0, help="KL from the reference, in nats per completion, beyond which the watch speaks; its page says what the default is."
    )

    @model_validator(mode="before")
    @classmethod
    def _what_moves_is_not_kept(cls, given: Any) -> Any:
        moves = isinstance(given, dict) and given.get("sync_reference_every_steps") is not None
        return {"reference_cache": False, **given} if moves else given

    @model_validator(mode="after")
    def _a_reference_that_moves_is_in_memory(self) -> "ReferenceSettings":
        if self.sync_reference_every_steps is None:
            if self.sync_reference_weight != SYNC_WEIGHT:
                raise ValueError("sync_reference_weight says how a reference follows the policy: give sync_reference_every_steps too")
            return self
        if self.reference is not None:
            raise ValueError("sync_reference_every_steps moves the policy's own start, and reference names another model: leave one out")
        if self.reference_cache:
            raise ValueError(
                "reference_cache keeps what the reference gives, and sync_reference_every_steps moves it: leave reference_cache out, "
                "or set it to off"
            )
        return self
