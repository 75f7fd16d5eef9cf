"""What a resumed run must share with its beginning, and what is said where it does not."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import prefopt
from prefopt.errors import RunError
from prefopt.methods.method import Method
from prefopt.models.policy import EnginePath
from prefopt.models.reference import CachedReference
from prefopt.training.group.processes import Processes
from prefopt.training.record.checkpoint import Checkpoints
from prefopt.training.record.environment import differences
from prefopt.training.references import SAME_FUNCTION
from prefopt.training.settings import RunSettings

FREE = (
    "out",
    "eval_every_steps",
    "early_stop",
    "samples",
    "sample_tokens",
    "save_every_minutes",
    "save_every_steps",
    "keep_checkpoints",
    "keep_best",
    "kl_budget",
    "report",
    "report_to",
    "memory_check",
    "offload_activations",
    "data_workers",
    "cache_dir",
)
"""Settings that change what is noted of a run, and none of its steps."""

ROUNDING = ("max_tokens", "gradient_checkpointing", "sharing", "device", "parallel", "reference_cache")
"""Settings that decide how sums are cut: the steps that follow are the same but for rounding."""

ELSEWHERE = ("data", "eval_data", "resume", "overwrite")
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


def facts_to_agree_on(method: Method, settings: RunSettings, model: str, data: str, path: EnginePath) -> dict[str, str]:
    """What must be the same on all processes, by name; `model` and `data` are digests. Paths may differ: what lies there must not."""
    values = {name: str(value) for name, value in config_values(method, settings).items() if name not in PATHS}
    versions = {"prefopt": prefopt.__version__, "torch": torch.__version__}
    return {
        **{f"the version of {name}": version for name, version in versions.items()},
        **{f"the setting {name}": value for name, value in values.items()},
        "the data": data,
        "the model": model,
        "the way to run the model": str(path),
    }


def find_checkpoint(checkpoints: Checkpoints, method: Method, settings: RunSettings, processes: Processes) -> tuple[Path, dict[str, Any]]:
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


def start_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint keeps of the run's beginning, beside the settings."""
    return {
        "data": manifest["data"]["fingerprint"],
        "eval_data": manifest["data"].get("eval_fingerprint"),
        "model": manifest["model"]["fingerprint"],
        "reference_model": manifest.get("reference", {}).get("fingerprint"),
        "environment": manifest["environment"] | {name: manifest["resolved"][name] for name in ("precision", "engine")},
    }


def check_start_is_same(path: Path, state: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
    """The examples and the model must be those of the run's beginning.

    Raises:
        RunError: they are not.
    """
    now = start_of(manifest)
    if state["data"] != now["data"]:
        raise RunError(f"the data is not what {path} was trained on. Give the same files, or start anew with another out.")
    if state["eval_data"] != now["eval_data"]:
        raise RunError(
            f"the held-out data is not what {path} was evaluated on, and its figures would not compare. Give the same eval_data, or start "
            "anew with another out."
        )
    if has_changed(state, now, "model", drawn=manifest["model"]["adapter"]):
        raise RunError(
            f"the model {manifest['model']['name']} has changed since {path} was begun from it: its weights are others now. Give it as it "
            "was, or start anew with another out."
        )


def check_reference_is_same(path: Path, state: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
    """A reference that is a model of its own must have the weights that it had; the other one is the run's model as it started.

    Raises:
        RunError: it has not.
    """
    if state.get("reference_model") is not None and has_changed(state, start_of(manifest), "reference_model", drawn=False):
        raise RunError(
            f"the reference {manifest['reference']['name']} has changed since {path} was begun: its weights are others now, and the loss "
            "would be another. Give it as it was, or start anew with another out."
        )


def has_changed(before: Mapping[str, Any], now: Mapping[str, Any], name: str, *, drawn: bool) -> bool:
    """Whether a model has other weights; in another precision the same one has other numbers, and so has what was drawn on another device.

    Args:
        before, now: two beginnings, as `start_of` gives them.
        name: of the model.
        drawn: whether some of its weights may be drawn at random.
    """
    there, here = before["environment"], now["environment"]
    same_numbers = there.get("precision") == here["precision"]
    if drawn:
        kinds = [str(device).partition(" (")[0] for device in (there.get("device"), here["device"])]  # whatever the number of threads
        same_numbers &= kinds[0] == kinds[1]
    return bool(same_numbers and before[name] != now[name])


def check_reference_values(path: Path, state: Mapping[str, Any], reference: CachedReference | None, precision: str) -> None:
    """Values of the reference that were computed anew may differ in their last bits, and by no more.

    Args:
        path, state: of the checkpoint.
        reference: of this start; None: its values are not kept.
        precision: of this start.

    Raises:
        RunError: they are those of another function.
    """
    known = state.get("reference_sample")
    if reference is None or not known:
        return
    now = reference.sample(known)
    found = [abs(known[key] - now[key]) if known[key] != now[key] else 0.0 for key in now]  # infinities are no difference
    rounded = any("bf16" in str(used) for used in (precision, state["environment"].get("precision")))
    if found and not (difference := sum(found) / len(found)) <= SAME_FUNCTION[torch.bfloat16 if rounded else torch.float32]:
        raise RunError(
            f"the reference's values are not those that {path} was trained with: they differ by {difference:.2g} nats per token, far more "
            "than rounding. The reference or its config.json has changed: give it as it was, or start anew with another out. If nothing "
            "was changed, what the cache keeps is damaged: go on with another cache_dir, or with reference_cache off."
        )


def rounding_differences(
    state: Mapping[str, Any], manifest: Mapping[str, Any], fixed: Mapping[str, Any], reference: str | None
) -> list[str]:
    """What is not as it was when the checkpoint was written, and makes numbers differ in the last bits.

    Args:
        state: of the checkpoint.
        manifest: of this start.
        fixed: its settings.
        reference: digest of the reference's values, where they were computed before training.
    """
    before, now = ({name: settings.get(name) for name in ROUNDING} for settings in (state["settings"], fixed))
    found = differences(state["environment"], start_of(manifest)["environment"]) + differences(before, now)
    if None not in (before := state["reference"], reference) and before != reference:
        found.append("the reference's values were computed anew, in another order")
    return found
