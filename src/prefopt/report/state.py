"""Where a run stands, from what its files say and whether its process is there."""

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal

from prefopt.report.record import RunRecord
from prefopt.report.text import duration, integer, moment

StateName = Literal["running", "finished", "stopped", "failed", "broken off", "unknown"]

SILENT = timedelta(hours=1)
"""A run that says it is going and has written nothing for so long is taken for dead: its process number may be another's by now.
Steps that last longer than this are looked at against the time that steps took before."""


@dataclass(frozen=True, slots=True)
class RunState:
    """Where a run stands.

    Attributes:
        name: of the state; `broken off` is a run that ended without a word, `unknown` one whose files do not say.
        step, num_steps: optimizer steps done, and those of the whole run; None where no file says how many.
        message: what the run said of its end; empty where it said nothing.
        started, updated: the first and the last sign of life.
    """

    name: StateName
    step: int
    num_steps: int | None
    message: str = ""
    started: datetime | None = None
    updated: datetime | None = None

    @property
    def progress(self) -> str:
        """`step 34 of 101`."""
        return f"step {self.step:,}" + (f" of {self.num_steps:,}" if self.num_steps else "")

    @property
    def has_ended(self) -> bool:
        """Whether no more steps are to be expected."""
        return self.name != "running"


def run_state(record: RunRecord, *, now: datetime, is_alive: Callable[[int], bool]) -> RunState:
    """Where the run stands.

    Args:
        record: of the run.
        now: with its zone.
        is_alive: whether there is a process of that number.
    """
    status = record.status
    started = moment(status.get("started")) or moment(record.manifest.get("started"))
    signs = [moment(status.get("updated")), *last_written(record)]
    said = status.get("state")
    if said != "running" and signs[0] is not None:
        signs = signs[:1]  # files that were copied are younger than the run
    updated = max((sign for sign in signs if sign is not None), default=None)
    num_steps = integer(status.get("num_steps")) or integer(record.resolved.get("num_steps")) or integer(record.summary.get("steps"))
    step = record.metrics.last_step or integer(status.get("step")) or integer(record.summary.get("steps")) or 0

    def state(name: StateName, message: str = "") -> RunState:
        return RunState(name, step, num_steps, message, started, updated)

    message = str(status.get("message") or "")
    if said == "running":
        pid = integer(status.get("pid"))
        elsewhere = record.host not in ("", platform.node())  # its processes cannot be seen from here
        if pid is not None and not elsewhere and not is_alive(pid):
            return state("broken off", f"process {pid} is no longer there")
        if updated is not None and now - updated > max(SILENT, 10 * longest_step(record)):
            return state("broken off", f"nothing was written for {duration((now - updated).total_seconds())}")
        return state("running", message)
    if said in ("finished", "stopped", "failed"):
        return state(said, message)
    if record.summary:
        return state("finished")
    return state("unknown", "no file says whether it goes on")


def last_written(record: RunRecord) -> list[datetime]:
    """When the files that grow with the run were last written."""
    found = []
    for path in (record.files.metrics, record.files.samples, record.files.held_out, record.files.summary):
        try:
            found.append(datetime.fromtimestamp(path.stat().st_mtime, UTC))
        except (OSError, OverflowError, ValueError):
            continue
    return found


def longest_step(record: RunRecord) -> timedelta:
    """The time of the longest step so far."""
    return timedelta(seconds=min(max(record.metrics.curve("seconds").values, default=0.0), timedelta(days=30).total_seconds()))


def process_is_alive(pid: int) -> bool:
    """Whether there is a process of that number on this machine."""
    if os.name != "posix":
        return True  # asking would end it there; what was last written has to tell
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return pid > 0
