"""What a resumed run must share with its beginning, and what is said where it does not."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import prefopt
from prefopt.errors import RunError
from prefopt.methods.method import Method
from prefopt.models.policy import EnginePath
from prefopt.training.checkpoint import Checkpoints
from prefopt.training.environment import differences
from prefopt.training.processes import ALONE, Processes
from prefopt.training.settings import RunSettings
from prefopt.training.sharding import weights_sample

FREE = (
    "out",
    "eval_every_steps",
    "eval_data",
    "early_stop",
    "samples",
    "sample_tokens",
    "save_every_steps",
    "keep_checkpoints",
    "keep_best",
    "kl_budget",
    "report",
    "report_to",
    "memory_check",
    "data_workers",
    "cache_dir",
)
"""Settings that change what is noted of a run, and none of its steps."""

ROUNDING = ("max_tokens", "gradient_checkpointing", "sharing", "device", "parallel", "reference_cache")
"""Settings that decide how sums are cut: the steps that follow are the same but for rounding."""

ELSEWHERE = ("data", "resume", "overwrite")
"""The data's digest decides, not how it is spelled; the others are about this start of the run."""

PATHS = ("model", "adapter", "reference", "data", "eval_data", "out", "cache_dir")
"""Settings that may be spelled in another way on each machine of a run."""


def config_values(method: Method, settings: RunSettings) -> dict[str, Any]:
    """All settings, as `config.yaml` holds them."""
    return {
        "method": method.name,
        **json.loads(settings.model_dump_json(exclude={"resume", "overwrite"})),
        **json.loads(method.settings.model_dump_json()),
    }


def fixed_settings(method: Method, settings: RunSettings) -> dict[str, Any]:
    """The settings that decide a run's numbers, those that only round differently included."""
    return {name: value for name, value in config_values(method, settings).items() if name not in (*FREE, *ELSEWHERE)}


def facts_to_agree_on(method: Method, settings: RunSettings, model: nn.Module, data: str, path: EnginePath) -> dict[str, str]:
    """What must be the same on all processes, by name. Paths may differ: what lies there must not."""
    values = {name: str(value) for name, value in config_values(method, settings).items() if name not in PATHS}
    versions = {"prefopt": prefopt.__version__, "torch": torch.__version__}
    return {
        **{f"the version of {name}": version for name, version in versions.items()},
        **{f"the setting {name}": value for name, value in values.items()},
        "the data": data,
        "the model": weights_sample(model),
        "the way to run the model": str(path),
    }


def find_checkpoint(
    checkpoints: Checkpoints, method: Method, settings: RunSettings, processes: Processes = ALONE
) -> tuple[Path, dict[str, Any]]:
    """The newest checkpoint, of a run with these settings. The main process looks for it, and tells the others.

    Raises:
        RunError: there is none, or settings have changed that must not: names them, and those that may.
    """
    found = checkpoints.newest_state() if processes.is_main else None
    where, state = processes.share(found and [str(found[0]), found[1]])
    path = Path(where)
    before = {name: value for name, value in state["settings"].items() if name not in ROUNDING}
    now = {name: value for name, value in fixed_settings(method, settings).items() if name not in ROUNDING}
    if before["method"] != now["method"]:  # their own settings differ, of course
        before, now = {"method": before["method"]}, {"method": now["method"]}
    if changed := differences(before, now):
        raise RunError(
            f"these settings differ from those of {path}: {'; '.join(changed)}. Give them as they were, or start anew with another out. "
            f"What may change when a run is resumed: {', '.join(sorted((*FREE, *ROUNDING)))}."
        )
    return path, state


def check_data(path: Path, state: Mapping[str, Any], fingerprint: str) -> None:
    """The examples must be those of the run's beginning.

    Raises:
        RunError: they are not.
    """
    if state["data"] != fingerprint:
        raise RunError(f"the data is not what {path} was trained on. Give the same files, or start anew with another out.")


def rounding_differences(state: Mapping[str, Any], environment: Mapping[str, Any], fixed: Mapping[str, Any]) -> list[str]:
    """What is not as it was when the checkpoint was written, and makes numbers differ in the last bits."""
    before, now = ({name: settings.get(name) for name in ROUNDING} for settings in (state["settings"], fixed))
    return differences(state.get("environment", {}), environment) + differences(before, now)
