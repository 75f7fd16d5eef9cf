"""Groups of processes as a launcher would start them, without the seconds that imports take: they are forked from a process that
has imported everything and run nothing.

A test asks for a function of `group_scenarios.py`, its arguments, and how many processes; it gets what each of them returned,
its exit code, and what it said. Errors end a process as they end the command line.
"""

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Outcome:
    """What became of a group.

    Attributes:
        results: what each process returned; None for one that did not return.
        codes: exit codes; negative: the signal that ended it.
        said: what each wrote to standard error.
        seconds: from the start to each one's end.
    """

    results: list[Any]
    codes: list[int]
    said: list[str]
    seconds: list[float]


class Server:
    """The process that forks; the test's end of it."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process

    def run(self, scenario: str, *, count: int = 2, codes: list[int] | None = None, timeout_s: float = 120.0, **arguments: Any) -> Outcome:
        """A group of processes to its end; all must end with 0, or with the codes."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        asked = {"scenario": scenario, "count": count, "timeout_s": timeout_s, "arguments": arguments}
        self.process.stdin.write(json.dumps(asked, default=str) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, "the server is gone"
        outcome = Outcome(**json.loads(line))
        assert outcome.codes == (codes or [0] * count), "\n".join([str(outcome.codes), *outcome.said])
        return outcome


@contextmanager
def serving() -> Iterator[Server]:
    """A server, until the end of the block."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    command = [sys.executable, "-W", "error::UserWarning:prefopt", __file__]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT) as process:
        try:
            yield Server(process)
        finally:
            process.stdin.close()  # type: ignore[union-attr]
            process.wait(30)


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


# What follows runs in the server and in its children.


def serve() -> None:
    """Answer questions until there are no more."""
    scenarios = importlib.import_module("tests.training.group_scenarios")
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(answer(scenarios, asked)), flush=True)


def answer(scenarios: Any, asked: dict[str, Any]) -> dict[str, Any]:
    """Start a group, wait for it, and read what it left."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        files = [(Path(folder) / f"{rank}.json", Path(folder) / f"{rank}.log") for rank in range(asked["count"])]
        started = time.monotonic()
        pids = [fork(scenarios, asked, rank, port, *files[rank]) for rank in range(asked["count"])]
        codes, seconds = wait_for(pids, asked["timeout_s"], started)
        return {
            "results": [json.loads(result.read_text()) if result.is_file() else None for result, _ in files],
            "codes": codes,
            "said": [log.read_text() for _, log in files],
            "seconds": seconds,
        }


def wait_for(pids: list[int], timeout_s: float, started: float) -> tuple[list[int], list[float]]:
    """Exit codes and times; those that are left after the time are killed, which shows as -9 after it."""
    codes: dict[int, int] = {}
    seconds: dict[int, float] = {}
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes and (found := os.waitpid(pid, os.WNOHANG))[0]:
                codes[pid], seconds[pid] = os.waitstatus_to_exitcode(found[1]), round(time.monotonic() - started, 2)
            elif pid not in codes and time.monotonic() - started > timeout_s:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[pid] for pid in pids], [seconds[pid] for pid in pids]


def fork(scenarios: Any, asked: dict[str, Any], rank: int, port: int, result: Path, log: Path) -> int:
    """One process of the group."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    code = 70
    import faulthandler

    try:
        written = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        null = os.open(os.devnull, os.O_RDWR)
        for source, target in ((null, 0), (null, 1), (written, 2)):
            os.dup2(source, target)
        faulthandler.enable()
        launcher = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": asked["count"], "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        if asked["count"] > 1:
            os.environ.update({name: str(value) for name, value in launcher.items()})
        code = scenarios.play(asked["scenario"], rank, asked["arguments"], result)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
