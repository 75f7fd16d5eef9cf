"""Ctrl-C and SIGTERM: finish the step, save, say how to go on. A second Ctrl-C stops at once."""

import signal
import threading
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

    def agreed(self, processes: Processes) -> bool:
        """Whether any process was asked; all get the same answer."""
        if processes.count == 1:
            return self.asked
        return bool(processes.add_up(torch.tensor(float(self.asked), device=processes.device)).item() > 0)


@contextmanager
def stop_on_signals(narrator: Narrator) -> Iterator[StopRequest]:
    """Turns the first SIGINT or SIGTERM into a request; the handlers before are put back at the end."""
    request = StopRequest()

    def ask(number: int, _frame: FrameType | None) -> None:
        if request.asked:
            raise KeyboardInterrupt
        request.asked = True
        with suppress(RuntimeError):  # the signal came while the same file was being written to
            narrator.say(f"{signal.Signals(number).name}: the step is finished and saved, then the run stops (again: stop at once)")

    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield request
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
