"""What becomes of a run when one of its processes dies, hangs or fails: the others stop within a minute and say why.

Without it they would wait: a collective operation on GPUs hangs until its timeout when a process has died, and one on a CPU
when a process stands still. Each process has a helper (`lifeline_helper.py`) that knows of the others. When it says that one
is gone, the process leaves by the error that its next collective gives, or, where that hangs, by force.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import Any

import torch.distributed as dist

from prefopt.errors import PrefoptError, RunError, RunStopped

BEAT_S = 2.0
"""Between two signs of life that helpers give each other."""

SILENT_S = 30.0
"""Without a sign of life after which a machine counts as lost. Helpers do nothing else, so that only a machine or network that
stands still is silent for so long; one that was asleep itself begins to count anew."""

FROZEN_S = 15.0
"""After which a process that was stopped by a signal (kill -STOP, Ctrl-Z) counts as hanging."""

LEAVE_S = 10.0
"""What a process has to leave by itself when another one is gone. After that it is ended: it hangs in a collective."""

SAVE_S = 600.0
"""The same for a process that is writing a checkpoint or a model, which should be whole."""

WORD_S = 5.0
"""How long a process whose collective broke waits to hear which other process is gone."""

COMMUNICATION = ("gloo", "nccl", "process group", "processgroup", "connection closed by peer", "connection reset by peer", "broken pipe")
"""Words in errors of torch's collectives, many of which are plain RuntimeErrors."""


@dataclass(frozen=True, slots=True)
class End:
    """Why the run has ended for this process.

    Attributes:
        rank: the process that is gone.
        why: `gone` (it died), `frozen` (it was stopped by a signal), `silent` (its machine does not answer), `failed`.
        text: the message of its error, where it failed.
    """

    rank: int
    why: str
    text: str

    def sentence(self, count: int) -> str:
        """What happened, for people."""
        who = f"process {self.rank} of {count}"
        if self.why == "failed":
            return f"{who} failed, so this one stops too: {self.text}"
        what = {
            "gone": "is gone: it was killed, or its memory ran out",
            "frozen": f"has stood still for {FROZEN_S:.0f} seconds: a signal stopped it",
            "silent": f"has not been heard of for {SILENT_S:.0f} seconds: its machine stands still, or the network between them",
        }
        return f"{who} {what[self.why]}. So this one stops too."


class OtherGone(RunError):
    """Another process of the run is gone."""


class Lifeline:
    """The tie of this process to the others.

    Args:
        rank, count: of this process, and how many there are.
        local_rank: of this process on its machine.

    Attributes:
        advice: asked for the last sentence of an error: what is left of the run, and how to go on.
        at_end: called with the error when the process is ended by force.
    """

    def __init__(self, rank: int, count: int, local_rank: int) -> None:
        self.rank, self.count, self.local_rank = rank, count, local_rank
        self.advice: Callable[[], str] = lambda: ""
        self.at_end: Callable[[RunError], None] = lambda error: None
        self.end: End | None = None
        self.writing = threading.Lock()
        self._helper: subprocess.Popen[bytes] | None = None
        self._listener: threading.Thread | None = None
        self._heard, self._left = threading.Event(), threading.Event()

    def start(self, post: Callable[[str], None], read: Callable[[], str], host: str) -> str | None:
        """Begin to watch.

        Args:
            post: process 0 hands the address of its helper to the others.
            read: they read it.
            host: the machine of process 0.

        Returns:
            why it cannot be; None where it can.
        """
        setting = {"rank": self.rank, "count": self.count, "host": host, "pid": os.getpid(), "port": 0, "token": token_hex(16)}
        setting |= {"beat_s": BEAT_S, "silent_s": SILENT_S, "frozen_s": FROZEN_S}
        if self.rank != 0:
            setting |= json.loads(read())
        try:
            # Isolated, and without site-packages: it starts in hundredths of a second, whatever the environment holds.
            command = [sys.executable, "-I", "-S", str(Path(__file__).with_name("lifeline_helper.py"))]
            self._helper = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0)
            self._tell(setting)
            answer = self._line()
        except OSError as error:
            answer = {"cannot": str(error)}
        if self.rank == 0:
            post(json.dumps({"port": answer.get("port", 0), "token": setting["token"]}))
        if "port" not in answer:
            return str(answer.get("cannot", "the helper process ended"))
        self._listener = threading.Thread(target=self._listen, args=(self._helper,), name="prefopt-lifeline", daemon=True)
        self._listener.start()
        return None

    def check(self) -> None:
        """Raise when the run has ended elsewhere; for whoever waits.

        Raises:
            OtherGone: another process is gone.
        """
        if self.end is not None:
            raise self._error(self.end)

    def explain(self, error: BaseException) -> BaseException:
        """What to raise in place of an error that ends this process, after telling the others. The one place where errors of
        collectives become errors of a run.
        """
        if isinstance(error, OtherGone):
            return error
        if isinstance(error, RunStopped):
            error.told = self.rank != 0  # all processes were asked
            return error
        if isinstance(error, SystemExit) and self._heard.wait(WORD_S) and self.end is not None:
            return self._error(self.end)  # a launcher ends those that are left when one has died
        if isinstance(error, PrefoptError) or not isinstance(error, Exception):
            return self._own(error)
        if self.end is None and not is_communication(error):
            return self._own(error)
        if self._heard.wait(WORD_S) and self.end is not None:
            return self._error(self.end)
        first_line = str(error).strip().split("\n")[0][:300]
        self._fail(f"its connection to the others broke ({first_line})")
        return RunError(f"the connection to the other processes of the run broke: {first_line}. {self.advice()}".strip())

    def close(self) -> None:
        """This process is done; that it ends now is no surprise to the others."""
        self._left.set()
        helper, self._helper = self._helper, None
        if helper is None:
            return
        assert helper.stdin is not None
        assert helper.stdout is not None
        with suppress(OSError):
            helper.stdin.write(b'{"say": "done"}\n')
        with suppress(OSError):
            helper.stdin.close()
        try:
            helper.wait(5)
        except subprocess.TimeoutExpired:
            helper.kill()
            helper.wait()
        if self._listener is not None:
            self._listener.join(5)
        helper.stdout.close()

    def _own(self, error: BaseException) -> BaseException:
        """An error of this process itself."""
        if isinstance(error, KeyboardInterrupt | SystemExit):
            self._fail("it was interrupted")
        elif isinstance(error, PrefoptError):
            self._fail(str(error))
            # Mistakes in settings and data are found by all processes; it is enough that the first one says so.
            if self.rank != 0 and self.end is None:
                self._heard.wait(2)
            if self.rank != 0 and self.end is not None and self.end.text == str(error):
                error.told = True
        else:
            self._fail(f"{type(error).__name__}: {error}")
        return error

    def _error(self, end: End) -> OtherGone:
        error = OtherGone(end.sentence(self.count) + ("" if end.why == "failed" else f" {self.advice()}").rstrip())
        first_left = 1 if end.rank == 0 else 0
        error.told = self.rank != first_left and self.local_rank != 0
        return error

    def _fail(self, text: str) -> None:
        self._tell({"say": "failed", "text": text[:4000]})

    def _tell(self, message: dict[str, Any]) -> None:
        if self._helper is not None and self._helper.stdin is not None:
            with suppress(OSError):
                self._helper.stdin.write(json.dumps(message).encode() + b"\n")

    def _line(self) -> dict[str, Any]:
        assert self._helper is not None
        assert self._helper.stdout is not None
        line = self._helper.stdout.readline()
        return json.loads(line) if line else {}

    def _listen(self, helper: "subprocess.Popen[bytes]") -> None:
        """The thread that hears the helper."""
        assert helper.stdout is not None
        for line in helper.stdout:
            message = json.loads(line)
            if message["say"] == "end" and self.end is None:
                self.end = End(message["rank"], message["why"], message["text"])
                self._heard.set()
                threading.Thread(target=self._leave, args=(self.end,), name="prefopt-leave", daemon=True).start()

    def _leave(self, end: End) -> None:
        """See to it that this process ends: by itself, or by force."""
        if dist.is_initialized() and dist.get_backend() == "nccl":
            # Frees a main thread that waits for the GPU. It may hang itself, and so has a thread of its own.
            threading.Thread(target=abort_collectives, name="prefopt-abort", daemon=True).start()
        if self._left.wait(LEAVE_S):
            return
        self.writing.acquire(timeout=SAVE_S)  # not got: whatever is written then hangs too
        if self._left.wait(1.0):
            return
        error = self._error(end)
        with suppress(Exception):
            self.at_end(error)
        if not error.told:
            os.write(2, f"prefopt: {error}\n".encode())
        os._exit(2)


def is_communication(error: Exception) -> bool:
    """Whether a collective, or the way to the other processes, broke."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and any(word in text for word in COMMUNICATION))


def abort_collectives() -> None:
    """Break off what waits on a GPU for processes that are gone."""
    from torch.distributed.distributed_c10d import _abort_process_group

    with suppress(Exception):
        _abort_process_group()


def wait_until(found: Callable[[], bool], check: Callable[[], None], *, longest_s: float | None = None) -> bool:
    """Wait as long as it takes, or `longest_s`; quick at first, lazy later.

    Args:
        found: whether the wait is over.
        check: raises when it never will be.

    Returns:
        whether it was found.
    """
    started, pause = time.monotonic(), 0.001
    while not found():
        check()
        if longest_s is not None and time.monotonic() - started > longest_s:
            return False
        time.sleep(pause)
        pause = min(0.1, pause * 1.3)
    return True
