"""A plan in words: the table of ways, why one is chosen, and what runs it."""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefopt.config import to_yaml
from prefopt.data.settings import DataSettings
from prefopt.errors import PrefoptError
from prefopt.models.quantise import INSTALL
from prefopt.pipeline.plan_fit import Fit
from prefopt.pipeline.plan_settings import PlanSettings
from prefopt.training.memory.estimate import size
from prefopt.training.terminal.shown import clock


@dataclass(frozen=True, slots=True)
class Times:
    """How long a way of training takes, in seconds.

    Attributes:
        step: an optimizer step.
        reference: the reference's values of all examples, once before training; 0: there is none, or it runs in every step.
        epoch: the steps of one pass over the examples.
        run: reference and all steps; not the start, evaluations and saving.
        is_measured: from a probe of this machine; else from a rate that was given.
        without: what takes time besides and is in none of these figures, in words.
    """

    step: float
    reference: float
    epoch: float
    run: float
    is_measured: bool
    without: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Way:
    """A way of training: what it is called, how it fits, and how long it takes; None: not known."""

    name: str
    fit: Fit
    times: Times | None


@dataclass(frozen=True, slots=True)
class Plan:
    """What was found.

    Attributes:
        ways: all of them.
        chosen: the one that is proposed; None: nothing fits.
        room: bytes that there are for a process; where: of what memory, in words.
        process: bytes of Python and its libraries, which a process on a CPU holds besides; 0 on a GPU.
        command: that runs the chosen way.
        values: its settings, as YAML has them.
    """

    ways: tuple[Way, ...]
    chosen: Way | None
    room: int
    where: str
    process: int
    command: str = ""
    values: dict[str, Any] = field(default_factory=dict)


def table(ways: Sequence[Way], taken: int) -> list[str]:
    """The ways, one per line.

    Args:
        ways: all that were looked at.
        taken: bytes that a process takes beside what is estimated.
    """
    rows: list[tuple[str, ...]] = [("", "peak memory", "fits", "step", "reference", "epoch", "run", "with")]
    for way in ways:
        times = way.times
        more = "> " if times is not None and times.without else ""
        shown = ["?"] * 4 if times is None else [more + _seconds(value) for value in (times.step, times.reference, times.epoch, times.run)]
        fits = ("yes" if way.fit.gpus == 1 else f"on {way.fit.gpus} GPUs") if way.fit.fits else "no"
        rows.append((way.name, size(way.fit.estimate.total + taken), fits, *shown, _in_words(way.fit)))
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    without = dict.fromkeys(what for way in ways if way.times is not None for what in way.times.without)
    return [*lines, *(f"> longer than that: {what}" for what in without)]


def _seconds(value: float) -> str:
    return f"{value:.2g} s" if value < 60 else clock(value)


def _in_words(fit: Fit) -> str:
    return ", ".join(f"{name} {_plain(value)}" for name, value in fit.changes.items()) or "-"


def why(chosen: Way, ways: Sequence[Way]) -> str:
    """Why none of the ways before it."""
    before = ways[: list(ways).index(chosen)]
    if not before:
        return "which trains all weights, and fits" if chosen.name == "full" else "which fits"
    no_room = [way.name for way in before if not way.fit.fits]
    reasons = [f"for {' and '.join(no_room)} there is no room"] if no_room else []
    if len(no_room) < len(before):
        missing = " and ".join(way.name for way in before if way.fit.fits)
        reasons.append(f"for {missing} the library bitsandbytes is not installed ({INSTALL})")
    return f"because {', and '.join(reasons)}"


def values_of(settings: PlanSettings, way: Way, *, is_adapter: bool) -> dict[str, Any]:
    """The chosen settings, without those that are as they would be anyway."""
    given = {name: getattr(settings, name) for name in settings.model_fields_set & DataSettings.model_fields.keys() - {"data"}}
    values: dict[str, Any] = {"model": settings.model, "data": settings.data or ["FILE"], "out": "runs/plan"}
    for name in ("batch_size", "epochs", "precision", "sharing", "max_tokens", "trust_remote_code"):
        if name in settings.model_fields_set:
            values[name] = getattr(settings, name)
    if not is_adapter and way.fit.settings.lora_rank:
        values["lora_rank"] = way.fit.settings.lora_rank
    if way.fit.settings.load_in_4bit:
        values["load_in_4bit"] = True
    if settings.device != "auto":
        values["device"] = settings.device
    return {**values, **given, **way.fit.changes}


def command_of(method: str, values: dict[str, Any], gpus: int) -> str:
    """The command line that runs it."""
    launcher = f"torchrun --nproc-per-node {gpus} -m prefopt" if gpus > 1 else "prefopt"
    words = [*launcher.split(), "train", method]
    for name, value in values.items():
        words.append(f"--{name.replace('_', '-')}")
        if isinstance(value, dict):
            words += [f"{key}={own}" for key, own in value.items()]
        elif value is not True:
            words += [str(own) for own in value] if isinstance(value, list) else [_plain(value)]
    return shlex.join(words)


def _plain(value: Any) -> str:
    return ("on" if value else "off") if isinstance(value, bool) else str(value)


def write(path: Path, method: str, values: dict[str, Any], say: Callable[[str], object]) -> None:
    """The settings as YAML.

    Raises:
        PrefoptError: the file cannot be written.
    """
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
    try:
        path.expanduser().write_text(to_yaml({"method": method, **plain}), encoding="utf-8")
    except OSError as error:
        raise PrefoptError(f"cannot write {path}: {error.strerror}. Give another path as --write.") from None
    say(f"settings: {path} (prefopt train --config {path})")
