"""A small process beside each process of a run: it tells the others when its own one dies, stops moving, or fails.

It is started by `lifeline.py` as a file of its own, with Python's standard library only. A process of its own, because a
thread would not do: writing a large file or parsing one holds Python's lock for minutes, and a thread that cannot speak for
minutes looks dead. This one always can, and what it watches is the operating system's word: the pipe from the process that it
belongs to closes when that one dies, however it dies, and the system says whether it is stopped.

The helper of process 0 listens; the others connect to it. All speak in lines of JSON:

    process -> its helper       {"say": "failed", "text": ...}, {"say": "done"}
    helper -> helper of 0       {"rank", "token"} once, then {"say": "beat" | "gone" | "frozen" | "failed" | "done", "text"}
    helper of 0 -> helpers      {"say": "beat" | "done"}, {"say": "end", "rank", "why", "text"}
    helper -> its process       {"port"} when it is ready, or {"cannot"}; {"say": "end", "rank", "why", "text"}

`why` is one of gone, frozen, silent, failed.
"""

import contextlib
import json
import os
import selectors
import signal
import socket
import time
from typing import Any

Message = dict[str, Any]

LONGEST = 100_000
"""Bytes of a line; nobody who belongs here sends a longer one."""


class Line:
    """One end of a connection that carries lines of JSON, and what has arrived of the next line."""

    def __init__(self, end: socket.socket | int, rank: int | None = None) -> None:
        self.end, self.rank, self.rest, self.heard = end, rank, b"", time.monotonic()

    def read(self) -> list[Message] | None:
        """The lines that have arrived; None: the other end is closed, or speaks another language."""
        try:
            data = self.end.recv(65536) if isinstance(self.end, socket.socket) else os.read(self.end, 65536)
            *lines, self.rest = (self.rest + data).split(b"\n")
            messages = [json.loads(line) for line in lines]
        except (OSError, ValueError):
            return None
        if not data or len(self.rest) > LONGEST or not all(isinstance(message, dict) for message in messages):
            return None
        self.heard = time.monotonic()
        return messages

    def send(self, message: Message) -> None:
        """Hand a line over; one that cannot be delivered is no loss: the other end is gone."""
        data = json.dumps(message).encode() + b"\n"
        with contextlib.suppress(OSError):
            if isinstance(self.end, socket.socket):
                self.end.sendall(data)
            else:
                os.write(self.end, data)

    def close(self) -> None:
        """No more lines."""
        if isinstance(self.end, socket.socket):
            with contextlib.suppress(OSError):
                self.end.close()


class Helper:
    """The helper of one process.

    Args:
        setting: rank, count, host and port of process 0's helper (0: choose one), the run's token, the process's id, and how many
            seconds lie between beats, make a process silent, and make it frozen.
    """

    def __init__(self, setting: Message) -> None:
        self.rank: int = setting["rank"]
        self.count: int = setting["count"]
        self.token: str = setting["token"]
        self.pid: int = setting["pid"]
        self.beat_s, self.silent_s, self.frozen_s = setting["beat_s"], setting["silent_s"], setting["frozen_s"]
        self.process, self.out = Line(0), Line(1)
        self.others: dict[int, Line] = {}  # at process 0 those of all others, elsewhere that of process 0
        self.guests: list[Line] = []  # connected, and not yet known by the token
        self.done: set[int] = set()
        self.ended = self.leaving = False
        self.stopped_since: float | None = None
        self.selector = selectors.DefaultSelector()
        self.selector.register(0, selectors.EVENT_READ, self.process)
        self.listener: socket.socket | None = None
        if self.rank == 0:
            self._listen()
        else:
            self._connect(setting["host"], setting["port"])

    def _listen(self) -> None:
        if socket.has_dualstack_ipv6():
            self.listener = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=self.count + 8)
        else:
            self.listener = socket.create_server(("", 0), backlog=self.count + 8)
        self.selector.register(self.listener, selectors.EVENT_READ, None)
        self.out.send({"port": self.listener.getsockname()[1]})

    def _connect(self, host: str, port: int) -> None:
        connection = socket.create_connection((host, port), timeout=20)
        connection.settimeout(5)
        line = Line(connection, 0)
        line.send({"rank": self.rank, "token": self.token})
        self.others[0] = line
        self.selector.register(connection, selectors.EVENT_READ, line)
        self.out.send({"port": port})

    def run(self) -> None:
        """Until the process is done, or the run has ended for it."""
        beaten = 0.0
        while True:
            ready = self.selector.select(self.beat_s / 2)
            now = time.monotonic()
            if now - beaten > self.beat_s + self.silent_s / 2 and beaten:  # this helper stood still itself, with its machine maybe
                for line in self.others.values():
                    line.heard = now
            for key, _ in ready:
                if key.data is None:
                    self._accept()
                elif key.data is self.process:
                    if not self._from_process(self.process.read()):
                        return
                else:
                    self._from_other(key.data, key.data.read())
            if now - beaten > self.beat_s:
                beaten = now
                self._tell({"say": "beat"})
                self._look_at_process(now)
            self._look_at_others(now)

    def _accept(self) -> None:
        assert self.listener is not None
        try:
            connection, _ = self.listener.accept()
        except OSError:  # whoever knocked has left
            return
        connection.settimeout(5)
        self.guests.append(guest := Line(connection))
        self.selector.register(connection, selectors.EVENT_READ, guest)

    def _from_process(self, messages: list[Message] | None) -> bool:
        """What the process says; false: there is nothing left to watch."""
        if messages is None and not self.leaving:
            self._report("gone", "")
        for message in messages or []:
            self.leaving = True  # that it ends now is no surprise
            if message["say"] == "failed":
                self._report("failed", message["text"])
        if messages is not None:
            return True
        self._tell({"say": "done"})
        return False

    def _from_other(self, line: Line, messages: list[Message] | None) -> None:
        if messages is None:
            self._drop(line)
            return
        for message in messages:
            if line.rank is None:
                if not self._welcome(line, message):
                    return
            elif message.get("say") == "done":
                self.done.add(line.rank)
            elif message.get("say") == "end":
                self._end(message)
            elif message.get("say") in ("gone", "frozen", "failed"):
                self._end({"say": "end", "rank": line.rank, "why": message["say"], "text": message.get("text", "")})

    def _welcome(self, guest: Line, message: Message) -> bool:
        """Whether a guest belongs here; one that does not is hung up on, whatever else it says."""
        if message.get("token") != self.token:
            self._drop(guest)
            return False
        self.guests.remove(guest)
        guest.rank = int(message["rank"])
        self.others[guest.rank] = guest
        return True

    def _drop(self, line: Line) -> None:
        self.selector.unregister(line.end)
        line.close()
        if line.rank is None:
            self.guests.remove(line)
            return
        del self.others[line.rank]
        if line.rank not in self.done:
            self._end({"say": "end", "rank": line.rank, "why": "gone", "text": ""})

    def _report(self, why: str, text: str) -> None:
        """What befell the own process, to those who should know."""
        if self.rank == 0:
            self._tell({"say": "end", "rank": 0, "why": why, "text": text})
        else:
            self._tell({"say": why, "text": text})

    def _tell(self, message: Message) -> None:
        for line in list(self.others.values()):
            line.send(message)

    def _end(self, message: Message) -> None:
        """The run has ended: another process is not there any more. The first reason is the one."""
        if self.ended:
            return
        self.ended = True
        self.out.send(message)
        if self.rank == 0:
            for rank, line in self.others.items():
                if rank != message["rank"] or message["why"] in ("frozen", "silent"):
                    line.send(message)

    def _look_at_process(self, now: float) -> None:
        if not is_stopped(self.pid):
            self.stopped_since = None
            return
        self.stopped_since = self.stopped_since or now
        if now - self.stopped_since < self.frozen_s:
            return
        if not self.ended:
            self._report("frozen", "")
            if self.rank == 0:
                self.ended = True
        elif now - self.stopped_since > self.frozen_s + 2 * self.beat_s:
            # The others have gone, and it would keep its memory and its GPU for good.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def _look_at_others(self, now: float) -> None:
        for rank, line in self.others.items():
            if now - line.heard > self.silent_s and rank not in self.done:
                self._end({"say": "end", "rank": rank, "why": "silent", "text": ""})
                return


def is_stopped(pid: int) -> bool:
    """Whether a process was stopped by a signal. (Not: by a debugger.) False where the system does not say."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] == b"T"
    except (OSError, IndexError):
        return False


def main() -> None:
    """The settings come as the first line from the process."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # meant for the process, which ends us by ending
    line = b""
    while not line.endswith(b"\n"):
        if not (byte := os.read(0, 1)):
            return
        line += byte
    try:
        helper = Helper(json.loads(line))
    except OSError as error:
        Line(1).send({"cannot": str(error)})
        return
    helper.run()


if __name__ == "__main__":
    main()
