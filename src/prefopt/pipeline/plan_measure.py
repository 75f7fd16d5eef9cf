"""A plan against the run itself: a few steps of what was chosen, in a process of their own."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from prefopt.errors import RunError
from prefopt.pipeline.plan_settings import PlanSettings

if TYPE_CHECKING:
    from prefopt.pipeline.plan_words import Plan

STEPS = 3
"""The first of them warms up."""

QUIET: dict[str, Any] = {"samples": 0, "report": False, "memory_check": False, "save_every_minutes": 0}
"""What would take time or memory beside the steps."""

CHILD = """
import json, sys, time
from prefopt.machine import prepare_environment
prepare_environment()
from contextlib import contextmanager
from prefopt.training.run import train_with
from prefopt.training.terminal.narrator import Quiet
class Clock(Quiet):
    reference = 0.0
    @contextmanager
    def progress(self, what, total, done=0):
        began = time.perf_counter()
        with super().progress(what, total, done) as ticker:
            yield ticker
        if what == "reference":
            self.reference = time.perf_counter() - began
clock = Clock()
train_with(sys.argv[1], narrator=clock, **json.loads(sys.argv[2]))
print(clock.reference)
"""
"""The run that is measured: a process of its own, because what a process has held at most is known of all of it only."""


def measure(found: "Plan", settings: PlanSettings, say: Callable[[str], object]) -> tuple[float, float]:
    """Run steps of the chosen way, and say how far the plan was off.

    Args:
        found: with a way that was chosen.
        settings: of the plan.
        say: takes the words.

    Returns:
        predicted by measured, of memory and of a step's seconds; the first step is left out, because it warms up.

    Raises:
        RunError: the run failed, or it would take several GPUs; says how.
    """
    chosen = found.chosen
    assert chosen is not None
    if chosen.fit.gpus > 1:
        raise RunError(f"what was chosen runs on {chosen.fit.gpus} GPUs: measure it with its own command and --max-steps {STEPS}")
    with tempfile.TemporaryDirectory() as folder:
        rows, _ = run_steps({**found.values, "out": f"{folder}/run"}, settings.method, STEPS)
    peak, seconds = rows[-1]["memory_gb"] * 1e9, mean(row["seconds"] for row in rows[1:])
    memory = (chosen.fit.estimate.total + found.process) / peak
    time = chosen.times.step / seconds if chosen.times is not None else float("nan")
    say(
        f"measured: {STEPS} steps, peak memory {peak / 1e9:.2f} GB, {seconds:.2f} s per step; predicted / measured {memory:.2f}, {time:.2f}"
    )
    return memory, time


def run_steps(values: dict[str, Any], method: str, steps: int) -> tuple[list[dict[str, float]], float]:
    """Rows of metrics of a run's first steps, and the seconds of its reference pass.

    Raises:
        RunError: it failed.
    """
    given = {**{name: value for name, value in values.items() if name != "epochs"}, **QUIET, "max_steps": steps}
    command = [sys.executable, "-c", CHILD, method, json.dumps(given, default=str)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RunError(f"the run that was to be measured failed: {done.stderr.strip()[-1500:]}")
    lines = (Path(values["out"]) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines], float(done.stdout.split()[-1])
