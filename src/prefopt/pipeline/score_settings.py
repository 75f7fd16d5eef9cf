"""What users say about scores: `prefopt score`.

Apart from what runs models, so that its help is drawn without importing torch.
"""

from pathlib import Path
from typing import Literal

from prefopt.config import REQUIRED, Setting
from prefopt.data.kinds import Kind
from prefopt.data.settings import DataSettings


class ScoreSettings(DataSettings):
    """A reward model, and the answers that it scores."""

    model: str = Setting(REQUIRED, help="Folder of a run, of a model or of an adapter, or a hub name: the reward model.")
    adapter: str | None = Setting(None, help="Folder or hub name of an adapter on the model; one that names its base is given as model.")
    kind: Kind = Setting(
        "ranked",
        help="What is read: several answers that are `ranked` (pairs too), a `pair`, answers with `thumbs` up or down, or one answer as a "
        "`demonstration`.",
    )
    out: Path | None = Setting(None, help="File to write, one JSON object per prompt; without it only the figures are said.")
    overwrite: bool = Setting(False, help="Replace the file that `out` names.")
    max_tokens: int = Setting(8192, ge=16, help="Tokens in one forward pass; lower it when memory runs out.")
    precision: Literal["auto", "bf16", "float32"] = Setting(
        "auto", help="Arithmetic; `auto` is bf16 where the hardware has it, as in training: its scores have about three digits."
    )
    load_in_4bit: bool | None = Setting(
        None, help="Hold the weights in 4 bits (NF4), by bitsandbytes; the default is to do as the run did in training."
    )
    device: Literal["auto", "cpu", "cuda"] = Setting("auto", help="Where to run; `auto` takes a GPU where there is one.")
    trust_remote_code: bool = Setting(False, help="Run Python code that comes with the model. It can do anything on your machine.")
