"""The charts of a sweep as SVG, by the same means as those of a run."""

from html import escape
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from prefopt.report.charts import Level, show
from prefopt.report.draw import BOTTOM, COLOURS, HEIGHT, LEFT, RIGHT, TOP, WIDTH, canvas, draw_level, inline_svg, label_axes, written
from prefopt.report.sweep.charts import Point, SweepChart

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_TICKS = 8
"""Names across a chart; of more, some are left out."""

MOST_NAMES = 8
"""Points that are named beside them; of more, the first, the last and the highest are."""

LETTER, LINE = 8.0, 15.0
"""Width of a letter and height of a line in the units of a chart, as a narrow screen shows them."""

Box = tuple[float, float, float, float]
"""Left, lower, right and upper edge."""

SIDE = 0.02
"""Sideways distance of the points of one place, so that the bars of several series do not cover each other."""


def draw_sweep_chart(chart: SweepChart) -> str:
    """A chart.

    Returns:
        An `svg` element; everything in it that came from files is escaped.
    """
    figure, axes = canvas()
    points = [point for series in chart.series for point in series.points]
    set_ends(axes, chart, points)
    for level, label in chart.levels:
        low, high = axes.get_ylim()
        if low <= level <= high:
            draw_level(axes, Level(level, label))
    low, high = axes.get_xlim()
    for place, series in enumerate(chart.series):
        shift = (place - (len(chart.series) - 1) / 2) * SIDE * (high - low) if chart.joined else 0.0
        colour = COLOURS[series.role]
        xs = [point.x + shift for point in series.points]
        for x, point in zip(xs, series.points, strict=True):
            if point.error:
                axes.plot([x, x], ends_of(point, chart), color=colour, linewidth=1.5, alpha=0.55, zorder=3)
        line = 2 if chart.joined else 0
        axes.plot(
            *(xs, [point.y for point in series.points]),
            color=colour,
            linewidth=line,
            linestyle="-" if chart.joined else "none",
            marker="o",
            markersize=8,
            markeredgecolor=COLOURS["card"],
            markeredgewidth=1.2,
            zorder=4,
        )
    if chart.joined:
        label_axes(axes, chart.scale, across="")
        name_ticks(axes, chart)
    else:
        label_axes(axes, chart.scale, across="")
        axes.set_xlim(low, high)
        name_points(axes, points)
    return inline_svg(written(figure), chart.description, list(bands(chart, axes)))


def set_ends(axes: "Axes", chart: SweepChart, points: list[Point]) -> None:
    """Where the axes end: a little beyond the points and their bars; a level counts where it is near."""
    values = [end for point in points for end in ends_of(point, chart)]
    low, high = min(values), max(values)
    reach = (high - low) or abs(high) * 0.2 or 1.0
    for level, _ in chart.levels:
        if low - reach <= level <= high + reach:
            low, high = min(low, level), max(high, level)
    room = 0.12 * ((high - low) or reach)
    if chart.scale == "share":
        room = min(room, 0.04)  # no axis goes on to 105 %
    axes.set_ylim(low - room, high + room)
    if chart.ticks:
        axes.set_xlim(-0.5, len(chart.ticks) - 0.5)
    else:
        # From 0: the model before training stands there.
        most = max(point.x for point in points) or 1.0
        axes.set_xlim(-0.02 * most, 1.2 * most)


def ends_of(point: Point, chart: SweepChart) -> list[float]:
    """The ends of a point's bar; no share is below 0 or above 1."""
    ends = [point.y - (point.error or 0.0), point.y + (point.error or 0.0)]
    return [min(max(end, 0.0), 1.0) for end in ends] if chart.scale == "share" else ends


def name_ticks(axes: "Axes", chart: SweepChart) -> None:
    """The values across, the first with the name of what is swept."""
    every = -(-len(chart.ticks) // MOST_TICKS)
    places = list(range(0, len(chart.ticks), every))
    names = [chart.ticks[place] for place in places]
    axes.set_xticks(places, [f"{chart.across} {names[0]}", *names[1:]])


def name_points(axes: "Axes", points: list[Point]) -> None:
    """What each point is, beside it, where it covers the least of the others' points, bars and names."""
    named = points
    if len(points) > MOST_NAMES:
        highest = max(points, key=lambda point: point.y)
        named = [point for point in points if point in (points[0], points[-1], highest)]
    to_place = axes.transData.transform
    taken: list[Box] = []
    for point in points:
        x, y = to_place((point.x, point.y))
        reach = to_place((point.x, point.y + (point.error or 0.0)))[1] - y
        taken.append((x - 4, y - max(reach, 4), x + 4, y + max(reach, 4)))
    for point in named:
        x, y = to_place((point.x, point.y))
        wide = LETTER * len(point.name)
        # Right of it, left of it; level, above, below.
        places = [
            (side, up, (x + 8 if side > 0 else x - 8 - wide, y + up - LINE / 2, x + 8 + wide if side > 0 else x - 8, y + up + LINE / 2))
            for up in (0, 13, -13)
            for side in (1, -1)
        ]
        inside = [place for place in places if place[2][0] >= LEFT and place[2][2] <= WIDTH - RIGHT] or places
        side, up, box = min(inside, key=lambda place: sum(common(place[2], other) for other in taken))
        taken.append(box)
        align = "left" if side > 0 else "right"
        at: dict[str, Any] = {"xytext": (8 * side, up), "textcoords": "offset points", "ha": align, "va": "center"}
        axes.annotate(point.name, (point.x, point.y), color=COLOURS["muted"], zorder=5, **at)


def common(one: "Box", other: "Box") -> float:
    """The area that two boxes share."""
    wide = min(one[2], other[2]) - max(one[0], other[0])
    high = min(one[3], other[3]) - max(one[1], other[1])
    return max(wide, 0.0) * max(high, 0.0)


def bands(chart: SweepChart, axes: "Axes") -> "list[str]":
    """Strips from the left to the right, each with the values of its place, which browsers show under the pointer."""
    by_place: dict[float, list[str]] = {}
    for series in chart.series:
        for point in series.points:
            error = f" ± {show(point.error, chart.scale)}" if point.error else ""
            words = f"{point.label}{f', {series.label}' if chart.ticks and series.label and series.label not in point.label else ''}"
            at = "" if chart.ticks else f", {chart.across} {show(point.x, 'plain')}"
            by_place.setdefault(point.x, []).append(f"{words}: {show(point.y, chart.scale)}{error}{at}")
    places = sorted(by_place)
    xs = [float(axes.transData.transform((place, 0))[0]) for place in places]
    edges = [LEFT, *((left + right) / 2 for left, right in pairwise(xs)), WIDTH - RIGHT]
    return [
        f'<rect x="{left:.1f}" y="{TOP}" width="{right - left:.1f}" height="{HEIGHT - TOP - BOTTOM}">'
        f"<title>{escape(chr(10).join(by_place[place]))}</title></rect>"
        for place, (left, right) in zip(places, pairwise(edges), strict=True)
    ]
