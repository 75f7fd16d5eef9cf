"""Implicit reward accuracy, by hand."""

import math

import pytest
import torch

from prefopt.evaluate.reward_accuracy import reward_accuracy


def nats(*values: float) -> torch.Tensor:
    return torch.tensor(values)


def test_worked_example() -> None:
    # log-ratios: chosen 2, -1, 0; rejected -1, 1, 0; margins 0.1·(3, -2, 0); accuracy (1 + 0 + ½)/3
    figures = reward_accuracy(nats(-10, -5, -3), nats(-9, -6, -4), nats(-12, -4, -3), nats(-8, -7, -4), beta=0.1)
    assert figures.accuracy == pytest.approx(0.5)
    assert figures.accuracy_error == pytest.approx(math.sqrt(0.25 / 3))
    assert figures.margin == pytest.approx(0.1 / 3)
    losses = [math.log(1 + math.exp(-margin)) for margin in (0.3, -0.2, 0.0)]
    assert figures.loss == pytest.approx(sum(losses) / 3)
    assert figures.num_pairs == 3


def test_a_policy_that_is_its_reference_scores_one_half() -> None:
    chosen, rejected = nats(-700.5, -0.1), nats(-3.0, -1e4)
    figures = reward_accuracy(chosen, rejected, chosen, rejected, beta=0.5)
    assert (figures.accuracy, figures.margin) == (0.5, 0.0)
    assert figures.loss == pytest.approx(math.log(2))


def test_beta_scales_margins_and_not_accuracy() -> None:
    pair = (nats(-10, -5, -3), nats(-9, -6, -5), nats(-12, -4, -3), nats(-8, -7, -4))
    small, large = reward_accuracy(*pair, beta=0.1), reward_accuracy(*pair, beta=1.0)
    assert large.margin == pytest.approx(10 * small.margin)
    assert large.accuracy == small.accuracy == pytest.approx(2 / 3)


@pytest.mark.parametrize("lengths", [(0, 0, 0, 0), (2, 2, 2, 1), (1, 2, 2, 2)])
def test_refuses_vectors_that_do_not_fit(lengths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="four vectors of the same length"):
        reward_accuracy(*(torch.zeros(length) for length in lengths), beta=0.1)
