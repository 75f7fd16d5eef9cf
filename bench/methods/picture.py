"""Reward and KL of each method as dots, one per seed, the best method first."""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from statistics import mean
from typing import Any

from bench.pictures import framed

ROW, TOP, BOTTOM = 22, 74, 34
NAMES, PANEL, GAP, EDGE = 150, 380, 50, 20
"""Sizes in the picture's own units: a method's row, the room above and below the rows; the room of the names, of a panel, between the
panels and around all."""

Runs = Mapping[str, Sequence[Mapping[str, Any]]]


def by_reward(runs: Mapping[str, Mapping[str, Any]]) -> Runs:
    """Method -> its figures for each seed, of "method/seed" -> figures; the highest mean reward first."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for key, figures in runs.items():
        found.setdefault(key.split("/")[0], []).append(figures)
    return dict(sorted(found.items(), key=lambda item: -mean(own["true_reward"] for own in item[1])))


def picture(found: Mapping[str, Any]) -> str:
    """The whole, as an SVG file."""
    runs = by_reward(found["runs"])
    before = mean(own["true_reward"] for own in found["before"].values())
    height = TOP + ROW * len(runs) + BOTTOM
    parts = [*names(runs)]
    rewards = "true reward of what it writes; the line: before"
    parts += panel(runs, "true_reward", EDGE + NAMES, "True reward", rewards, "chosen", (0.4, 1.0), [0.4, 0.6, 0.8, 1.0], before)
    most = max(4.0, *(own["kl"] for each in runs.values() for own in each))
    steps = [step for step in (0, 2, 4, 6, 8, 10, 15, 20, 30, 40) if step <= most]
    parts += panel(runs, "kl", EDGE + NAMES + PANEL + GAP, "KL", "nats per review from the SFT model", "train", (0.0, most), steps)
    width = 2 * EDGE + NAMES + 2 * PANEL + GAP
    means = {name: [mean(own[figure] for own in each) for figure in ("true_reward", "kl")] for name, each in runs.items()}
    said = "; ".join(f"{name} {reward:.2f} at {kl:.1f}" for name, (reward, kl) in means.items())
    return framed(width, height, parts, f"True reward at KL in nats, means of the seeds: {said}.")


def names(runs: Runs) -> Iterator[str]:
    """What each row is."""
    for place, name in enumerate(runs):
        yield f'<text x="{EDGE + NAMES - 18}" y="{middle(place) + 4}" text-anchor="end" style="fill:var(--ink)">{escape(name)}</text>'


def panel(
    runs: Runs,
    figure: str,
    left: float,
    title: str,
    says: str,
    colour: str,
    ends: tuple[float, float],
    ticks: Sequence[float],
    level: float | None = None,
) -> Iterator[str]:
    """One figure of all methods.

    Args:
        runs: method -> figures of each seed.
        figure: its key there.
        left: where the panel begins.
        title, says: above it.
        colour: of the dots.
        ends: of the axis; a dot beyond them stands at the end.
        ticks: where the axis says its value.
        level: a value to compare with.
    """
    low, high = ends

    def across(value: float) -> float:
        return round(left + PANEL * (min(max(value, low), high) - low) / (high - low), 1)

    bottom = TOP + ROW * len(runs)
    yield f'<text class="title" x="{left}" y="32">{escape(title)}</text>'
    yield f'<text class="says" x="{left}" y="53">{escape(says)}</text>'
    for tick in ticks:
        yield f'<path d="M {across(tick)} {TOP} V {bottom}" style="stroke:var(--grid)"/>'
        yield f'<text class="says" x="{across(tick)}" y="{bottom + 20}" text-anchor="middle">{tick:g}</text>'
    if level is not None:
        yield f'<path d="M {across(level)} {TOP} V {bottom}" style="stroke:var(--axis)" stroke-dasharray="3,3"/>'
    for place, each in enumerate(runs.values()):
        values = [own[figure] for own in each]
        y = middle(place)
        yield f'<path d="M {across(min(values))} {y} H {across(max(values))}" style="stroke:var(--{colour})" stroke-width="2"/>'
        for value in values:
            yield f'<circle cx="{across(value)}" cy="{y}" r="4" style="fill:var(--{colour})" fill-opacity="0.75"/>'


def middle(place: int) -> float:
    """The height of a row's middle."""
    return TOP + ROW * place + ROW / 2
