"""Curves made fit to be drawn: few points that keep every extreme, and a smooth line through noise."""

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Column = NDArray[np.float64]

MOST_POINTS = 1000
"""Points of a drawn curve: about two for each of its pixels."""

SMOOTH_FROM = 30
"""Points from which a smooth line is drawn beside the curve; fewer are seen better as they are."""

SMOOTH_SHARE = 1 / 10
"""Share of the steps that a point of the smooth line is fitted to."""


def thin(steps: "Column", values: "Column", most: int = MOST_POINTS) -> "tuple[Column, Column]":
    """At most so many of the points, among them the lowest and the highest of every stretch, the first and the last.

    Args:
        steps, values: of the same length.
        most: points to keep; at least 4.
    """
    num = len(steps)
    if num <= most:
        return steps, values
    edges = np.linspace(0, num, (most - 2) // 2 + 1).astype(int)
    kept = {0, num - 1}
    for start, end in pairwise(edges):
        kept |= {start + int(values[start:end].argmin()), start + int(values[start:end].argmax())}
    places = np.array(sorted(kept))
    return steps[places], values[places]


def smooth(values: "Column", share: float = SMOOTH_SHARE) -> "Column":
    """At each value the height of the straight line that fits it and its neighbours best; as many values as before.

    A line and not a mean, because at the ends, where the neighbours are on one side, a mean would bend every slope.

    Args:
        values: evenly spaced, at least two.
        share: of all values that a line is fitted to.
    """
    num = len(values)
    half = max(2, int(num * share / 2))
    places = np.arange(num, dtype=np.float64)
    first = np.maximum(0, np.arange(num) - half)
    last = np.minimum(num - 1, np.arange(num) + half) + 1

    def over(summands: "Column") -> "Column":
        sums = np.concatenate([[0.0], np.cumsum(summands)])
        totals: Column = sums[last] - sums[first]
        return totals

    # Least squares: y(x) = mean + slope (x - mean x), slope = covariance / variance, from sums over each stretch.
    counts = (last - first).astype(np.float64)
    mean_place, mean_value = over(places) / counts, over(values) / counts
    covariance = over(places * values) / counts - mean_place * mean_value
    variance = (counts**2 - 1) / 12  # of consecutive whole numbers
    smoothed: Column = mean_value + covariance / variance * (places - mean_place)
    return smoothed


def central_range(values: "Column") -> tuple[float, float]:
    """Lowest and highest value, without rare peaks that would flatten all else: those are left out where the middle 98 % take up less
    than an eighth of the whole range."""
    low, high = float(values.min()), float(values.max())
    if len(values) < SMOOTH_FROM:
        return low, high
    inner_low, inner_high = (float(edge) for edge in np.quantile(values, (0.01, 0.99)))
    if (inner_high - inner_low) * 8 >= high - low:
        return low, high
    room = (inner_high - inner_low) * 0.15
    return max(low, inner_low - room), min(high, inner_high + room)


def column(values: Any) -> "Column":
    """An array of a curve's column."""
    return np.asarray(values, dtype=np.float64)
