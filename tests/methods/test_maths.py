"""The functions that losses and metrics are made of, against what they estimate."""

import torch

from prefopt.methods.maths import divergence


def test_a_token_by_hand():
    d = torch.tensor([0.0, 1.0, -1.0, 50.0, -50.0], dtype=torch.float64)
    expected = torch.tensor([0.0, 0.36787944117144233, 0.26424111765711533, 49.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(divergence(d), expected)


def test_near_the_reference_it_is_half_the_square():
    d = torch.linspace(-1e-2, 1e-2, 9)
    torch.testing.assert_close(divergence(d), d.square() / 2, rtol=1e-2, atol=1e-8)


def test_it_is_never_negative_in_float32():
    assert bool((divergence(torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * 1e-4) >= 0).all())


def test_its_mean_is_the_divergence():
    """In the mean over the tokens of either, close to the reference."""
    generator = torch.Generator().manual_seed(1)
    reference = torch.randn(50, generator=generator, dtype=torch.float64).log_softmax(-1)
    policy = (reference + 0.05 * torch.randn(50, generator=generator, dtype=torch.float64)).log_softmax(-1)
    true = (policy.exp() * (policy - reference)).sum()
    for weights in (policy.exp(), reference.exp()):
        torch.testing.assert_close((weights * divergence(policy - reference)).sum(), true, rtol=0.05, atol=0)


def test_a_token_that_nobody_says_counts_one_nat_at_most_however_unlikely_it_becomes():
    assert float(divergence(torch.tensor(-1000.0))) == 1.0
    assert bool(torch.isfinite(divergence(torch.tensor([-1e4, 1e4, -3e38, 3e38]))).all())
