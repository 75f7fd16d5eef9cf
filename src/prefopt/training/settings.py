"""What users say about a run."""

from pathlib import Path
from typing import Literal

from pydantic import model_validator

from prefopt.config import REQUIRED, Setting
from prefopt.data.settings import DataSettings
from prefopt.models.settings import ModelSettings


class RunSettings(DataSettings, ModelSettings):
    """Everything about a run that does not belong to its method; a method's own settings are added to it."""

    out: Path = Setting(REQUIRED, help="Folder of the run: metrics, checkpoints, and the model under `model/`.")
    batch_size: int = Setting(64, ge=1, le=100_000, help="Examples (a pair is one) per optimizer step, however the work is cut.")
    max_tokens: int = Setting(
        8192, ge=16, help="Tokens in one packed micro-batch; lower it when memory runs out. Results do not depend on it."
    )
    epochs: float = Setting(1.0, gt=0, help="Passes over the data.")
    max_steps: int | None = Setting(None, ge=1, help="Optimizer steps, in place of epochs.")
    learning_rate: float | None = Setting(
        None,
        gt=0,
        help="Peak learning rate; the default depends on the method, on adapter or full fine-tuning, and on the size of the model.",
    )
    lr_schedule: Literal["cosine", "linear", "constant"] = Setting("cosine", help="Course of the learning rate after warm-up.")
    warmup_ratio: float = Setting(0.1, ge=0, lt=1, help="Share of the steps over which the learning rate rises from 0.")
    optim: Literal["adamw", "adamw-8bit", "adamw-bf16"] = Setting(
        "adamw",
        help="How AdamW holds its numbers: `adamw` all in float32 (16 bytes for a trained weight); `adamw-8bit` moments in 8 bits, by "
        "bitsandbytes (10 bytes); `adamw-bf16` all in bf16 with compensated sums, by optimi (10 bytes, full fine-tuning only).",
    )
    weight_decay: float = Setting(0.0, ge=0, help="Decoupled weight decay (not on biases and norms).")
    max_grad_norm: float = Setting(1.0, gt=0, help="Gradients longer than this are scaled down to it.")
    eval_every_steps: int | None = Setting(
        None, ge=1, help="Steps between evaluations on the held-out split; the default is at the start and at the end."
    )
    early_stop: int | None = Setting(
        None,
        ge=1,
        help="Stop after this many evaluations in a row without a lower held-out loss, and take the model of the best one; "
        "needs eval_every_steps.",
    )
    samples: int = Setting(
        4, ge=0, help="Held-out prompts that the model answers at each evaluation, for the report and the watch; 0: none."
    )
    sample_tokens: int = Setting(128, ge=1, help="Tokens after which such an answer is cut.")
    save_every_minutes: float = Setting(
        10.0,
        ge=0,
        help="Minutes between checkpoints, and more where saving would take above a twentieth of the time; 0: none by the clock.",
    )
    save_every_steps: int | None = Setting(None, ge=1, help="Steps between checkpoints; there is one at the end in any case.")
    keep_checkpoints: int = Setting(2, ge=1, help="How many of the newest checkpoints stay on disk.")
    keep_best: bool = Setting(
        True, help="With eval_every_steps, also save whenever the held-out loss is lower than ever before, and keep that checkpoint."
    )
    report: bool = Setting(True, help="Write report.html, one page about the run, at the end; `prefopt report` makes it at any time.")
    report_to: list[Literal["tensorboard", "wandb", "mlflow"]] = Setting(
        [], help="Also report to tensorboard, wandb or mlflow, or several of them; each needs the extra of its name."
    )
    seed: int = Setting(0, ge=0, help="Seed of the data order and of everything drawn at random.")
    parallel: Literal["ddp", "fsdp"] = Setting(
        "ddp",
        help="What several processes share: `ddp` keeps the whole model on each (fastest where it fits); `fsdp` keeps a part of every "
        "weight on each, for models that one GPU cannot hold.",
    )
    device: Literal["auto", "cpu", "cuda"] = Setting("auto", help="Where to train; `auto` takes a GPU where there is one.")
    offload_activations: bool = Setting(
        False,
        help="On a GPU: what the backward pass needs waits in the machine's memory. For long rows, where gradient checkpointing is not "
        "enough or costs more time.",
    )
    memory_check: bool = Setting(True, help="Estimate the memory first, and refuse to start what will not fit.")
    resume: bool = Setting(False, help="Go on from the newest checkpoint in `out`.")
    overwrite: bool = Setting(False, help="Delete the run that `out` holds and start anew.")

    @model_validator(mode="after")
    def _optimizer_fits_the_arithmetic(self) -> "RunSettings":
        if self.optim == "adamw-bf16":
            if self.precision == "float32":
                raise ValueError("optim adamw-bf16 holds the weights in bf16, and precision says float32: leave one of them out")
            if self.lora_rank or self.adapter is not None:
                raise ValueError("optim adamw-bf16 is for training all weights; an adapter's are few and stay in float32: leave it out")
        return self

    @model_validator(mode="after")
    def _early_stop_needs_evaluations(self) -> "RunSettings":
        if self.early_stop is not None:
            if self.eval_every_steps is None:
                raise ValueError("early_stop looks at the held-out loss on the way: give eval_every_steps too")
            if not (self.eval_data or self.eval_fraction):
                raise ValueError("early_stop looks at the held-out loss: give eval_data or eval_fraction too")
            if not self.keep_best:
                raise ValueError("early_stop takes the model of the best checkpoint: leave keep_best on")
            if getattr(self, "sync_reference_every_steps", None) is not None:
                raise ValueError(
                    "early_stop compares held-out losses of different steps, and with sync_reference_every_steps each is against another "
                    "reference: leave one of them out"
                )
        return self
