"""What the options put in the place of log-ratios, and by what they weigh: against oracles, derivatives, the ends."""

import math

import pytest
import torch
from tests.methods import oracles
from tests.methods.numbers import numbers

from prefopt.methods import options


@pytest.mark.parametrize("divergence", ["reverse-kl", "forward-kl", "js", "alpha"])
def test_f_scores_differ_as_the_slopes_of_f_do(divergence: str):
    ratios = numbers(-2.0, -0.3, 0.0, 0.4, 1.7)
    alpha = 0.3 if divergence == "alpha" else None
    scores = options.f_score(ratios, divergence=divergence, alpha=alpha)
    slopes = numbers(*[oracles.f_slope(math.exp(ratio), divergence, 0.3) for ratio in ratios.tolist()])
    torch.testing.assert_close(scores - scores[2], slopes - slopes[2], rtol=1e-5, atol=1e-6)
    assert torch.autograd.gradcheck(lambda x: options.f_score(x, divergence=divergence, alpha=alpha), [ratios.requires_grad_()])


@pytest.mark.parametrize("divergence", ["reverse-kl", "forward-kl", "js", "alpha"])
def test_f_scores_are_finite_at_the_ends(divergence: str):
    ratios = torch.tensor([-1e4, 1e4], requires_grad=True)
    scores = options.f_score(ratios, divergence=divergence, alpha=0.5)
    scores.sum().backward()
    assert bool(torch.isfinite(scores).all())
    assert bool(torch.isfinite(ratios.grad).all())


def test_the_alpha_divergence_goes_from_reverse_to_forward_kl():
    ratios = numbers(-2.0, 0.4)
    near, far = (options.f_score(ratios, divergence="alpha", alpha=alpha) for alpha in (1e-7, 1 - 1e-7))
    torch.testing.assert_close(near, ratios, rtol=1e-5, atol=0)
    torch.testing.assert_close(far, 1 + options.f_score(ratios, divergence="forward-kl"), rtol=1e-5, atol=1e-5)
    # TRL's coefficient is one minus ours: e^{(α'−1)x} / (α'−1) up to its constant
    coefficient = 1 - 0.3
    theirs = (torch.exp((coefficient - 1) * ratios) - 1) / (coefficient - 1)
    torch.testing.assert_close(options.f_score(ratios, divergence="alpha", alpha=0.3), theirs)


@pytest.mark.parametrize("clamp", [True, False])
def test_wpo_agrees_with_the_oracle(clamp: bool):
    distributions = torch.randn(5, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64).mul(2).log_softmax(-1)
    own, other = (
        distributions.gather(1, targets[:, None])[:, 0] for targets in (distributions.argmax(1), torch.zeros(5, dtype=torch.long))
    )
    squares = (2 * distributions).logsumexp(-1)
    shares = distributions.exp().tolist()
    found = []
    for pair in ((own, own), (own, other), (other, own), (other, other)):  # the policy's own words, and others
        weight = options.wpo_weight(*[(logps - squares).mean()[None] for logps in pair], clamp=clamp)
        assert weight.item() == pytest.approx(oracles.wpo(*[(logps.tolist(), shares) for logps in pair], clamp=clamp))
        found.append(weight.item())
    assert (max(found) == 1.0) == clamp
    assert found[1] == found[2] < 1.0


def test_wpo_clamps_the_product_and_not_each_answer():
    # 2 · ½ = 1, where two clamped answers would give ½; 2 · ¾ is clamped
    two, half, more = math.log(2.0), math.log(0.5), math.log(0.75)
    weights = options.wpo_weight(numbers(two, two, half), numbers(half, more, half))
    assert weights.tolist() == pytest.approx([1.0, 1.0, 0.25])
    assert options.wpo_weight(numbers(two, two), numbers(half, more), clamp=False).tolist() == pytest.approx([1.0, 1.5])


def test_a_weight_carries_no_gradient():
    logp = numbers(-2.0).requires_grad_()
    assert not options.wpo_weight(logp, numbers(-1.0)).requires_grad


def test_weights_are_finite_at_the_ends():
    ends = torch.tensor([-1e4, 1e4])
    for clamp in (True, False):
        weights = options.wpo_weight(ends[:, None], ends, clamp=clamp)
        assert bool(torch.isfinite(weights).all())
        assert bool((weights >= 0).all())


def test_tail_weights_agree_with_the_oracle():
    chosen, rejected = [-1.0, -2.0, -3.0, -4.0], [-5.0, -6.0]
    lengths, shorter = torch.tensor([4, 2]), torch.tensor([2, 2])
    weights = options.tail_weights(lengths, shorter, alpha=0.25, num_tokens=6, dtype=torch.float64)
    weighted = (numbers(*chosen, *rejected) * weights).split([4, 2])
    assert tuple(part.sum().item() for part in weighted) == oracles.ld(chosen, rejected, alpha=0.25)
