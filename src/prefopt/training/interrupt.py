"""Ctrl-C, SIGTERM and the end of the terminal: finish the step, save, say how to go on. A second Ctrl-C stops at once.

A terminal that is closed, or a connection that breaks, sends SIGHUP, often twice: once from the kernel and once from the shell.
So it asks like the others and never counts as a second request. Under `nohup` it is ignored, and stays so.
"""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

import torch

from prefopt.training.narrator import Narrator
from prefopt.training.processes import Processes


class StopRequest:
    """Whether someone asked the run to stop."""

    def __init__(self) -> None:
        self.asked = False

    def ask(self) -> None:
        """Stop after this step."""
        self.asked = True

    def agreed(self, processes: Processes) -> bool:
        """Whether any process was asked; all get the same answer."""
        if processes.count == 1:
            return self.asked
        return bool(processes.add_up(torch.tensor(float(self.asked), device=processes.device)).item() > 0)


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
