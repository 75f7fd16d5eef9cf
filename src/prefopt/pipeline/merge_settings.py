"""What users say about a merge.

Apart from `merge` so that `prefopt merge --help` is drawn without importing torch.
"""

from pathlib import Path
from typing import Literal

from prefopt.config import REQUIRED, Setting, Settings


class MergeSettings(Settings):
    """An adapter and its base, to become one model."""

    adapter: str = Setting(REQUIRED, help="Folder of a run that trained an adapter, or folder or hub name of an adapter.")
    out: Path = Setting(REQUIRED, help="Folder to write the model and its tokenizer to.")
    model: str | None = Setting(None, help="Folder or hub name of the base; the default is the one that the adapter names.")
    precision: Literal["float32", "bf16", "float16"] = Setting(
        "float32", help="In which the weights are saved; they are merged in float32 whatever it is. Says what rounding loses."
    )
    device: Literal["auto", "cpu", "cuda"] = Setting("cpu", help="Where to merge and to compare; `auto` takes a GPU where there is one.")
    overwrite: bool = Setting(False, help="Replace the merged model that `out` holds.")
    trust_remote_code: bool = Setting(False, help="Run Python code that comes with the base. It can do anything on your machine.")
