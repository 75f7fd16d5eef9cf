"""What users say when they ask for advice.

Apart from the rest so that `prefopt advise --help` is drawn without importing torch.
"""

from pathlib import Path
from typing import Literal

from pydantic import field_validator, model_validator

from prefopt.config import Setting
from prefopt.data.settings import DataSettings
from prefopt.pipeline.plan_settings import as_amount

Have = Literal["checker", "reward-model", "shaped-rewards", "no-judge"]
"""What no data shows."""

NEED_A_MODEL = ("data_workers", "cache_dir", "memory", "device", "gpus", "ask", "trust_remote_code")
"""Settings about tokens that are made, memory, or the model itself."""


class AdviseSettings(DataSettings):
    """Data, perhaps a model, and what only the user knows."""

    model: str | None = Setting(
        None, help="Folder or hub name of the model to train: then lengths are in tokens, the model is asked, and memory is looked at."
    )
    have: list[Have] = Setting(
        [],
        help="What the data does not show: a `checker`, a program that tells right answers from wrong; a strong `reward-model`, with "
        "time to sample answers for it; `shaped-rewards`, several that are to be traded off, or rewards for parts of an answer; "
        "`no-judge`: nobody and nothing to say which of two answers is better.",
    )
    sample: int = Setting(
        20_000,
        ge=10,
        help="Examples whose text is looked at: all rows are read and counted, and of more than this a sample is kept, by prompt.",
    )
    ask: int = Setting(32, ge=0, le=10_000, help="Examples whose answers the model is asked about; 0: its weights are not loaded.")
    memory: str | None = Setting(None, help="Memory that there is, as in `prefopt plan`: 24GB; the default is what is free here.")
    device: Literal["auto", "cpu", "cuda"] = Setting("auto", help="Where training would run, as in `prefopt plan`.")
    gpus: int = Setting(8, ge=1, le=1024, help="GPUs of that memory that there are at most.")
    trust_remote_code: bool = Setting(False, help="Run Python code that comes with the model. It can do anything on your machine.")
    write: Path | None = Setting(None, help="Write the settings that are advised to this YAML file, for `prefopt train --config`.")

    _is_an_amount = field_validator("memory", mode="before")(as_amount)

    @model_validator(mode="after")
    def _goes_together(self) -> "AdviseSettings":
        if self.model is not None and any(item.partition(":")[0] == "-" for item in (*self.data, *self.eval_data)):
            raise ValueError("with a model the data is read twice, and standard input (`-`) can be read once: give a file")
        if "no-judge" in self.have and (judges := [name for name in ("checker", "reward-model") if name in self.have]):
            raise ValueError(f"have says no-judge and {' and '.join(judges)}, which judge answers: leave one of them out")
        if "on_bad_row" in self.model_fields_set:
            raise ValueError("on_bad_row is not for advice, which counts bad rows and goes on: leave it out")
        if self.model is None and (given := [name for name in NEED_A_MODEL if name in self.model_fields_set]):
            raise ValueError(f"{', '.join(given)} say something about a model: give model too")
        return self
