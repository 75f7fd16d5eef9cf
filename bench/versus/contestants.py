"""Who takes part: names, what they stand for, and the settings in which they differ."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal

Side = Literal["prefopt", "trl"]


@dataclass(frozen=True, slots=True)
class Contestant:
    """One of those who take part.

    Attributes:
        name: on the command line.
        side: whose trainer it runs.
        says: what it is, for the table.
        settings: of prefopt's run or TRL's `DPOConfig`, where they are not those that all have.
        warm: begins with the reference values that `prefopt` left behind.
        workload: another workload than that of the run, from `NAME@WORKLOAD`; empty: the run's.
    """

    name: str
    side: Side
    says: str
    settings: dict[str, Any] = field(default_factory=dict)
    warm: bool = False
    workload: str = ""

    @property
    def label(self) -> str:
        """The name as it was given."""
        return f"{self.name}@{self.workload}" if self.workload else self.name

    @property
    def file_name(self) -> str:
        """The name as a folder's."""
        return self.label.replace("@", "-on-").replace(":", "-")


CONTESTANTS: dict[str, Contestant] = {
    entry.name: entry
    for entry in (
        Contestant("prefopt", "prefopt", "as it comes: reference computed once before training, and kept"),
        Contestant("prefopt-again", "prefopt", "the same in a second process: the noise"),
        Contestant("prefopt-warm", "prefopt", "reference values kept from an earlier run", warm=True),
        Contestant("prefopt-live", "prefopt", "reference computed in every step", {"reference_cache": False}),
        Contestant("prefopt-plain", "prefopt", "prompts not shared", {"sharing": "plain"}),
        Contestant("trl", "trl", "its defaults"),
        Contestant("trl-best", "trl", "reference before training, the fastest batch per pass", {"precompute_ref_log_probs": True}),
    )
}


class UsageError(Exception):
    """The command line asks for something that cannot be; says what can."""


def choose(names: str, given: Sequence[str], known_workloads: Sequence[str]) -> list[Contestant]:
    """The contestants of the command line.

    Args:
        names: separated by commas, each `NAME` or `NAME@WORKLOAD`.
        given: `NAME:setting=value`, for that contestant and those whose names begin with it and a dash.
        known_workloads: names of workloads, digits of `k4` and the like aside.

    Raises:
        UsageError: an unknown name, one given twice, a setting that is not of that form or for nobody, a warm one without the cold.
    """
    chosen: list[Contestant] = []
    for label in filter(None, (part.strip() for part in names.split(","))):
        name, _, workload = label.partition("@")
        if name not in CONTESTANTS:
            close = get_close_matches(name, CONTESTANTS, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise UsageError(f"{name}: no such contestant{hint}. There are {', '.join(CONTESTANTS)}.")
        if workload and workload not in known_workloads:
            raise UsageError(f"{label}: no such workload. There are {', '.join(known_workloads)}.")
        entry = CONTESTANTS[name]
        if any(other.label == label for other in chosen):
            raise UsageError(f"{label} is given twice; a second one of the same is prefopt-again.")
        chosen.append(Contestant(name, entry.side, entry.says, dict(entry.settings), entry.warm, workload))
    if not chosen:
        raise UsageError(f"there is no contestant. There are {', '.join(CONTESTANTS)}.")
    for entry in chosen:
        cold = "prefopt" + (f"@{entry.workload}" if entry.workload else "")
        if entry.warm and cold not in [other.label for other in chosen]:
            raise UsageError(f"{entry.label} starts from what {cold} keeps: name that one too.")
    add_settings(chosen, given)
    return chosen


def add_settings(chosen: Sequence[Contestant], given: Sequence[str]) -> None:
    """Put `NAME:setting=value` into the contestants that it is for; longer names win over shorter ones.

    Raises:
        UsageError: not of that form, or for nobody.
    """
    parsed = []
    for text in given:
        name, colon, rest = text.partition(":")
        setting, equals, value = rest.partition("=")
        if not (colon and equals and name and setting):
            raise UsageError(f"--set {text}: must be NAME:setting=value, for example prefopt:max_tokens=4096")
        parsed.append((name, setting.replace("-", "_"), value_of(value)))
    for name, setting, value in sorted(parsed, key=lambda entry: len(entry[0])):
        meant = [entry for entry in chosen if entry.name == name or entry.name.startswith(f"{name}-")]
        if not meant:
            raise UsageError(f"--set {name}:{setting}: no contestant is called {name}. Taking part: {', '.join(e.label for e in chosen)}.")
        for entry in meant:
            entry.settings[setting] = value


def value_of(text: str) -> Any:
    """A number, a switch, a list or an object as JSON has them; anything else is text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def divisors_to_try(batch_size: int, most: int = 64) -> list[int]:
    """Pairs per pass that divide the batch: the powers of two, the batch itself, none above `most`."""
    powers = [2**power for power in range(batch_size.bit_length()) if batch_size % 2**power == 0]
    return sorted({size for size in (*powers, batch_size) if size <= most})
