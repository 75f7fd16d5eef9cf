"""A contestant's end of the line: it runs when it is told to, and measures what it ran.

A phase (the reference pass, the training) is cut into stretches. Before each the process says that it is ready and blocks on a
pipe, so it takes no processor while others run. Messages are JSON, one a line.

    contestant -> driver   ready {phase}, stretch {phase, seconds, ...}, facts {...}, failed {error}
    driver -> contestant   go, or the end of the pipe: leave
"""

import json
import os
import time
import traceback
from typing import Any

Facts = dict[str, Any]


class Turns:
    """The line to the driver.

    Args:
        read, write: file descriptors of the two pipes.
        began: when the process began, by `time.perf_counter`.
    """

    def __init__(self, read: int, write: int, began: float) -> None:
        self._orders = os.fdopen(read, encoding="utf-8")
        self._news = os.fdopen(write, "w", encoding="utf-8")
        self.began = began
        self.idle = 0.0
        """Seconds spent in stretches or waiting for one: what is left of the process's time is its start."""
        self.cuda = False
        self.gives_memory_back = False
        self._phase = ""
        self._since = 0.0

    def facts(self, **facts: Any) -> None:
        """Tell the driver something."""
        self._tell("facts", **facts)

    def failed(self, error: BaseException) -> None:
        """The last thing to tell."""
        lines = traceback.format_exception_only(error)
        self._tell("failed", error="".join(lines).strip())

    def enter(self, phase: str) -> None:
        """A phase begins: wait for the first turn."""
        self._phase = phase
        self._wait()

    def cut(self, **facts: Any) -> None:
        """A stretch ends and the phase goes on: tell how long it took, and wait for the next turn."""
        self.finish(**facts)
        self._wait()

    def finish(self, **facts: Any) -> None:
        """The last stretch of a phase ends; what follows counts as start."""
        self._synchronise()
        seconds = time.perf_counter() - self._since
        self.idle += seconds
        self._tell("stretch", phase=self._phase, seconds=seconds, **facts)

    @property
    def start_seconds(self) -> float:
        """Seconds of the process's life that were neither stretches nor waiting."""
        return time.perf_counter() - self.began - self.idle

    def _wait(self) -> None:
        self._synchronise()
        if self.cuda and self.gives_memory_back:
            import torch

            torch.cuda.empty_cache()  # the others need it
        arrived = time.perf_counter()
        self._tell("ready", phase=self._phase)
        if self._orders.readline().strip() != "go":
            self._news.close()
            os._exit(0)  # what a run does after its last block (saving, a report) is not measured
        self._since = time.perf_counter()
        self.idle += self._since - arrived

    def _synchronise(self) -> None:
        if self.cuda:
            import torch

            torch.cuda.synchronize()

    def _tell(self, kind: str, **content: Any) -> None:
        self._news.write(json.dumps({"kind": kind, **content}) + "\n")
        self._news.flush()


class Parts:
    """Cuts a pass over `total` items into about `wanted` stretches of like size.

    Args:
        turns: of the process.
        total: items.
        wanted: stretches, at most one per item.
    """

    def __init__(self, turns: Turns, total: int, wanted: int) -> None:
        self.turns, self.total = turns, total
        parts = max(1, min(wanted, total))
        self.ends = {round(total * part / parts) for part in range(1, parts)}
        self.done = 0

    def item(self) -> None:
        """One more is done; the end of the pass is the caller's to tell."""
        self.done += 1
        if self.done in self.ends and self.done < self.total:
            self.turns.cut()


def peak_memory(*, cuda: bool) -> Facts:
    """The most memory that was held at once, and what is held now, in bytes: the allocator's on a GPU, the process's elsewhere."""
    if cuda:
        import torch

        return {"peak": torch.cuda.max_memory_allocated(), "now": torch.cuda.memory_allocated()}
    return {"peak": status_bytes("VmHWM"), "now": status_bytes("VmRSS")}


def status_bytes(name: str) -> int:
    """A figure of /proc/self/status; 0 on systems without it."""
    try:
        with open("/proc/self/status", encoding="ascii") as lines:
            return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)
    except OSError:
        return 0
