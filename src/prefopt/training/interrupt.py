"""Ctrl-C, SIGTERM and the end of the terminal: finish the step, save, say how to go on. A second Ctrl-C stops at once, and so does
the first one before there is a step.

A terminal that is closed, or a connection that breaks, sends SIGHUP, often twice: once from the kernel and once from the shell.
So it asks like the others and never counts as a second request. Under `nohup` it is ignored, and stays so.
"""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from types import FrameType

import torch

from prefopt.training.group.processes import Processes, raising_at_sigterm
from prefopt.training.terminal.narrator import Narrator

SAVE_SHARE = 20
"""Checkpoints that the clock asks for take at most one part in so many of a run's time: those of large models take minutes."""


class SaveClock:
    """Whether it is time for a checkpoint.

    Args:
        minutes: between two; 0: it never is.
    """

    def __init__(self, minutes: float) -> None:
        self.minutes = minutes
        self.since, self.last_s = time.monotonic(), 0.0

    @contextmanager
    def saving(self) -> Iterator[None]:
        """A checkpoint is written in the block, whoever asked for it: the time begins anew."""
        began = time.monotonic()
        yield
        self.since = time.monotonic()
        self.last_s = self.since - began

    def is_time(self) -> bool:
        """Whether the time is over."""
        return self.minutes > 0 and time.monotonic() - self.since >= max(60 * self.minutes, SAVE_SHARE * self.last_s)


class StopRequest:
    """Whether someone asked the run to stop."""

    def __init__(self) -> None:
        self.asked = False

    def ask(self) -> None:
        """Stop after this step."""
        self.asked = True


def any_process(processes: Processes, *wishes: bool) -> list[bool]:
    """Of each wish, whether any process has it; all get the same answer, in one exchange."""
    if processes.count == 1:
        return list(wishes)
    return [count > 0 for count in processes.add_up(torch.tensor(wishes, dtype=torch.float32, device=processes.device)).tolist()]


def stop_at_once() -> AbstractContextManager[None]:
    """SIGTERM is heard as Ctrl-C is, while there is no step to finish. Where several processes run, theirs take precedence."""
    return raising_at_sigterm(lambda _number: KeyboardInterrupt())


@contextmanager
def stop_on_signals(narrator: Narrator, request: StopRequest, *, grace_s: float = 0.0) -> Iterator[None]:
    """Turns the first SIGINT, SIGTERM or SIGHUP into a request; the handlers before are put back at the end.

    Args:
        narrator: says that it was heard.
        request: takes it.
        grace_s: a second signal counts after this time only. A launcher of processes hands Ctrl-C on to those who had it
            from the terminal already.
    """
    first: float | None = None

    def ask(number: int, _frame: FrameType | None) -> None:
        nonlocal first
        if first is not None and (number == signal.SIGHUP or time.monotonic() - first < grace_s):
            return
        if first is not None:
            raise KeyboardInterrupt
        first = time.monotonic()
        request.ask()
        with suppress(RuntimeError, OSError):  # the same file is being written to; the terminal is gone
            narrator.say(f"{signal.Signals(number).name}: the step is finished and saved, then the run stops (again: stop at once)")

    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return
    hangup = () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM, *hangup)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
