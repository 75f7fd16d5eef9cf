"""What users say when they ask what fits.

Apart from `plan` so that `prefopt plan --help` is drawn without importing torch.
"""

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import field_validator, model_validator

from prefopt.config import REQUIRED, Setting
from prefopt.data.settings import DataSettings

UNITS = {"": 10**9, "mb": 10**6, "gb": 10**9, "tb": 10**12, "mib": 2**20, "gib": 2**30, "tib": 2**40, "m": 10**6, "g": 10**9, "t": 10**12}
AMOUNT = re.compile(r"(\d+(?:\.\d+)?) *([a-z]*)")


def num_bytes(amount: str) -> int:
    """An amount of memory in bytes; a number alone is in GB.

    Raises:
        ValueError: it is none.
    """
    found = AMOUNT.fullmatch(amount.strip().lower())
    if found is None or found[2] not in UNITS or float(found[1]) <= 0:
        raise ValueError("must be more than 0, written like 24GB, 24GiB or 24000MB; a number alone is in GB")
    return int(float(found[1]) * UNITS[found[2]])


def as_amount(value: Any) -> Any:
    """An amount of memory as settings hold it; a config may give a number.

    Raises:
        ValueError: it is none.
    """
    if value is None:
        return None
    num_bytes(str(value))
    return str(value)


class PlanSettings(DataSettings):
    """A model, what it would be trained on, and the memory that there is."""

    method: str = Setting("dpo", help="Method that would be run.")
    model: str = Setting(REQUIRED, help="Folder or hub name of the model, or of an adapter to go on from; its config is enough.")
    memory: str | None = Setting(
        None, help="Memory that there is, of a GPU or of this machine: 24GB, 24GiB, 24000MB; the default is what is free here."
    )
    device: Literal["auto", "cpu", "cuda"] = Setting(
        "auto", help="Where it would run; `cuda` may be asked about without a GPU, with memory. `auto` takes a GPU where there is one."
    )
    gpus: int = Setting(8, ge=1, le=1024, help="GPUs of that memory that there are at most: where one is too small, as few as it takes.")
    data: list[str] = Setting([], help="Examples, as `prefopt train` takes them; without them, lengths and number below are taken.")
    examples: int = Setting(10_000, ge=1, help="Number of examples, where no data is given.")
    prompt_tokens: int = Setting(256, ge=1, help="Tokens of a prompt, where no data is given.")
    completion_tokens: int = Setting(128, ge=1, help="Tokens of a completion, where no data is given.")
    batch_size: int = Setting(64, ge=1, le=100_000, help="Examples per optimizer step.")
    epochs: float = Setting(1.0, gt=0, help="Passes over the data.")
    max_tokens: int = Setting(8192, ge=16, help="Most tokens in one packed micro-batch; the plan lowers it where memory is short.")
    lora_rank: int = Setting(16, ge=1, help="Rank of the adapters that are looked at.")
    precision: Literal["auto", "bf16", "float32"] = Setting("auto", help="Arithmetic of the forward pass, as in training.")
    sharing: Literal["auto", "flat", "fork", "plain"] = Setting("auto", help="How completions share their prompt, as in training.")
    tflops: float | None = Setting(
        None,
        gt=0,
        help="What a device that is not here computes in a run, all told, in 10¹² operations per second; else its times are not known.",
    )
    measure: bool = Setting(False, help="Then run three steps of what was chosen, and say how far the prediction was off. Needs data.")
    write: Path | None = Setting(None, help="Write the settings that were chosen to this YAML file, for `prefopt train --config`.")
    trust_remote_code: bool = Setting(False, help="Run Python code that comes with the model. It can do anything on your machine.")

    _is_an_amount = field_validator("memory", mode="before")(as_amount)

    @model_validator(mode="after")
    def _measuring_needs_data(self) -> "PlanSettings":
        if self.measure and not self.data:
            raise ValueError("measure runs three steps, and there is nothing to train on: give data too")
        return self
