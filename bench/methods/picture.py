"""Reward and KL of all contenders: a row for each, the best first; and a small chart for each, in which all others stand behind it."""

import math
from collections.abc import Callable, Iterator, Sequence
from html import escape
from statistics import mean

from bench.methods.book import Line
from bench.methods.choice import MOST_KL, Entry
from bench.methods.frontier import best_at
from bench.pictures import framed

EDGE = 20
ROW, TOP, BOTTOM = 22, 74, 34
NAMES, PANEL, GAP = 160, 370, 50
"""Sizes of the rows, in the picture's own units: a row, the room above and below the rows; the room of the names, of a panel, between the
panels."""

COLUMNS, CELL, TALL, BETWEEN, ABOVE, HEAD = 5, 152, 104, 20, 20, 74
"""The small charts: how many in a row, how wide and tall, the room between two, above one for its name, and above all."""

LEFT = 34
"""Room for the words of the axis of rewards."""

APART = 34
"""Room for the number of a tick, so that none lies over the next."""

LEAST_KL = 0.125
"""Nats; less cannot be told from nothing by a few hundred samples."""

Place = Callable[[float], float]


def rows(entries: Sequence[Entry], worlds: Sequence[Line]) -> str:
    """Reward and KL, dots for seeds and rings for trials, as an SVG file."""
    shown = [entry for entry in entries if not entry.contender.scores]
    start = mean(world["true_reward"] for world in worlds)
    width, bottom = 2 * EDGE + NAMES + 2 * PANEL + GAP, TOP + ROW * len(shown)
    reward, ticks = reward_axis(shown, EDGE + NAMES, EDGE + NAMES + PANEL, lowest=start)
    kl, kl_ticks = kl_axis(shown, EDGE + NAMES + PANEL + GAP, width - EDGE)
    parts = [*heading(EDGE + NAMES, "True reward", "filled: a seed; ring: a trial; dashed: before training")]
    parts += heading(EDGE + NAMES + PANEL + GAP, "KL", f"nats from the SFT model; dashed: {MOST_KL:g}, red: above")
    for axis, values, level in ((reward, ticks, start), (kl, kl_ticks, MOST_KL)):
        for value in values:
            parts.append(line_at(axis(value), TOP, bottom, "grid"))
            parts.append(f'<text class="says" x="{axis(value)}" y="{bottom + 20}" text-anchor="middle">{value:g}</text>')
        parts.append(line_at(axis(level), TOP, bottom, "axis", "3,3"))
    for place, entry in enumerate(shown):
        y = TOP + ROW * place + ROW / 2
        parts.append(f'<text x="{EDGE + NAMES - 14}" y="{y + 4}" text-anchor="end" style="fill:var(--ink)">{escape(entry.name)}</text>')
        for figure, axis, colour in (("true_reward", reward, "chosen"), ("kl", kl, "train")):
            across = [axis(run[figure]) for run in entry.runs]
            parts += [ring(axis(trial[figure]), y) for trial in entry.trials]
            parts.append(f'<path d="M {min(across)} {y} H {max(across)}" style="stroke:var(--{colour})" stroke-width="2"/>')
            parts += [dot(x, y, "warning" if is_far(run) else colour) for x, run in zip(across, entry.runs, strict=True)]
    return framed(width, bottom + BOTTOM, parts, described(shown))


def clouds(entries: Sequence[Entry], worlds: Sequence[Line]) -> str:
    """Reward by KL, a chart for each contender, as an SVG file: its seeds and trials, and behind them those of all."""
    shown = [entry for entry in entries if not entry.contender.scores]
    rewards = [reward for world in worlds for reward in world["rewards"]]
    kl, kl_ticks = kl_axis(shown, 0, CELL)
    reward, ticks = reward_axis(shown, TALL, 0, lowest=mean(rewards))
    behind = [line_at(kl(value), 0, TALL, "grid") for value in kl_ticks]
    behind += [f'<path d="M 0 {reward(value)} H {CELL}" style="stroke:var(--grid)"/>' for value in ticks]
    behind.append(line_at(kl(MOST_KL), 0, TALL, "axis", "3,3"))
    behind += curve(rewards, kl, reward)
    behind += [dot(kl(p["kl"]), reward(p["true_reward"]), "axis", 1.6) for entry in shown for p in points(entry)]
    key = f"curve: the best that can be had; grey: all runs; rings: its own trials; filled: its seeds; dashed: {MOST_KL:g} nats, red: above"
    parts = [*heading(EDGE, "True reward by KL", key), f'<defs><g id="all">{"".join(behind)}</g></defs>']
    num_rows = -(-len(shown) // COLUMNS)
    for number, entry in enumerate(shown):
        line, column = divmod(number, COLUMNS)
        x, y = EDGE + LEFT + column * (CELL + BETWEEN), HEAD + ABOVE + line * (TALL + ABOVE + BETWEEN)
        parts.append(f'<g transform="translate({x} {y})">')
        parts.append(f'<text x="0" y="-6" style="fill:var(--ink)">{escape(entry.name)}</text><use href="#all"/>')
        if number + COLUMNS >= len(shown):
            parts += [f'<text class="says" x="{kl(value)}" y="{TALL + 18}" text-anchor="middle">{value:g}</text>' for value in kl_ticks]
        if column == 0:
            parts += [f'<text class="says" x="-6" y="{reward(value) + 4}" text-anchor="end">{value:g}</text>' for value in ticks]
        tried = [(kl(trial["kl"]), reward(trial["true_reward"])) for trial in entry.trials]
        path = " L ".join(f"{x} {y}" for x, y in tried)
        parts.append(f'<path d="M {path}" style="stroke:var(--train);fill:none"/>')
        parts += [ring(x, y) for x, y in tried]
        parts += [dot(kl(run["kl"]), reward(run["true_reward"]), "warning" if is_far(run) else "chosen") for run in entry.runs]
        parts.append("</g>")
    width = 2 * EDGE + LEFT + COLUMNS * CELL + (COLUMNS - 1) * BETWEEN
    height = HEAD + num_rows * (TALL + ABOVE + BETWEEN) + BETWEEN
    return framed(width, height, parts, described(shown))


def points(entry: Entry) -> list[Line]:
    """Trials and runs."""
    return [*entry.trials, *entry.runs]


def is_far(run: Line) -> bool:
    """Whether it went further than what is chosen."""
    return bool(run["kl"] > MOST_KL)


def described(entries: Sequence[Entry]) -> str:
    """The picture in words."""
    said = "; ".join(f"{entry.name} {entry.mean('true_reward'):.2f} at {entry.mean('kl'):.1f}" for entry in entries)
    return f"True reward at KL in nats, means of the seeds: {said}."


def reward_axis(entries: Sequence[Entry], start: float, end: float, *, lowest: float) -> tuple[Place, list[float]]:
    """Where a reward stands, and the values that are written: from the tenth below all that is shown to 1."""
    low = min([lowest, *(point["true_reward"] for entry in entries for point in points(entry))])
    low = max(0.0, math.floor(10 * low) / 10)
    step = 0.1 if low >= 0.6 else 0.2
    count = round((1 - low) / step + 1e-9)
    ticks = [round(1 - step * place, 1) for place in range(count + 1) if 1 - step * place >= low - 1e-9]
    return lambda value: round(start + (end - start) * (value - low) / (1 - low), 1), sorted(ticks)


def kl_axis(entries: Sequence[Entry], start: float, end: float) -> tuple[Place, list[float]]:
    """Where a KL stands, by its logarithm: methods differ by a hundredfold. What is less than `LEAST_KL` stands at the left end."""
    shown = [MOST_KL, *(point["kl"] for entry in entries for point in points(entry))]
    low = math.floor(math.log2(max(min(shown), LEAST_KL)))
    high = math.log2(1.05 * max(shown))

    def place(value: float) -> float:
        return round(start + (end - start) * max(math.log2(max(value, LEAST_KL)) - low, 0.0) / (high - low), 1)

    ticks: list[float] = []
    for tick in (2.0**power for power in range(low, math.floor(high) + 1)):
        if not ticks or place(tick) - place(ticks[-1]) >= APART:
            ticks.append(tick)
    return place, ticks


def curve(rewards: Sequence[float], kl: Place, reward: Place, most: float = 12.0) -> Iterator[str]:
    """The best reward at each KL."""
    steps = [most * (place / 60) ** 3 for place in range(61)]
    path = " L ".join(f"{kl(step)} {reward(best_at(rewards, step))}" for step in steps if 0 < kl(step) <= CELL)
    yield f'<path d="M {path}" style="stroke:var(--axis);fill:none"/>'


def heading(x: float, title: str, says: str) -> list[str]:
    """The words above a chart."""
    return [
        f'<text class="title" x="{x}" y="32">{escape(title)}</text>',
        f'<text class="says" x="{x}" y="53">{escape(says)}</text>',
    ]


def line_at(x: float, top: float, bottom: float, colour: str, dashes: str = "") -> str:
    """Upright."""
    return f'<path d="M {x} {top} V {bottom}" style="stroke:var(--{colour})"' + (f' stroke-dasharray="{dashes}"/>' if dashes else "/>")


def dot(x: float, y: float, colour: str, size: float = 4) -> str:
    """Filled."""
    return f'<circle cx="{x}" cy="{y}" r="{size:g}" style="fill:var(--{colour})" fill-opacity="0.75"/>'


def ring(x: float, y: float) -> str:
    """Not filled."""
    return f'<circle class="trial" cx="{x}" cy="{y}" r="3" style="stroke:var(--note);fill:none"/>'
