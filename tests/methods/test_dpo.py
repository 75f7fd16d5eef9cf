"""DPO: numbers worked by hand, and what must hold whatever the numbers."""

import math

import pytest
import torch

from prefopt.losses import dpo_loss


def nats(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_worked_example():
    # Δ = (−10 − −12) − (−9 − −8) = 2 − (−1) = 3;  β·Δ = 0.3;  −log σ(0.3) = log(1 + e^−0.3) = 0.554355
    loss = dpo_loss(nats(-10), nats(-9), nats(-12), nats(-8), beta=0.1)
    assert loss.item() == pytest.approx(0.554355, abs=1e-6)


def test_worked_example_with_label_smoothing():
    # −0.8·log σ(0.3) − 0.2·log σ(−0.3) = 0.8·0.554355 + 0.2·0.854355 = 0.614355
    loss = dpo_loss(nats(-10), nats(-9), nats(-12), nats(-8), beta=0.1, label_smoothing=0.2)
    assert loss.item() == pytest.approx(0.614355, abs=1e-6)


def test_label_smoothing_mixes_both_labels():
    pair = (nats(-10), nats(-9), nats(-12), nats(-8))
    swapped = (pair[1], pair[0], pair[3], pair[2])
    expected = 0.8 * dpo_loss(*pair, beta=0.1) + 0.2 * dpo_loss(*swapped, beta=0.1)
    torch.testing.assert_close(dpo_loss(*pair, beta=0.1, label_smoothing=0.2), expected)


def test_log_two_where_policy_is_reference():
    chosen, rejected = nats(-3.5, -1e4), nats(-700.0, -1e-9)
    assert dpo_loss(chosen, rejected, chosen, rejected, beta=0.5).tolist() == pytest.approx([math.log(2)] * 2)


def test_gradient_pushes_chosen_up_and_rejected_down_equally():
    chosen, rejected = nats(-10).requires_grad_(), nats(-9).requires_grad_()
    dpo_loss(chosen, rejected, nats(-12), nats(-8), beta=0.1).sum().backward()
    # dloss/dℓ_c = −β·σ(−βΔ)
    assert chosen.grad.item() == pytest.approx(-0.1 / (1 + math.exp(0.3)))
    assert rejected.grad.item() == pytest.approx(-chosen.grad.item())


@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_gradient_is_the_derivative(label_smoothing: float):
    generator = torch.Generator().manual_seed(0)
    pair = [(-20 * torch.rand(4, dtype=torch.float64, generator=generator)).requires_grad_() for _ in range(4)]
    assert torch.autograd.gradcheck(lambda *values: dpo_loss(*values, beta=0.7, label_smoothing=label_smoothing), pair)


def test_finite_for_extreme_margins():
    loss = dpo_loss(nats(-1e4, -1e-9), nats(-1e-9, -1e4), nats(0, 0), nats(0, 0), beta=1.0)
    assert loss.tolist() == pytest.approx([1e4, 0.0])


def test_shift_of_both_log_probabilities_changes_nothing():
    # A function of the prompt alone cancels: the implicit reward is defined up to one.
    base = dpo_loss(nats(-10), nats(-9), nats(-12), nats(-8), beta=0.1)
    torch.testing.assert_close(dpo_loss(nats(-13), nats(-12), nats(-12), nats(-8), beta=0.1), base)


def test_beta_scales_the_margin():
    assert dpo_loss(nats(-10), nats(-9), nats(-12), nats(-8), beta=0.2).item() == pytest.approx(math.log1p(math.exp(-0.6)))
