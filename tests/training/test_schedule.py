"""The learning rate by step, worked by hand."""

import pytest

from prefopt.methods.method import DefaultRates
from prefopt.training.optimizer import Schedule, usual_learning_rate


def rates(shape: str, steps: int = 10, warmup: float = 0.2) -> list[float]:
    schedule = Schedule(peak=1.0, num_steps=steps, warmup_ratio=warmup, shape=shape)
    return [schedule.at(step) for step in range(steps)]


def test_warm_up_rises_to_the_peak():
    for shape in ("cosine", "linear", "constant"):
        assert rates(shape)[:3] == [0.5, 1.0, 1.0]


def test_linear_falls_by_equal_steps():
    assert rates("linear")[2:] == pytest.approx([1 - k / 8 for k in range(8)])


def test_cosine_passes_its_half_in_the_middle():
    assert rates("cosine")[6] == pytest.approx(0.5)


def test_constant_stays():
    assert set(rates("constant", warmup=0.0)) == {1.0}


def test_one_step_takes_the_peak():
    assert rates("cosine", steps=1, warmup=0.1) == [1.0]


def test_usual_rates_grow_as_models_shrink():
    rates = DefaultRates(full=5e-7, adapter=5e-6)
    sizes = (7_000_000_000, 1_000_000_000, 500_000_000, 30_000_000, 2_000_000)
    assert [usual_learning_rate(rates, size, adapter=False) for size in sizes] == pytest.approx([5e-7, 5e-7, 1e-6, 1e-5, 5e-5])
    assert usual_learning_rate(rates, 7_000_000_000, adapter=True) == 5e-6
