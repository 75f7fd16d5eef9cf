"""The runs of a sweep, found and checked before the first of them begins.

    beta=0.05,0.1,0.3 learning_rate=1e-6,5e-6        six runs: every combination, in folders such as `beta-0.05_learning-rate-1e-6`

What is swept has to leave the runs comparable: they are judged on the same held-out examples, against the same start.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from prefopt.config import REQUIRED, Setting, Settings, describe, nearest, printable, readings, report, shown
from prefopt.errors import ConfigError
from prefopt.methods.method import Method
from prefopt.report.text import setting
from prefopt.training.assemble import method_named, reference_settings, settings_for
from prefopt.training.settings import RunSettings

_OF_THE_SWEEP = "is about the whole sweep, and the same for all of its runs"
_APART = "so that the runs' figures would not compare. Make a run for each with prefopt train"
_OF_THE_DATA = f"decides what the examples are, {_APART}"
_OF_THE_START = f"is what margins and KL are measured from, {_APART}"
_OF_THE_NOTES = "changes what is noted of a run, and nothing that it learns"

NOT_SWEPT: Mapping[str, str] = {
    "out": "is the folder of the sweep; each run gets one of its own in it",
    **dict.fromkeys(("resume", "overwrite", "cache_dir", "data_workers", "memory_check", "trust_remote_code"), _OF_THE_SWEEP),
    **dict.fromkeys(("data", "eval_data", "eval_fraction", "data_format", "columns", "on_bad_row"), _OF_THE_DATA),
    **dict.fromkeys(("chat_template", "template_args", "text_as", "max_length", "too_long", "score", "pairs_of_ranks"), _OF_THE_DATA),
    **dict.fromkeys(("model", "adapter", "reference", "sync_reference_every_steps", "sync_reference_weight"), _OF_THE_START),
    **dict.fromkeys(("load_in_4bit", "precision"), f"decides how the start and its reference are held and computed, {_APART}"),
    **dict.fromkeys(("samples", "sample_tokens", "kl_budget", "report", "report_to"), _OF_THE_NOTES),
    **dict.fromkeys(("save_every_minutes", "save_every_steps", "keep_checkpoints"), _OF_THE_NOTES),
}
"""Settings that cannot be swept, each with the reason as the end of a sentence."""

NO_HELD_OUT = (
    "eval_fraction: a sweep compares its runs on held-out examples, and nothing is held out: give eval_fraction (0.1 holds a tenth of "
    "the data out) or eval_data"
)

NOTHING_TO_COMPARE_ON = (
    "a sweep compares its runs on held-out examples, and eval_fraction can hold none of these out, because all open with the same text: "
    "give eval_data, and --overwrite for the same folder"
)

REFERENCE_MOVES = (
    "sync_reference_every_steps: a sweep compares margins, accuracy and KL of its runs, and with a reference that follows the policy each "
    "run would measure them from another one: leave it out, or make a run for each with prefopt train"
)


_ROUNDED_START = (
    "optim: adamw-bf16 starts from the model rounded to bf16, and so does its reference, which for the others is the model as it is: "
    "the runs' figures would not compare. Sweep adamw and adamw-8bit, or make a run for each with prefopt train"
)
_ROUNDED_BASE = (
    "lora_rank: 0 trains all weights, held in float32, while the base under an adapter is held in the run's precision, and with it the "
    "reference: the runs' figures would not compare. Sweep ranks above 0, or give precision float32"
)

OTHER_START: Mapping[str, tuple[Any, str]] = {"optim": ("adamw-bf16", _ROUNDED_START), "lora_rank": (0, _ROUNDED_BASE)}
"""Settings of which one value, beside others, would give its run another start: setting -> value, what is wrong with that."""


class SweepSettings(Settings):
    """What a sweep has beside the settings of its runs."""

    sweep: dict[str, list[Any]] = Setting(REQUIRED, help="Settings and the values that each is given.")
    max_runs: int = Setting(
        64, ge=1, help="The most runs that a sweep may come to: a grid grows quickly, and a slip of the keyboard should not take a week."
    )


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """A run of a sweep.

    Attributes:
        name: of its folder.
        values: of the settings that are swept.
        settings: all of them; `out` is the run's own folder.
    """

    name: str
    values: Mapping[str, Any]
    settings: RunSettings


@dataclass(frozen=True, slots=True)
class SweepPlan:
    """All runs of a sweep, in their order.

    Attributes:
        method: of all runs.
        swept: the settings that are swept -> their values; the last one changes fastest.
        runs: one per combination.
        out: the sweep's folder.
        resume, overwrite: as they were given.
    """

    method: type[Method]
    swept: Mapping[str, tuple[Any, ...]]
    runs: tuple[PlannedRun, ...]
    out: Path
    resume: bool
    overwrite: bool


def plan_sweep(
    method: str,
    sweep: Mapping[str, Sequence[Any]],
    values: Mapping[str, Any],
    *,
    source: str = "the settings",
    spelled: Mapping[str, str] | None = None,
    mistakes: Mapping[str, str] | None = None,
) -> SweepPlan:
    """All runs, checked before the first one begins.

    Args:
        method: name of the method.
        sweep: name of a setting -> its values, as text or already of the right type.
        values: the settings that all runs share, and `max_runs`.
        source: where they come from, for the error's first line.
        spelled: how the user wrote a name, where not as it is.
        mistakes: name -> what the caller already found wrong with it, reported with the others.

    Raises:
        ConfigError: names every mistake: a setting that is unknown or cannot be swept, each value that is wrong or given twice, what is
            wrong with the settings that all share, more runs than `max_runs`, nothing held out to compare them on.
    """
    kind, spelled, mistakes = settings_for(method_named(method)), spelled or {}, mistakes or {}
    shared = {name: value for name, value in values.items() if name not in mistakes and name not in SweepSettings.model_fields}
    most, lines = _most_runs(values, spelled)
    fit: dict[str, Sequence[Any]] = {}
    for name, given in sweep.items():
        if problem := _unfit(name, given, kind, values, spelled):
            lines.append(f"{printable(name)}: {problem}")
        else:
            fit[name] = given
    if not sweep and not mistakes:
        lines.append("nothing is swept: give a setting and its values, as beta=0.05,0.1,0.3")
    num = math.prod(len(given) for given in fit.values())
    if num > most:
        grid = " x ".join(f"{len(given)} of {name}" for name, given in fit.items())
        lines.append(
            f"{num:,} runs ({grid}), and max_runs is {most}. Each is a whole training run that leaves a model and checkpoints: sweep fewer "
            f"values, or allow so many with max_runs {num}"
        )
        fit = {name: given[:1] for name, given in fit.items()}
    runs, found = _checked(kind, shared, fit, spelled)
    lines += [line for line in found if line not in lines]
    lines += [f"{spelled.get(name, name)}: {message}" for name, message in mistakes.items()]
    if not lines:
        lines = _at_odds(runs, fit)
    if lines:
        raise ConfigError(report(lines, source))
    first = runs[0][1]
    swept = {name: tuple(dict.fromkeys(getattr(settings, name) for _, settings in runs)) for name in fit}
    out = first.out.expanduser()
    planned = []
    for _, settings in runs:
        own = {name: getattr(settings, name) for name in fit}
        name = folder_name(own)
        planned.append(PlannedRun(name, own, settings.model_copy(update={"out": out / name, "resume": False, "overwrite": False})))
    return SweepPlan(method_named(method), swept, tuple(planned), out, first.resume, first.overwrite)


def _most_runs(values: Mapping[str, Any], spelled: Mapping[str, str]) -> tuple[int, list[str]]:
    """`max_runs`, and what is wrong with it."""
    given = {name: value for name, value in values.items() if name == "max_runs"}
    try:
        return SweepSettings.model_validate({"sweep": {}, **given}).max_runs, []
    except ValidationError as error:
        most: int = SweepSettings.model_fields["max_runs"].default
        return most, [describe(detail, SweepSettings, spelled) for detail in error.errors(include_url=False)]


def _unfit(name: str, given: Any, kind: type[RunSettings], values: Mapping[str, Any], spelled: Mapping[str, str]) -> str:
    """Why a setting cannot be swept over these values, as the end of a sentence; empty where it can."""
    if name not in kind.model_fields:
        return f"no such setting{nearest(name, (other for other in kind.model_fields if other not in NOT_SWEPT))}"
    if reason := _OF_THE_DATA if name in readings(kind) else NOT_SWEPT.get(name):
        return f"cannot be swept: it {reason}"
    if takes_several(kind.model_fields[name]):
        return "cannot be swept: it takes several values in one run. Make a run for each with prefopt train"
    if name == "seed" and not values.get("eval_data"):
        return "cannot be swept beside eval_fraction, because it also draws which examples are held out: give eval_data"
    if not isinstance(given, list | tuple) or not given:
        return f"needs a list of values, as [0.05, 0.1] (given: {shown(given)})"
    if any(isinstance(value, str) and not value.strip() for value in given):
        return f"one of its values is empty (given: {', '.join(map(str, given))})"
    if name in values:
        return f"is swept, and {spelled.get(name, name)} gives it a value as well: leave one of the two out"
    return ""


def takes_several(info: FieldInfo) -> bool:
    """Whether a setting is a list or pairs."""
    return any(get_origin(part) in (list, dict) for part in (info.annotation, *get_args(info.annotation)))


Checked = list[tuple[dict[str, Any], RunSettings]]


def _checked(
    kind: type[RunSettings], shared: Mapping[str, Any], fit: Mapping[str, Sequence[Any]], spelled: Mapping[str, str]
) -> tuple[Checked, list[str]]:
    """The settings of every combination, and what is wrong with any of them, once each."""
    runs: Checked = []
    lines: dict[str, None] = {}
    paths = {**spelled, **{name: name for name in fit}}  # a swept value was not given as a flag
    for combination in product(*fit.values()):
        own = {name: value.strip() if isinstance(value, str) else value for name, value in zip(fit, combination, strict=True)}
        try:
            runs.append((own, kind.model_validate({**shared, **own})))
        except ValidationError as error:
            lines.update(dict.fromkeys(describe(detail, kind, paths) for detail in error.errors(include_url=False)))
    return runs, list(lines)


def _at_odds(runs: Checked, fit: Mapping[str, Sequence[Any]]) -> list[str]:
    """What is wrong with settings each of which is right."""
    settings = runs[0][1]
    lines = []
    for name in fit:
        seen: dict[Any, str] = {}
        for own, checked in runs:
            text, value = str(own[name]), getattr(checked, name)
            if seen.setdefault(value, text) != text:
                lines.append(f"{name}: {seen[value]} and {text} are the same value: give it once")
        if len(set(map(str, fit[name]))) < len(fit[name]):
            twice = next(str(value) for place, value in enumerate(fit[name]) if str(value) in map(str, fit[name][:place]))
            lines.append(f"{name}: {twice.strip()} is given twice: give it once")
    for name, (value, problem) in OTHER_START.items():
        found = {getattr(checked, name) for _, checked in runs}
        if value in found and len(found) > 1 and not (name == "lora_rank" and settings.precision == "float32"):
            lines.append(problem)
    if not settings.eval_data and not settings.eval_fraction:
        lines.append(NO_HELD_OUT)
    if reference_settings(settings).sync_reference_every_steps is not None:
        lines.append(REFERENCE_MOVES)
    if "-" in (*settings.data, *settings.eval_data):
        lines.append("data: standard input (-) can be read once, and every run of a sweep reads it: put it into a file")
    return list(dict.fromkeys(lines))


def folder_name(values: Mapping[str, Any]) -> str:
    """`beta-0.05_learning-rate-1e-6`: of the folder of the run with these values."""
    parts = ((name.replace("_", "-"), re.sub(r"[^\w.+-]", "-", setting(value))) for name, value in values.items())
    return "_".join(f"{name}-{value}" for name, value in parts)
