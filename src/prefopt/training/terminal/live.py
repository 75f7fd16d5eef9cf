"""What a run looks like on a terminal while it goes.

    training ━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━────────────────────  300/500   1:12 left   12,345 tokens/s   2.35 GB
               loss   margin  accuracy   chosen  rejected     KL
    training  0.5312  0.4431      0.72  -0.1203   -0.5634  0.412
    held out  0.5541  0.3920      0.69  -0.1011   -0.4931  0.380   after step 200
    warning: what is going on
      → what to change

It is as wide as the terminal at that moment: where there is little room, numbers lose decimals, then the least important
columns go. What does not fit below one another goes too, the older words first; whoever shows the view says them in full
when it ends.
"""

import time
from collections.abc import Mapping
from textwrap import wrap

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderResult
from rich.live import Live
from rich.text import Text

from prefopt.training.terminal.shown import METRICS, PACE, Pace, clock, number
from prefopt.training.watching.watched import Finding

NUM_FINDINGS = 2
"""How many of the watch's words stay in sight."""

NARROWEST = 20
"""Columns that a terminal has at least, whatever it says; some say 0."""

SHORTEST_BAR = 12

COLOURS = {"warning": "bold yellow", "note": "bold cyan"}


class View:
    """One stretch of work as it stands.

    Args:
        what: its name; blanks before it move everything to the right.
        total, done: its steps.
    """

    def __init__(self, what: str, total: int, done: int) -> None:
        self.name = what.lstrip()
        self.margin = " " * (len(what) - len(self.name))
        self.total, self.done = total, done
        self.pace = Pace(total, done, time.monotonic())
        self.row: Mapping[str, float] = {}
        self.held_out: Mapping[str, float] = {}
        self.findings: list[Finding] = []
        self.line_widths: list[int] = []
        """Of the lines as they were drawn last."""

    def step(self, done: int, row: Mapping[str, float]) -> None:
        """Another step."""
        self.done = done
        self.pace.step(done, time.monotonic())
        self.row = row
        if any(name.startswith("eval/") for name in row):
            self.held_out = row

    def find(self, finding: Finding) -> Finding | None:
        """Another word of the watch; returns the one that makes room for it."""
        self.findings.append(finding)
        return self.findings.pop(0) if len(self.findings) > NUM_FINDINGS else None

    def take_findings(self) -> list[Finding]:
        """What it still shows of the watch's words, oldest first; it shows none of them from here on."""
        taken, self.findings = self.findings, []
        return taken

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = max(NARROWEST, options.max_width) - len(self.margin) - 1
        height = max(4, console.size.height - 1)
        lines = self._bar(width, plain=options.ascii_only) + self._table(width)
        words = [finding_lines(finding, width, plain=options.ascii_only) for finding in self.findings]
        while len(words) > 1 and len(lines) + sum(map(len, words)) > height:
            del words[0]
        lines = [*lines, *(line for block in words for line in block)][:height]
        self.line_widths = [len(self.margin) + line.cell_len for line in lines]
        for line in lines:
            yield Text(self.margin, no_wrap=True, overflow="crop").append_text(line)

    def _bar(self, width: int, *, plain: bool) -> list[Text]:
        """The bar with what stands behind it; a second line takes what has no place there."""
        parts = [f"{self.done:,}/{self.total:,}", self._time()]
        parts += [number(shown, self.row[shown.name]) + shown.unit for shown in PACE if shown.name in self.row]
        parts = [part for part in parts if part]
        room, beside = width - len(self.name) - 2, len(parts)
        while beside > 1 and room - len("   ".join(parts[:beside])) - 1 < SHORTEST_BAR:
            beside -= 1
        behind = "   ".join(parts[:beside])
        length = max(0, room - len(behind) - 1)
        share = min(1.0, self.done / self.total) if self.total else 1.0
        filled = round(length * share)
        line = Text(f"{self.name} ")
        line.append(("#" if plain else "━") * filled, "green" if share == 1.0 else "cyan")
        line.append(("-" if plain else "─") * (length - filled), "dim")
        line.append(f"  {behind}")
        line.truncate(width)
        rest = Text("   ".join(parts[beside:]), "dim")
        rest.truncate(width)
        return [line, rest] if beside < len(parts) else [line]

    def _time(self) -> str:
        if self.done >= self.total:
            return f"in {clock(self.pace.last - self.pace.started)}"
        left = self.pace.left(time.monotonic())
        return "" if left is None else f"{clock(left)} left"

    def _table(self, width: int) -> list[Text]:
        """Training and held-out metrics, one above the other."""
        rows = [(self.name, self.row, "")] + ([("held out", self.held_out, "eval/")] if self.held_out else [])
        first = max(len(name) for name, *_ in rows)
        columns = self._columns(rows, 0)
        if first + sum(len(column[0]) for column in columns) > width:
            columns = self._columns(rows, 1)
        while columns and first + sum(len(column[0]) for column in columns) > width:
            columns.pop()
        if not columns:
            return []
        names = ["", *(name for name, *_ in rows)]
        lines = [
            Text(f"{name:<{first}}" + "".join(column[place] for column in columns), "" if place else "dim")
            for place, name in enumerate(names)
        ]
        after = f"   after step {self.held_out['step']:,.0f}" if "step" in self.held_out else ""
        if lines[-1].cell_len + len(after) <= width:
            lines[-1].append(after, "dim")
        return lines

    def _columns(self, rows: list[tuple[str, Mapping[str, float], str]], fewer: int) -> list[list[str]]:
        """A column per metric that there is: its label and a number per row, all of one width."""
        columns = []
        for metric in METRICS:
            names = [prefix + metric.name for *_, prefix in rows]
            cells = [number(metric, row[name], fewer=fewer) if name in row else "" for name, (_, row, _) in zip(names, rows, strict=True)]
            if any(cells):
                cells = [metric.label, *cells]
                width = 2 + max(len(number(metric, -0.1 if metric.signed else 0.1, fewer=fewer)), *map(len, cells))
                columns.append([f"{cell:>{width}}" for cell in cells])
        return columns


def finding_lines(finding: Finding, width: int, *, plain: bool = False) -> list[Text]:
    """A word of the watch: how serious and what, then what to do, as lines of that width; `plain`: without letters beyond ASCII."""
    head, arrow = f"{finding.severity}: ", "  -> " if plain else "  → "
    what = wrap(head + finding.what, width, subsequent_indent="  ", break_on_hyphens=False)
    do = wrap(finding.do, width, initial_indent=arrow, subsequent_indent=" " * len(arrow), break_on_hyphens=False)
    lines = [Text(line) for line in (*what, *do)]
    lines[0].stylize(COLOURS[finding.severity], 0, len(head))
    return lines


class SteadyLive(Live):
    """rich's live display, which also finds its own lines again after the terminal was made narrower.

    Terminals then break lines that are too long, so that they take more rows than were drawn.

    Args:
        view: what is shown.
        console: where.
    """

    def __init__(self, view: View, console: Console) -> None:
        self.view = view
        super().__init__(view, console=console, refresh_per_second=4, vertical_overflow="crop")

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        """Called by rich before anything is written."""
        drawn = getattr(self, "_live_render", None)
        shape, width = getattr(drawn, "_shape", None), max(1, self.console.width)
        if drawn is not None and shape is not None and max(self.view.line_widths, default=0) > width:
            drawn._shape = (width, sum(max(1, -(-line // width)) for line in self.view.line_widths))
        return super().process_renderables(renderables)
