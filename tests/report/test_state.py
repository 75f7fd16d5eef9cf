"""Where a run stands: from what it said, and from whether its process is there."""

import json
import os
import platform
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from tests.report.made import make_run

from prefopt.report.record import read_run
from prefopt.report.state import RunState, process_is_alive, run_state

NO_PROCESS = 2**22 + 1
"""Larger than any process number that Linux gives."""


def state_of(run: Path, *, now: datetime | None = None, alive: bool = True, **status: Any) -> RunState:
    known = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps(known | status))
    return run_state(read_run(run), now=now or datetime.now(UTC), is_alive=lambda _: alive)


@pytest.mark.parametrize("name", ["finished", "stopped", "failed"])
def test_a_run_that_said_how_it_ended_is_believed(tmp_path: Path, name: str):
    state = state_of(make_run(tmp_path / "run", state=name, done=70, message="because"), alive=False)
    assert (state.name, state.message, state.progress) == (name, "because", "step 70 of 120")
    assert state.has_ended
    assert state.started == datetime(2026, 11, 21, 10, tzinfo=UTC)
    assert state.updated == datetime(2026, 11, 21, 10, 7, 12, tzinfo=UTC)


def test_a_run_whose_process_is_there_goes_on(tmp_path: Path):
    state = state_of(make_run(tmp_path / "run", state="running", done=50))
    assert (state.name, state.step, state.has_ended) == ("running", 50, False)


def test_a_run_whose_process_is_gone_ended_without_a_word(tmp_path: Path):
    state = state_of(make_run(tmp_path / "run", state="running", done=50, pid=NO_PROCESS), alive=False)
    assert (state.name, state.message) == ("broken off", f"process {NO_PROCESS} is no longer there")


def test_a_run_that_wrote_nothing_for_long_is_taken_for_dead_though_its_number_is_in_use(tmp_path: Path):
    run = make_run(tmp_path / "run", state="running", done=50)
    assert state_of(run, now=datetime.now(UTC) + timedelta(minutes=50)).name == "running"
    state = state_of(run, now=datetime.now(UTC) + timedelta(hours=3))
    assert state.name == "broken off"
    assert state.message.startswith("nothing was written for 3")


def test_slow_steps_are_no_sign_of_death(tmp_path: Path):
    run = make_run(tmp_path / "run", state="running", done=1)
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 0.7, "seconds": 1800}\n')
    assert state_of(run, now=datetime.now(UTC) + timedelta(hours=3)).name == "running"


def test_processes_of_another_machine_are_not_looked_for_here(tmp_path: Path):
    run = make_run(tmp_path / "run", state="running", done=50, pid=NO_PROCESS)
    (run / ".lock").write_text(json.dumps({"pid": NO_PROCESS, "host": "elsewhere"}))
    assert state_of(run, alive=False).name == "running"
    (run / ".lock").write_text(json.dumps({"pid": NO_PROCESS, "host": platform.node()}))
    assert state_of(run, alive=False).name == "broken off"


def test_folders_without_a_status_are_judged_by_their_summary(tmp_path: Path):
    run = make_run(tmp_path / "run")
    (run / "status.json").unlink()
    now = datetime.now(UTC)
    assert run_state(read_run(run), now=now, is_alive=process_is_alive).name == "finished"
    (run / "summary.json").unlink()
    state = run_state(read_run(run), now=now, is_alive=process_is_alive)
    assert (state.name, state.num_steps) == ("unknown", 120)


def test_processes_are_seen():
    assert process_is_alive(os.getpid())
    assert process_is_alive(1)  # another user's, where the tests do not run as root
    assert not process_is_alive(NO_PROCESS)
    assert not process_is_alive(10**30)
    assert not process_is_alive(0)
