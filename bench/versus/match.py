"""The driver's end of the line: starts contestants, lets them take turns, and ends them.

Only one of them runs at any time. A contestant that fails is noted with its last lines, and the others go on.
"""

import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LAST_LINES = 12
SURROUNDINGS = {
    "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin for work would take it from whoever's turn it is
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "PYTHONUNBUFFERED": "1",
}

Say = Callable[[str], None]


@dataclass(slots=True)
class Stretch:
    """A stretch that a contestant ran: phase, seconds, what it told, and which round of its phase it was."""

    phase: str
    seconds: float
    facts: dict[str, Any]


@dataclass(slots=True)
class Player:
    """A contestant's process.

    Attributes:
        label: its name.
        command: of the process, which gets the numbers of its two pipes appended.
        log: where its output goes.
        environment: added to this process's.
        limit_s: longest that it may take until it is ready again.
        phase: that it is ready to go on with; empty before it is and after it has ended.
        stretches, facts: what it has told.
        failure: why it ended, if not because it was told to.
    """

    label: str
    command: Sequence[str]
    log: Path
    environment: dict[str, str]
    limit_s: float
    phase: str = ""
    stretches: list[Stretch] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    failure: str = ""
    _process: subprocess.Popen[bytes] | None = None
    _orders: int = -1
    _news: int = -1
    _unread: bytes = b""

    def start(self) -> None:
        """Start the process and wait until it is ready for its first turn, or has failed."""
        orders_here, news_here = os.pipe()[::-1], os.pipe()
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [*self.command, str(orders_here[1]), str(news_here[1])],
                cwd=ROOT,
                env=os.environ | SURROUNDINGS | self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(orders_here[1], news_here[1]),
                start_new_session=True,  # a Ctrl-C is for the driver, which then ends them all
            )
        self._orders, self._news = orders_here[0], news_here[0]
        os.close(orders_here[1])
        os.close(news_here[1])
        self._listen()

    def go(self) -> None:
        """Let it run until it is ready again."""
        self.phase = ""
        with suppress(BrokenPipeError):  # it has ended, which reading tells
            os.write(self._orders, b"go\n")
        self._listen()

    def of(self, phase: str) -> list[Stretch]:
        """Its stretches of a phase."""
        return [stretch for stretch in self.stretches if stretch.phase == phase]

    def end(self) -> None:
        """End the process, whatever it does."""
        if self._process is None:
            return
        for pipe in (self._orders, self._news):
            if pipe >= 0:
                os.close(pipe)
        self._orders = self._news = -1
        try:
            self._process.wait(timeout=2)  # the end of its orders is an order
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._process = None
        self.phase = ""

    def _listen(self) -> None:
        """Take its news until it is ready, has failed or has ended."""
        until = time.monotonic() + self.limit_s
        while not self.phase and not self.failure:
            line, ended = self._line(until)
            if ended:
                self.failure = self._how_it_ended()
            elif line is None:
                self.failure = f"took longer than {self.limit_s:g} s\n{last_lines(self.log)}"
            else:
                self._take(json.loads(line))
        if self.failure:
            self.end()

    def _take(self, news: dict[str, Any]) -> None:
        kind = news.pop("kind")
        if kind == "ready":
            self.phase = news["phase"]
        elif kind == "stretch":
            self.stretches.append(Stretch(news.pop("phase"), news.pop("seconds"), news))
        elif kind == "facts":
            self.facts |= news
        elif kind == "failed":
            self.failure = f"{news['error']}\n{last_lines(self.log)}"

    def _line(self, until: float) -> tuple[bytes | None, bool]:
        """Its next line, None where the time is over; and whether it has ended."""
        while b"\n" not in self._unread:
            ready, _, _ = select.select([self._news], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                return None, False
            more = os.read(self._news, 65536)
            if not more:
                return None, True
            self._unread += more
        line, _, self._unread = self._unread.partition(b"\n")
        return line, False

    def _how_it_ended(self) -> str:
        assert self._process is not None
        code = self._process.wait()
        killed = " (memory ran out? --apart runs one at a time)" if code == -signal.SIGKILL else ""
        return f"ended with exit code {code}{killed}\n{last_lines(self.log)}"


def last_lines(log: Path) -> str:
    """The end of a log."""
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").rstrip().split("\n")[-LAST_LINES:])


@dataclass(frozen=True, slots=True)
class Rounds:
    """How the contestants take turns.

    Attributes:
        blocks: of each, warm-up included.
        measure: called before every round of blocks and after the last one, between two contestants' turns.
        say: takes a line about how it goes.
    """

    blocks: int
    measure: Callable[[], float]
    say: Say

    def interleaved(self, first: Sequence[Player], later: Sequence[Player], phase: str) -> list[float]:
        """All at once, block by block in turn.

        Args:
            first: start at once.
            later: start when the reference passes of the first are over, whose values they read.
            phase: whose blocks are counted.

        Returns:
            what was measured: one value before each round and one after the last.
        """
        for player in first:
            self._start(player)
        self._reference(first)
        for player in later:
            self._start(player)
        self._reference(later)
        rates = []
        for block in range(self.blocks):
            rates.append(self.measure())
            for player in (*first, *later):
                if player.phase == phase:
                    player.go()
                    self._tell(player, block)
        rates.append(self.measure())
        for player in (*first, *later):
            player.end()
        return rates

    def apart(self, players: Sequence[Player], phase: str) -> dict[str, list[float]]:
        """One contestant after the other, for those that do not fit into the memory together; what was measured, by label."""
        rates: dict[str, list[float]] = {}
        for player in players:
            self._start(player)
            self._reference([player])
            own = rates[player.label] = []
            for block in range(self.blocks):
                own.append(self.measure())
                if player.phase == phase:
                    player.go()
                    self._tell(player, block)
            own.append(self.measure())
            player.end()
        return rates

    def _start(self, player: Player) -> None:
        began = time.monotonic()
        player.start()
        if player.failure:
            self.say(f"{player.label} failed: {player.failure}")
        else:
            self.say(f"{player.label}: ready after {time.monotonic() - began:.1f} s")

    def _reference(self, players: Sequence[Player]) -> None:
        """The reference passes before training, in turns too."""
        while waiting := [player for player in players if player.phase == "reference"]:
            for player in waiting:
                player.go()
                if player.failure:
                    self.say(f"{player.label} failed: {player.failure}")
        for player in players:
            if parts := player.of("reference"):
                self.say(f"{player.label}: reference {sum(part.seconds for part in parts):.1f} s")

    def _tell(self, player: Player, block: int) -> None:
        if player.failure:
            self.say(f"{player.label} failed: {player.failure}")
        else:
            kind = "warm-up" if block == 0 else f"block {block} of {self.blocks - 1}"
            self.say(f"{kind}: {player.label} {player.stretches[-1].seconds:.2f} s")
