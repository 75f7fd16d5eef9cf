"""Several methods one after the other from one file: `stages: [sft, dpo]`.

    model: base
    stages: [sft, dpo]
    out: runs/aligned
    sft: {data: [demonstrations.jsonl], epochs: 3}
    dpo: {data: [pairs.jsonl], beta: 0.1}

Keys at the top hold for all stages, those under a stage's name for that stage. Each stage starts from the model of the
one before, and a stage with a reference refers to it. After a stage that trained an adapter the next goes on with that
adapter.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt.config import check
from prefopt.errors import ConfigError, RunError
from prefopt.methods.method import Method
from prefopt.pipeline.stages_done import inputs, is_done, note_done
from prefopt.training.assemble import method_named, own_settings, settings_for
from prefopt.training.record.folder import RunFolder
from prefopt.training.settings import RunSettings

NEW_ADAPTER = ("lora_rank", "lora_alpha", "rslora", "dora", "target_modules", "modules_to_save")


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage: a method, and the settings of its run."""

    name: str
    method: type[Method]
    settings: RunSettings


def plan_stages(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> list[Stage]:
    """All stages, checked before the first one runs.

    Args:
        values: what the file says.
        overrides: settings that win over the file, at the top and under every stage.

    Raises:
        ConfigError: a stage is no method, is named twice, or its settings are wrong; `out` or `model` is missing.
    """
    names = values.get("stages")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"stages must list methods in their order, for example [sft, dpo] (given: {names!r})")
    if len(set(names)) < len(names):
        raise ConfigError(f"stages: each method stands once (given: {', '.join(names)})")
    shared = {name: value for name, value in values.items() if name not in ("stages", *names)}
    for missing in ("model", "out"):
        if missing not in {**shared, **overrides}:
            raise ConfigError(f"{missing}: is required at the top of a file with stages, and was not given")
    out = {**shared, **overrides}["out"]
    if not isinstance(out, str | Path):
        raise ConfigError(f"out: must be a path (given: {out!r})")
    stages: list[Stage] = []
    goes_on = False  # with the adapter of the stage before
    for name in names:
        method = method_named(name)
        own = values.get(name) or {}
        if not isinstance(own, dict):
            raise ConfigError(f"{name}: must hold that stage's settings as `name: value` lines (given: {own!r})")
        if clash := sorted({"model", "out", "method"} & own.keys()):
            raise ConfigError(f"{name}.{clash[0]}: a stage takes its model and its folder from the top of the file")
        merged = {**_understood(shared, method, names), **own, **_understood(overrides, method, names)}
        merged["out"] = Path(out).expanduser() / name
        if stages:
            merged["model"] = str(stages[-1].settings.out / "model")
            if goes_on and (clash := [key for key in ("adapter", *NEW_ADAPTER) if own.get(key)]):
                raise ConfigError(f"{name}.{clash[0]}: the stage goes on with the adapter of {stages[-1].name}, and cannot have another")
            merged = {
                key: value for key, value in merged.items() if key in own or key not in ("adapter", *(NEW_ADAPTER if goes_on else ()))
            }
        settings = check(settings_for(method), merged, source=f"the stage {name}")
        goes_on = goes_on or bool(settings.lora_rank or settings.adapter)
        stages.append(Stage(name, method, settings))
    return stages


def run_stages(values: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Path:
    """Run all stages. With `resume`, finished ones are passed over, where nothing that decides them has changed, and an interrupted
    one goes on.

    Returns:
        the folder of the last stage's model.

    Raises:
        ConfigError: as `plan_stages`.
        RunError: a stage that has finished would come out otherwise now.
        PrefoptError: from a stage.
    """
    stages = plan_stages(values, overrides or {})
    for stage in stages:
        if not stage.settings.resume:
            RunFolder(stage.settings.out).check(resume=False, overwrite=stage.settings.overwrite)
    from prefopt.training.group import processes
    from prefopt.training.run import train  # loads torch: only once all settings are right
    from prefopt.training.terminal.narrator import Quiet, Terminal

    is_main = processes.place(os.environ)[0] == 0
    narrator = Terminal() if is_main else Quiet()
    for place, stage in enumerate(stages, 1):
        settings = stage.settings
        method = stage.method(own_settings(stage.method, settings))
        if settings.resume and is_done(settings, method):
            narrator.say(f"stage {place} of {len(stages)}, {stage.name}: done before, in {settings.out}")
            continue
        if settings.resume and not RunFolder(settings.out).has_checkpoint:
            _refuse_if_finished(stage)
            settings = settings.model_copy(update={"resume": False, "overwrite": settings.out.is_dir()})
        narrator.say(f"stage {place} of {len(stages)}: {stage.name}")
        read = inputs(settings)
        train(stage.name, settings, narrator=narrator)
        if is_main:
            note_done(settings, method, read)
    return stages[-1].settings.out / "model"


def _refuse_if_finished(stage: Stage) -> None:
    """A stage that has finished and has no checkpoint cannot be compared with what it would be now, and must not be overwritten.

    Raises:
        RunError: it has.
    """
    out = stage.settings.out
    if RunFolder(out).files.summary.is_file():
        raise RunError(
            f"the stage {stage.name} has finished in {out}, and it cannot be told whether it would come out the same now: its settings, "
            "data or model may have changed, and it has no checkpoint. Give all as it was, or start all stages anew with another out, or "
            "with --overwrite in place of --resume."
        )


def _understood(values: Mapping[str, Any], method: type[Method], stages: list[str]) -> dict[str, Any]:
    """The shared keys without those that belong to another stage's method only (a β at the top is not SFT's)."""
    own = settings_for(method).model_fields
    others = {key for name in stages for key in settings_for(method_named(name)).model_fields}
    return {key: value for key, value in values.items() if key in own or key not in others}
