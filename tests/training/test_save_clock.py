"""Checkpoints by the clock: often enough for whatever kills a run without asking, and without a trace in its numbers."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.training.crash_server import Blow, Server, flags
from tests.training.group_server import Server as Groups
from tests.training.runs import Asks, figures, run, weights

from prefopt.training import interrupt
from prefopt.training.group.processes import ALONE
from prefopt.training.interrupt import SaveClock, any_process
from prefopt.training.record.checkpoint import Checkpoints
from prefopt.training.settings import RunSettings


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, as the clock sees it."""
    found = [100.0]
    monkeypatch.setattr(interrupt.time, "monotonic", lambda: found[0])
    return found


def test_ten_minutes_after_the_last_one(now: list[float]):
    assert RunSettings.model_fields["save_every_minutes"].default == 10
    clock = SaveClock(10)
    now[0] += 599
    assert not clock.is_time()
    now[0] += 1
    assert clock.is_time()
    with clock.saving():
        now[0] += 2
    assert not clock.is_time()
    now[0] += 600
    assert clock.is_time()


def test_one_that_takes_long_comes_less_often(now: list[float]):
    """Two minutes of saving: the next one 40 minutes later."""
    clock = SaveClock(10)
    with clock.saving():
        now[0] += 120
    now[0] += 2399
    assert not clock.is_time()
    now[0] += 1
    assert clock.is_time()


def test_zero_is_never(now: list[float]):
    clock = SaveClock(0)
    now[0] += 1e9
    assert not clock.is_time()


def test_wishes_of_one_process_are_its_own():
    assert any_process(ALONE, False, True) == [False, True]


def test_no_number_depends_on_it(model_folder: Callable[..., Path], pairs: str, tmp_path: Path):
    seen: list[list[str]] = []

    def at(done: int) -> None:
        seen.append([path.name for path in Checkpoints(tmp_path / "often" / "checkpoints", keep=1).all()])

    often, never = tmp_path / "often", tmp_path / "never"
    run("dpo", model_folder(), pairs, often, save_every_minutes=1e-9, keep_checkpoints=9, narrator=Asks(at), eval_fraction=0.3)
    run("dpo", model_folder(), pairs, never, save_every_minutes=0, eval_fraction=0.3)
    assert seen[1][0] == "step-000001"  # before the second step's own
    assert [path.name for path in Checkpoints(never / "checkpoints", keep=1).all()] == [f"step-{len(seen):06d}"]
    assert figures(often) == figures(never)
    assert weights(often) == weights(never)


def test_a_kill_costs_what_came_since(server: Server, model_folder: Callable[..., Path], pairs: str, tmp_path: Path):
    out = tmp_path / "run"
    words = flags("dpo", model_folder(), pairs, out, save_every_minutes=1e-9)
    server.run(words, blow=Blow(r"open run/metrics\.jsonl", 4), code=-9)
    [*_, newest] = Checkpoints(out / "checkpoints", keep=1).all()
    assert newest.name in ("step-000001", "step-000002", "step-000003")
    assert "resumed from" in server.run([*words, "--resume"])
    run("dpo", model_folder(), pairs, tmp_path / "whole", epochs=3)
    assert figures(out) == figures(tmp_path / "whole")


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_several_processes_go_by_one_clock(groups: Groups, model_folder: Callable[..., Path], pairs: str, tmp_path: Path, parallel: str):
    """A checkpoint takes all of them: where each went by its own, one would wait for another for ever."""
    often, never = tmp_path / "often", tmp_path / "never"
    for out, minutes in ((often, 1e-9), (never, 0)):
        same = {"method": "dpo", "model": model_folder(), "data": pairs, "out": out, "cache_dir": tmp_path / "cache", "parallel": parallel}
        groups.run("train", save_every_minutes=minutes, keep_checkpoints=9, **same)
    assert len(Checkpoints(often / "checkpoints", keep=1).all()) > 1
    assert len(Checkpoints(never / "checkpoints", keep=1).all()) == 1
    assert figures(often) == figures(never)
    assert weights(often) == weights(never)
