"""Two runs never share a folder, and a run that was killed keeps nobody out of its own."""

import errno
import fcntl
import json
import os
import platform
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.training.crash_server import Blow, Server, flags
from tests.training.runs import Asks, figures, losses, run

from prefopt.errors import RunError
from prefopt.training.record.folder import RunFolder
from prefopt.training.record.lock import Lock


def test_one_at_a_time(tmp_path: Path):
    first = Lock(tmp_path / ".lock")
    says = (
        rf"another run is going on in {tmp_path} \(process {os.getpid()} on {platform.node()}\). Wait for its end, stop it, or give another"
    )
    for _ in range(2):
        with pytest.raises(RunError, match=says):
            Lock(tmp_path / ".lock")
    first.release()
    assert list(tmp_path.iterdir()) == []
    second = Lock(tmp_path / ".lock")
    second.release()
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_a_killed_process_left_keeps_nobody_out(tmp_path: Path):
    (tmp_path / ".lock").write_text('{"pid": 1, "host": "elsewhere"}, which was longer than what is written now and must not show through')
    lock = Lock(tmp_path / ".lock")
    assert json.loads((tmp_path / ".lock").read_text()) == {"pid": os.getpid(), "host": platform.node()}
    lock.release()


def test_a_lock_without_a_name_on_it(tmp_path: Path):
    held = Lock(tmp_path / ".lock")
    (tmp_path / ".lock").write_text("")
    with pytest.raises(RunError, match=rf"another run is going on in {tmp_path}\. Wait"):
        Lock(tmp_path / ".lock")
    held.release()


def test_a_file_that_goes_while_it_is_being_locked_is_not_taken_for_the_folder_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The one who held it removes it between our opening and our locking it: ours would be a lock that nobody else can see."""
    lock_file, calls = fcntl.flock, []

    def slow(descriptor: int, operation: int) -> None:
        calls.append(descriptor)
        if len(calls) == 1:
            (tmp_path / ".lock").unlink()
        lock_file(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", slow)
    held = Lock(tmp_path / ".lock")
    assert len(calls) == 2
    monkeypatch.undo()
    with pytest.raises(RunError, match="another run is going on"):
        Lock(tmp_path / ".lock")
    held.release()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_disk_without_locks_costs_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int):
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.warns(UserWarning, match=rf"{tmp_path} is on a disk that has no locks .*: see to it that no other run uses it"):
        lock = Lock(tmp_path / ".lock")
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_cannot_be_written_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(RunError, match=rf"cannot make the folder {tmp_path}/run: Input/output error"):
        RunFolder(tmp_path / "run").prepare(resume=False, overwrite=False)


def test_whoever_has_it_is_alone(tmp_path: Path):
    """Two threads that take and let go of it as fast as they can; the file comes and goes all the time."""
    barrier, inside, errors = threading.Barrier(2), threading.Lock(), []

    def work() -> None:
        barrier.wait()
        for _ in range(300):
            try:
                lock = Lock(tmp_path / ".lock")
            except RunError:
                continue
            if not inside.acquire(blocking=False):
                errors.append("two at once")
            else:
                time.sleep(0)  # the other one's turn
                inside.release()
            lock.release()

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_the_same_command_twice(server: Server, model_folder: Callable[..., Path], pairs: str, tmp_path: Path):
    """The second one, however it is started, says that the first is going on, and changes nothing."""
    out = tmp_path / "run"
    words = flags("dpo", model_folder(), pairs, out, save_every_steps=1)
    first = server.start(words, blow=Blow(r"open run/metrics\.jsonl", 5, "wait"))
    while not (tmp_path / "struck").exists():
        assert first.poll() is None, first.said
        time.sleep(0.01)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for more in ([], ["--resume"], ["--overwrite"]):
        said = server.run([*words, *more], code=2)
        assert said == (
            f"prefopt: another run is going on in {out} (process {first.pid} on {platform.node()}). Wait for its end, stop it, or give "
            "another folder as out.\n"
        )
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    (tmp_path / "go").touch()
    assert first.wait() == 0
    assert not (out / ".lock").exists()
    run("dpo", model_folder(), pairs, tmp_path / "alone", epochs=3)
    assert figures(out) == figures(tmp_path / "alone")


def test_two_that_start_at_the_same_moment(server: Server, model_folder: Callable[..., Path], pairs: str, tmp_path: Path):
    words = flags("dpo", model_folder(), pairs, tmp_path / "run")
    both = [server.start(words, blow=Blow(r"open run/metrics\.jsonl", 1, "pause")) for _ in range(2)]
    codes = [child.wait() for child in both]
    assert sorted(codes) == [0, 2]
    refused = both[codes.index(2)].said
    assert refused.startswith("prefopt: another run is going on in")
    assert len(losses(tmp_path / "run")) == 9


def test_the_folder_is_free_after_an_error_and_after_the_end(model_folder: Callable[..., Path], pairs: str, tmp_path: Path):
    out = tmp_path / "run"
    with pytest.raises(RunError, match="max_tokens"):
        run("dpo", model_folder(), pairs, out, max_tokens=16)
    assert list(out.iterdir()) == []
    seen: list[bool] = []
    run("dpo", model_folder(), pairs, out, narrator=Asks(lambda done: seen.append((out / ".lock").exists())))
    assert seen == [True] * 6
    assert not (out / ".lock").exists()
    with pytest.raises(RunError, match="is not empty"):
        run("dpo", model_folder(), pairs, out)
    assert not (out / ".lock").exists()
