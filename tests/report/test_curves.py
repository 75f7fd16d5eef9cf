"""Curves made fit to be drawn."""

import numpy as np
import pytest

from prefopt.report.curves import central_range, smooth, thin


def test_short_curves_stay_as_they_are():
    steps, values = np.arange(1000.0), np.arange(1000.0)
    kept_steps, kept_values = thin(steps, values)
    assert kept_steps is steps
    assert kept_values is values


@pytest.mark.parametrize("num", [1001, 1999, 100_000])
def test_thinned_curves_keep_every_extreme_the_ends_and_the_order(num: int):
    steps = np.arange(1.0, num + 1)
    values = np.random.default_rng(0).normal(size=num)
    values[[num // 3, num // 2]] = (50.0, -50.0)
    kept_steps, kept_values = thin(steps, values)
    assert len(kept_steps) <= 1000
    assert len(kept_steps) > 500
    assert (kept_values.max(), kept_values.min()) == (50.0, -50.0)
    assert (kept_steps[0], kept_steps[-1]) == (1.0, num)
    assert (np.diff(kept_steps) > 0).all()
    assert (values[kept_steps.astype(int) - 1] == kept_values).all()


def test_a_straight_line_stays_straight_to_its_ends():
    values = 3.0 - 0.5 * np.arange(101.0)
    assert smooth(values) == pytest.approx(values)


def test_smoothing_is_the_least_squares_line_through_the_neighbours():
    values = np.random.default_rng(0).normal(size=60)
    smoothed = smooth(values)  # a tenth of 60, so three neighbours on each side
    for place in (0, 1, 30, 59):
        near = np.arange(max(0, place - 3), min(59, place + 3) + 1)
        slope, height = np.polyfit(near, values[near], 1)
        assert smoothed[place] == pytest.approx(slope * place + height)


def test_smoothing_takes_noise_away():
    values = np.random.default_rng(0).normal(size=2000)
    assert smooth(values).std() < 0.15 * values.std()


def test_rare_peaks_do_not_decide_the_range_and_common_ones_do():
    values = np.concatenate([np.linspace(0.0, 1.0, 299), [1000.0]])
    low, high = central_range(values)
    assert low == 0.0
    assert 1.0 < high < 1.3
    steady = np.linspace(0.0, 1.0, 300)
    assert central_range(steady) == (0.0, 1.0)
    few = np.array([0.0, 1.0, 1000.0])
    assert central_range(few) == (0.0, 1000.0)
