"""Charts of a benchmark as one SVG file, which is light or dark as the page around it is."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from prefopt.report.draw import HEIGHT, WIDTH

STYLE = """
svg { --card: #ffffff; --ink: #1c1c1a; --muted: #63625c; --grid: #ecebe7; --axis: #a8a69f;
  --train: #2b6cb8; --held: #b4500b; --chosen: #0d746b; --rejected: #983d82; --warning: #b0281f; --note: #4d5b6e }
@media (prefers-color-scheme: dark) { svg { --card: #1c1c1e; --ink: #ebebe8; --muted: #a6a49d; --grid: #2a2a2e; --axis: #6a6964;
  --train: #78b0f0; --held: #f0a45f; --chosen: #53cfbf; --rejected: #e49bd1; --warning: #f58b83; --note: #a9b6c8 } }
text { font: 13px system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", Arial, sans-serif }
.title { font-size: 16px; font-weight: 600; fill: var(--ink) } .says { fill: var(--muted) }
"""

HEAD, GAP, EDGE = 52, 40, 20
"""Room above a panel for its words, between two panels, and around all."""


@dataclass(frozen=True)
class Panel:
    """A chart with its words, as an `svg` element."""

    title: str
    says: str
    chart: str


def together(panels: Sequence[Panel]) -> str:
    """The panels as one file, two in a row."""
    width = 2 * EDGE + 2 * WIDTH + GAP
    height = 2 * EDGE + 2 * (HEAD + HEIGHT) + GAP
    parts = []
    for place, panel in enumerate(panels):
        x, y = EDGE + (place % 2) * (WIDTH + GAP), EDGE + (place // 2) * (HEAD + HEIGHT + GAP)
        parts.append(f'<text class="title" x="{x}" y="{y + 16}">{escape(panel.title)}</text>')
        parts.append(f'<text class="says" x="{x}" y="{y + 38}">{escape(panel.says)}</text>')
        parts.append(panel.chart.replace("<svg ", f'<svg x="{x}" y="{y + HEAD}" width="{WIDTH}" height="{HEIGHT}" ', 1))
    return framed(width, height, parts, " ".join(f"{panel.title}: {panel.says}." for panel in panels))


def framed(width: float, height: float, parts: Sequence[str], described: str) -> str:
    """Elements as a file of their own, with the words for who does not see them."""
    words = escape(described, quote=True)
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{words}">'
    ground = f'<rect width="{width:g}" height="{height:g}" style="fill:var(--card)"/>'
    return "\n".join([opening, f"<style>{STYLE}</style>", ground, *parts, "</svg>\n"])
