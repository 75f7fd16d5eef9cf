"""The end of one process is the end of all, soon, and with a sentence; and nothing else is taken for an end."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.training.group_server import Outcome, Server
from tests.training.runs import losses, rows, run

from prefopt.errors import RunError
from prefopt.training.group import lifeline
from prefopt.training.group.lifeline import End, Lifeline, is_communication, wait_until


@pytest.fixture
def struck(groups: Server, model_folder: Callable[..., Path], pairs: str, tmp_path: Path) -> Callable[..., Outcome]:
    """struck("kill", rank=1, codes=[2, -9]): a run in whose fourth step something befalls a process; a checkpoint was saved after two."""

    def strike(do: str, *, rank: int | None = 1, codes: list[int], **more: Any) -> Outcome:
        same = {"method": "dpo", "model": model_folder(), "data": pairs, "out": tmp_path / "run", "cache_dir": tmp_path / "cache"}
        trouble = {"rank": rank, "step": 3, "do": do}
        outcome = groups.run("train", codes=codes, trouble=trouble, save_every_steps=2, timeout_s=50, samples=0, **same, **more)
        for said, code in zip(outcome.said, codes, strict=True):
            assert "Traceback" not in said or code == 70
            assert said.count("prefopt:") == (code == 2)  # one sentence
        return outcome

    return strike


@pytest.mark.parametrize(
    ("do", "rank", "what", "parallel"),
    [
        ("kill", 1, "is gone", "ddp"),
        ("kill", 0, "is gone", "ddp"),
        ("kill", 1, "is gone", "fsdp"),
        ("stop", 0, "has stood still", "ddp"),
        ("stop", 1, "has stood still", "fsdp"),
    ],
)
def test_a_process_that_dies_or_hangs_ends_the_others(struck, tmp_path: Path, do: str, rank: int, what: str, parallel: str):
    outcome = struck(do, rank=rank, codes=[2, -9] if rank == 1 else [-9, 2], parallel=parallel)
    said = outcome.said[1 - rank]
    assert f"process {rank} of 2 {what}" in said
    assert f"The last checkpoint in {tmp_path / 'run' / 'checkpoints'} is as it was" in said
    assert "--resume" in said
    assert max(outcome.seconds) < 40
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    if rank == 1:
        assert (status["state"], status["step"]) == ("failed", 3)
        assert "process 1 of 2" in status["message"]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000002"]


def test_a_run_whose_process_died_goes_on_as_if_nothing_had_been(
    struck, groups: Server, model_folder: Callable[..., Path], pairs: str, tmp_path: Path
):
    struck("kill", codes=[2, -9])
    same = {"cache_dir": tmp_path / "cache", "save_every_steps": 2, "samples": 0}
    groups.run("train", method="dpo", model=model_folder(), data=pairs, out=tmp_path / "run", resume=True, **same)
    run("dpo", model_folder(), pairs, tmp_path / "one", **same)
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)


def test_a_machine_that_stands_still_ends_the_others(struck, tmp_path: Path):
    """Nothing comes from there, not even a closed connection: the collective hangs, and the process is ended by force."""
    outcome = struck("stand still", codes=[2, -9])
    assert "process 1 of 2 has not been heard of" in outcome.said[0]
    assert outcome.seconds[0] < outcome.seconds[1]  # before the other one was woken up
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "failed"
    assert "process 1 of 2" in status["message"]


def test_within_a_minute_in_earnest():
    longest = max(lifeline.FROZEN_S, lifeline.SILENT_S) + lifeline.LEAVE_S + 2 * lifeline.BEAT_S
    assert longest < 60
    for why in ("frozen", "silent"):
        assert f"{getattr(lifeline, why.upper() + '_S'):.0f} seconds" in End(1, why, "").sentence(2)


@pytest.mark.parametrize(("do", "rank"), [("hold", 1), ("suspend", None)])
def test_a_process_that_is_busy_is_not_taken_for_dead(struck, tmp_path: Path, do: str, rank: int | None):
    """Nor are all of them when they stand still together, and go on. Both for longer than any of the lifeline's times."""
    outcome = struck(do, rank=rank, codes=[0, 0])
    assert outcome.said == ["", ""]
    assert max(outcome.seconds) > 5
    assert len(rows(tmp_path / "run")) == 6


def test_an_error_of_one_process_ends_the_others(struck):
    outcome = struck("data", codes=[2, 2])
    assert outcome.said[1] == "prefopt: row 7 is bad\n"
    assert outcome.said[0] == "prefopt: process 1 of 2 failed, so this one stops too: row 7 is bad\n"
    assert max(outcome.seconds) < 30


def test_a_bug_in_one_process_is_shown_where_it_is(struck):
    outcome = struck("bug", codes=[2, 70])
    assert "TypeError: this is a bug" in outcome.said[1]
    assert "process 1 of 2 failed, so this one stops too: TypeError: this is a bug" in outcome.said[0]


def test_a_full_disk_of_the_main_process_ends_the_others(struck, tmp_path: Path):
    outcome = struck("full disk", rank=0, codes=[2, 2])
    assert "cannot write the checkpoint" in outcome.said[0]
    assert "No space left on device" in outcome.said[0]
    assert "process 0 of 2 failed, so this one stops too: cannot write the checkpoint" in outcome.said[1]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000002"]


def test_one_that_is_asked_to_stop_stops_all(groups: Server, model_folder: Callable[..., Path], pairs: str, tmp_path: Path):
    same = {"method": "dpo", "model": model_folder(), "data": pairs, "out": tmp_path / "run", "cache_dir": tmp_path / "cache"}
    outcome = groups.run("train", codes=[2, 2], trouble={"rank": 1, "step": 3, "do": "interrupt"}, samples=0, **same)
    assert "stopped after step 4 of 6, as asked" in outcome.said[0]
    assert outcome.said[1] == ""
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000004"]


def test_a_mistake_that_all_find_is_told_once(groups: Server, pairs: str, tmp_path: Path):
    outcome = groups.run("train", codes=[2, 2], method="dpo", model="/no/such/model", data=pairs, out=tmp_path / "run")
    assert "no folder /no/such/model" in outcome.said[0]
    assert outcome.said[1] == ""


def test_one_that_writes_is_given_time_and_no_more(monkeypatch: pytest.MonkeyPatch):
    """A disk may hang for good; its process would keep its GPU."""
    ended: list[int] = []
    monkeypatch.setattr(lifeline.os, "_exit", ended.append)
    monkeypatch.setattr(lifeline, "LEAVE_S", 0.01)
    monkeypatch.setattr(lifeline, "SAVE_S", 0.3)
    line = Lifeline(0, 2, 0)
    began = time.monotonic()
    with line.writing:
        line._leave(End(1, "gone", ""))
    assert ended == [2]
    assert time.monotonic() - began > 0.3
    line.close()
    line._leave(End(1, "gone", ""))  # it has left by itself
    assert ended == [2]


def test_errors_of_collectives_are_told_from_others():
    assert is_communication(RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:31618"))
    assert is_communication(torch.distributed.DistBackendError("NCCL error"))
    assert not is_communication(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_communication(ValueError("gloo"))


def test_a_wait_ends_by_what_it_waits_for_by_an_error_or_by_its_time():
    answers = iter([False, False, True])
    assert wait_until(lambda: next(answers), lambda: None)
    assert not wait_until(lambda: False, lambda: None, longest_s=0.02)

    def gone() -> None:
        raise RunError("gone")

    with pytest.raises(RunError, match="gone"):
        wait_until(lambda: False, gone)


@pytest.fixture
def helper() -> Iterator[tuple["subprocess.Popen[bytes]", int]]:
    """The helper of process 0 of two, and the port at which it listens."""
    setting = {"rank": 0, "count": 2, "host": "", "port": 0, "token": "secret", "pid": os.getpid()}
    setting |= {"beat_s": 0.2, "silent_s": 30.0, "frozen_s": 30.0}
    command = [sys.executable, "-I", "-S", str(Path(lifeline.__file__).with_name("lifeline_helper.py"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(setting).encode() + b"\n")
        yield process, json.loads(process.stdout.readline())["port"]
        process.stdin.close()
        assert process.wait(10) == 0


def test_a_helper_listens_to_its_own_run_only(helper: tuple[Any, int]):
    process, port = helper

    def guest(line: bytes) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", port), timeout=10)
        connection.sendall(line)
        return connection

    for line in (b"{}\n{}\n", b"GET / HTTP/1.1\r\n\r\n", b'{"rank": 1, "token": "guessed"}\n', b"[1, 2]\n", b"x" * 200_000):
        with guest(line) as stranger, suppress(ConnectionResetError):  # with words unread
            assert stranger.recv(1) == b""  # hung up
    with guest(b'{"rank": 1, "token": "secret"}\n') as other:
        assert json.loads(other.makefile().readline()) == {"say": "beat"}
        other.sendall(b'{"say": "failed", "text": "a full disk"}\n')
        assert json.loads(process.stdout.readline()) == {"say": "end", "rank": 1, "why": "failed", "text": "a full disk"}


def test_a_connection_that_closes_without_a_farewell_is_a_process_that_is_gone(helper: tuple[Any, int]):
    process, port = helper
    with socket.create_connection(("127.0.0.1", port), timeout=10) as other:
        other.sendall(b'{"rank": 1, "token": "secret"}\n')
        assert other.makefile().readline()
    assert json.loads(process.stdout.readline()) == {"say": "end", "rank": 1, "why": "gone", "text": ""}


def test_a_farewell_makes_a_closed_connection_no_surprise(helper: tuple[Any, int]):
    process, port = helper
    with socket.create_connection(("127.0.0.1", port), timeout=10) as other:
        other.sendall(b'{"rank": 1, "token": "secret"}\n{"say": "done"}\n')
        assert other.makefile().readline()
    time.sleep(0.5)
    process.stdin.write(b'{"say": "done"}\n')
    process.stdin.close()
    assert process.stdout.read() == b""
