"""Charts as SVG that stands inside a page: small, without identifiers or addresses of its own, in the page's colours.

matplotlib lays the chart out and writes SVG with marker colours; what it wrote is taken apart and written again with
only what shows. Colours become the page's variables, so that a chart is light or dark as the page is, and sizes of text
come from its style sheet, so that they stay readable on a narrow screen.
"""

import io
import math
from collections.abc import Iterator, Sequence
from html import escape
from itertools import pairwise
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from prefopt.report.charts import Chart, Level, Line, Mark, Scale, limits, show
from prefopt.report.curves import SMOOTH_FROM, central_range, column, smooth, thin
from prefopt.report.examples import Spread
from prefopt.report.text import plain, rate, share, signed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from prefopt.report.curves import Column

WIDTH, HEIGHT = 480, 236
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 18, 28
"""Size and margins of a chart in its own units; the page scales it to the width that there is."""

COLOURS = {
    "train": "#010001",
    "held": "#010002",
    "chosen": "#010003",
    "rejected": "#010004",
    "muted": "#010005",
    "grid": "#010006",
    "axis": "#010007",
    "warning": "#010008",
    "note": "#010009",
    "card": "#01000a",
}
"""Marker colours, which stand for the page's variables of the same names: no chart has a near-black like these."""

NOISE = 1e-4
"""Relative difference below which values are drawn as one: an axis cut finer shows rounding and nothing else."""

MOST_DOTS = 40
"""Evaluations that are marked one by one; more would hide the line."""

MARK_ROOM = 0.05
"""Share of a chart's width that the number of a finding takes."""

MOST_BANDS = 60
"""Strips of a chart that tell their values under the pointer."""

SVG = "{http://www.w3.org/2000/svg}"


def draw_chart(chart: Chart, marks: Sequence[Mark]) -> str:
    """A chart of curves.

    Args:
        chart: what is in it.
        marks: where the watch found something; they stand in every chart, so that cause and effect are seen together.

    Returns:
        An `svg` element; everything in it that came from files is escaped.
    """
    figure, axes = canvas()
    low, high = limits(chart.lines)
    for line in chart.lines:
        draw_line(axes, line, low, high)
    set_ends(axes, chart, low, high)
    for level in chart.levels:
        draw_level(axes, level)
    draw_marks(axes, marks)
    label_axes(axes, chart.scale)
    bands = list(hover_bands(chart, axes))
    return inline_svg(written(figure), chart.description, bands)


def set_ends(axes: "Axes", chart: Chart, low: float, high: float) -> None:
    """Where the axes end: a little beyond what is drawn, from the lowest to the highest value of lines and levels."""
    values = [low, high, *(level.value for level in chart.levels), *(() if chart.low is None else (chart.low,))]
    low, high = min(values), max(values)
    if high - low > NOISE * max(abs(low), abs(high)):
        room = (high - low) * 0.06
    else:
        room = abs(high) * 0.1 or (0.1 if chart.scale == "share" else 1.0)
    axes.set_ylim(low - (0 if low == chart.low else room), high + room)
    first = min(min(line.curve.steps) for line in chart.lines)
    last = max(max(line.curve.steps) for line in chart.lines)
    side = (last - first) * 0.015 or 0.5
    axes.set_xlim(first - side, last + side)


def draw_level(axes: "Axes", level: Level) -> None:
    """A level, with its name at the right end: above it where there is room."""
    axes.axhline(level.value, color=COLOURS["muted"], linewidth=1, dashes=(2, 3), zorder=1)
    if not level.label:
        return
    low, high = axes.get_ylim()
    above = (level.value - low) / (high - low) < 0.85
    place: dict[str, Any] = {"xytext": (-2, 4 if above else -4), "ha": "right", "va": "bottom" if above else "top"}
    at = (axes.get_xlim()[1], level.value)
    axes.annotate(level.label, at, textcoords="offset points", color=COLOURS["muted"], zorder=5, **place)


def draw_marks(axes: "Axes", marks: Sequence[Mark]) -> None:
    """A line upright at each mark's step, with the findings' numbers above the chart; those of marks side by side in one text."""
    low, high = axes.get_xlim()
    near: list[list[Mark]] = []
    for mark in marks:
        axes.axvline(mark.step, color=mark_colour(mark), linewidth=1, dashes=(3, 2), zorder=1.5)
        if near and mark.step - near[-1][-1].step < MARK_ROOM * (high - low):
            near[-1].append(mark)
        else:
            near.append([mark])
    for group in near:
        text = ",".join(str(number) for mark in group for number in mark.numbers)
        worst = next((mark for mark in group if mark.is_warning), group[0])
        write_above(axes, (group[0].step + group[-1].step) / 2, text, color=mark_colour(worst), weight="bold")


def mark_colour(mark: Mark) -> str:
    """The marker colour of a mark."""
    return COLOURS["warning" if mark.is_warning else "note"]


def write_above(axes: "Axes", place: float, text: str, **style: Any) -> None:
    """A text above the chart, over a place of its axis."""
    axes.annotate(text, (place, 1), xycoords=("data", "axes fraction"), xytext=(0, 5), textcoords="offset points", ha="center", **style)


def canvas() -> "tuple[Figure, Axes]":
    """An empty chart: a base line, horizontal lines behind the curves, no frame."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72), dpi=72)
    FigureCanvasSVG(figure)
    figure.patch.set_visible(False)
    axes = figure.add_axes((LEFT / WIDTH, BOTTOM / HEIGHT, (WIDTH - LEFT - RIGHT) / WIDTH, (HEIGHT - TOP - BOTTOM) / HEIGHT))
    axes.patch.set_visible(False)
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(COLOURS["axis"])
    axes.tick_params(bottom=False, left=False, labelcolor=COLOURS["muted"], pad=6)
    axes.grid(axis="y", color=COLOURS["grid"], linewidth=1)
    axes.set_axisbelow(True)
    return figure, axes


def draw_line(axes: "Axes", line: Line, low: float, high: float) -> None:
    """One line: held-out figures dashed with a mark at each, a long curve faint with a smooth line over it.

    Peaks below `low` or above `high` end there.
    """
    colour = COLOURS[line.role]
    steps, values = column(line.curve.steps), column(line.curve.values).clip(low, high)
    marker: dict[str, Any] = {}
    if line.is_held_out:
        if len(steps) <= MOST_DOTS:
            marker = {"marker": "o", "markersize": 7, "markeredgecolor": COLOURS["card"], "markeredgewidth": 1.2}
        axes.plot(*thin(steps, values), color=colour, linewidth=2, dashes=(5, 2), zorder=4, **marker)
    elif len(steps) < SMOOTH_FROM or not line.is_noisy:
        if len(steps) < 4:  # one point makes no line
            marker = {"marker": "o", "markersize": 5}
        axes.plot(*thin(steps, values), color=colour, linewidth=2, zorder=3, **marker)
    else:
        axes.plot(*thin(steps, values), color=colour, linewidth=1, alpha=0.3, zorder=2)
        places = slice(None, None, max(1, len(steps) // 400))
        axes.plot(steps[places], smooth(values).clip(low, high)[places], color=colour, linewidth=2, zorder=3)


def label_axes(axes: "Axes", scale: Scale, across: str = "step") -> None:
    """A few round numbers on each axis; the first one across says what is counted there."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    steps = [1, 2, 2.5, 5, 10]
    low, high = axes.get_xlim()
    # With one tick allowed, a single step gets whole numbers too: by default fewer than two make matplotlib go to fractions.
    found = MaxNLocator(6, integer=bool(across), min_n_ticks=1, steps=steps).tick_values(low, high)
    places = [place for place in found if low <= place <= high]
    names = [short(place) for place in places]
    axes.set_xticks(places, [f"{across} {names[0]}".strip(), *names[1:]] if names else [])
    if across and places and (places[0] - low) / (high - low) < 0.1:
        axes.get_xticklabels()[0].set_horizontalalignment("left")  # in the middle it would run into the numbers of the other axis
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=scale == "count", steps=steps))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value, scale)))


def tick(value: float, scale: Scale) -> str:
    """A number on the upright axis."""
    if scale == "share":
        return share(value)
    return rate(value) if scale == "rate" else short(value)


def short(value: float) -> str:
    """A number in few characters: `12k`, `0.25`."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return signed(f"{value / (1e3 if letter == 'k' else size):g}{letter}")
    return signed(f"{value:.6g}")


def hover_bands(chart: Chart, axes: "Axes") -> Iterator[str]:
    """Strips from the left to the right of a chart, each with the values of its step, which browsers show under the pointer."""
    longest = max(chart.lines, key=lambda line: len(line.curve))
    steps = sorted({float(step) for step in column(longest.curve.steps)})
    steps = [
        steps[round(place * (len(steps) - 1) / max(1, min(MOST_BANDS, len(steps)) - 1))] for place in range(min(MOST_BANDS, len(steps)))
    ]
    to_x = axes.transData.transform
    places = [float(to_x((step, 0))[0]) for step in steps]
    edges = [LEFT, *((left + right) / 2 for left, right in pairwise(places)), WIDTH - RIGHT]
    columns = [(line, column(line.curve.steps)) for line in chart.lines]
    for step, (left, right) in zip(steps, pairwise(edges), strict=True):
        words = [f"step {step:,.0f}"]
        for line, line_steps in columns:
            place = int(line_steps.searchsorted(step, side="right")) - 1
            if place >= 0:
                at = "" if line_steps[place] == step else f" (step {line_steps[place]:,.0f})"
                words.append(f"{line.label or chart.title}: {show(line.curve.values[place], chart.scale)}{at}")
        title = escape("\n".join(words))
        yield f'<rect x="{left:.1f}" y="{TOP}" width="{right - left:.1f}" height="{HEIGHT - TOP - BOTTOM}"><title>{title}</title></rect>'


def draw_spread(spread: Spread) -> str:
    """A histogram of the held-out examples' figures: bars for now, an outline for before training.

    Returns:
        An `svg` element.
    """
    after, before = column(spread.after), column(spread.before)
    together = column([*spread.after, *spread.before])
    edges = bin_edges(*central_range(together), has_sides=spread.has_sides, num=len(after))
    inside = (edges[0] + 1e-9 * (edges[1] - edges[0]), edges[-1] - 1e-9 * (edges[1] - edges[0]))
    heights = histogram(after.clip(*inside), edges)
    figure, axes = canvas()
    width = edges[1] - edges[0]
    for left, height in zip(edges, heights, strict=False):
        if height:
            role = "held" if not spread.has_sides else "chosen" if left + width / 2 > 0 else "rejected"
            axes.bar(left + width / 2, height, width=width * 0.86, color=COLOURS[role], zorder=3)
    top = max(heights)
    if len(before) and before.min() == before.max():
        axes.axvline(before[0], color=COLOURS["axis"], linewidth=1.5, dashes=(4, 2), zorder=4)
        write_above(axes, before[0], f"before: all {plain(before[0])}", color=COLOURS["muted"])
    elif len(before):
        earlier = histogram(before.clip(*inside), edges)
        top = max(top, *earlier)
        axes.step(
            [edges[0], *edges, edges[-1]], [0, *earlier, earlier[-1], 0], where="post", color=COLOURS["axis"], linewidth=1.5, zorder=4
        )
    axes.set_ylim(0, top * 1.06)
    axes.set_xlim(edges[0] - width / 2, edges[-1] + width / 2)
    label_axes(axes, "count", across="")
    return inline_svg(written(figure), " ".join((f"{spread.title}.", *spread.says)))


def bin_edges(low: float, high: float, *, has_sides: bool, num: int) -> "Column":
    """Edges of bars of one width from the lowest to the highest value; where sides matter, 0 is one of them.

    Args:
        low, high: of the values.
        has_sides: whether no bar may hold values of both sides of 0.
        num: of values; many are cut finer.
    """
    import numpy as np

    if has_sides:
        low, high = min(low, 0.0), max(high, 0.0)
    if high == low:
        low, high = low - 0.5, high + 0.5
    width = (high - low) / max(6, min(30, round(2 * num**0.5)))
    first = math.floor(low / width) if has_sides else 0
    last = max(math.ceil(high / width), first + 1) if has_sides else round((high - low) / width)
    edges: Column = (0.0 if has_sides else low) + width * np.arange(first, last + 1)
    return edges


def histogram(values: "Column", edges: "Column") -> list[int]:
    """How many values lie between each edge and the next."""
    import numpy as np

    return [int(height) for height in np.histogram(values, edges)[0]]


def written(figure: "Figure") -> str:
    """The figure as matplotlib writes it."""
    import matplotlib

    text = io.StringIO()
    # Text as text, and the same names for the same things in every run: two pages of one run are equal.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "prefopt", "path.simplify": False}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return text.getvalue()


def inline_svg(text: str, description: str, bands: Sequence[str] = ()) -> str:
    """What matplotlib wrote, as an `svg` element for the inside of a page."""
    root = ElementTree.fromstring(text)
    defined = {
        element.get("id", ""): element for element in root.iter() if element.tag in (f"{SVG}path", f"{SVG}clipPath") and element.get("id")
    }
    parts = [part for child in root if child.tag == f"{SVG}g" for part in drawn(child, defined)]
    strips = f'<g class="bands">{"".join(bands)}</g>' if bands else ""
    label = escape(description, quote=True)
    return f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}{strips}</svg>'


def drawn(element: ElementTree.Element, defined: dict[str, ElementTree.Element]) -> Iterator[str]:
    """What an element shows: groups dissolved, references to paths replaced by the paths."""
    kind = element.tag.removeprefix(SVG)
    if kind == "g":
        for child in element:
            yield from drawn(child, defined)
    elif kind == "path":
        yield f'<path d="{path_data(element.get("d", ""))}"{style_of(element)}/>'
    elif kind == "text":
        yield text_of(element)
    elif kind == "use":
        name = (element.get("{http://www.w3.org/1999/xlink}href") or element.get("href") or "#")[1:]
        x, y = (f"{float(element.get(axis, 0)):.1f}" for axis in "xy")
        yield f'<path d="{path_data(defined[name].get("d", ""))}" transform="translate({x} {y})"{style_of(element)}/>'


def path_data(text: str) -> str:
    """A path with coordinates to a tenth of a unit, which no screen shows finer."""
    words = [word if word.isalpha() else f"{float(word):.1f}".removesuffix(".0") for word in text.split()]
    return " ".join(words).replace("-0 ", "0 ")


def style_of(element: ElementTree.Element) -> str:
    """How a path is painted, as attributes; those that are as SVG has them anyway are left out."""
    usual = {"stroke-linecap": "butt", "stroke-linejoin": "miter", "stroke-opacity": "1", "opacity": "1", "stroke-width": "1"}
    style = declarations(element)
    colours = {name: style.pop(name) for name in ("fill", "stroke") if name in style}
    shown = "".join(f"{name}:{paint(value)};" for name, value in colours.items())
    rest = "".join(f' {name}="{escape(value, quote=True)}"' for name, value in style.items() if usual.get(name) != value)
    return f' style="{shown}"{rest}' if shown else rest


def declarations(element: ElementTree.Element) -> dict[str, str]:
    """The `name: value` pairs of a style attribute."""
    pairs = (entry.split(":", 1) for entry in (element.get("style") or "").split(";") if ":" in entry)
    return {name.strip(): value.strip() for name, value in pairs}


def paint(value: str) -> str:
    """A marker colour as the page's variable, anything else as it is."""
    return next((f"var(--{name})" for name, colour in COLOURS.items() if colour == value.lower()), value)


def text_of(element: ElementTree.Element) -> str:
    """A text at its place; its size and font come from the page."""
    style = declarations(element)
    anchor = style.get("text-anchor", "start")
    colour = paint(style.get("fill", COLOURS["muted"]))
    words = escape("".join(element.itertext()))
    x, y = (f"{float(element.get(axis, 0)):.1f}" for axis in "xy")
    weight = ' font-weight="700"' if style.get("font-weight") in ("bold", "700") else ""
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}"{weight} style="fill:{colour}">{words}</text>'
