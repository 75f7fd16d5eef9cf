"""The pure losses of all methods: numbers worked by hand, an oracle, derivatives, and what must hold at the ends."""

import doctest
import inspect
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from tests.methods import oracles
from torch import Tensor

from prefopt import losses
from prefopt.methods import bco, comparisons, dpo, kto, maths, options, pair_method, pairs, ranked, thumbs
from prefopt.methods.maths import log_odds

PAIR = (-10.0, -9.0, -12.0, -8.0)
"""Chosen, rejected, and both under the reference: log-ratios 2 and −1, Δ = 3."""

MEANS = (-1.0, -2.0)
"""Means per token of chosen and rejected."""


@dataclass(frozen=True)
class Case:
    """A loss with settings: on four log-probabilities of a pair, or on two."""

    loss: Callable[..., Tensor]
    oracle: Callable[..., float]
    settings: dict[str, Any]
    by_hand: float
    """On `PAIR`, or `MEANS`."""
    at_reference: float
    """Where policy and reference agree, or both answers are as likely."""
    oracle_settings: dict[str, Any] | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def num(self) -> int:
        return 2 if self.loss in (losses.simpo_loss, losses.cpo_loss, losses.orpo_loss, losses.reward_loss) else 4

    def __call__(self, *values: Tensor) -> Tensor:
        shaped = {name: tensor.to(values[0].dtype).expand(values[0].shape) for name, tensor in self.tensors.items()}
        return self.loss(*values, **shaped, **self.settings)

    def expected(self, *values: float) -> float:
        return self.oracle(*values, **(self.settings if self.oracle_settings is None else self.oracle_settings))


LOG2 = math.log(2)
CASES = {
    # log(1 + e^−0.3) = 0.554355, and log(1 + e^0.3) = 0.854355
    "dpo": Case(losses.dpo_loss, oracles.dpo, {"beta": 0.1}, 0.554355, LOG2),
    "cdpo": Case(losses.dpo_loss, oracles.dpo, {"beta": 0.1, "label_smoothing": 0.2}, 0.8 * 0.554355 + 0.2 * 0.854355, LOG2),
    "robust": Case(
        losses.robust_loss, oracles.robust, {"beta": 0.1, "label_smoothing": 0.2}, (0.8 * 0.554355 - 0.2 * 0.854355) / 0.6, LOG2
    ),
    "ipo": Case(losses.ipo_loss, oracles.ipo, {"beta": 0.1}, (3.0 - 5.0) ** 2, 25.0),
    "hinge": Case(losses.hinge_loss, oracles.hinge, {"beta": 0.1}, 0.7, 1.0),
    "ln-dpo": Case(losses.ln_dpo_loss, oracles.dpo, {"beta": 0.1, "label_smoothing": 0.2}, 0.8 * 0.554355 + 0.2 * 0.854355, LOG2),
    # the chosen one has risen, so there is no penalty; log σ(0.3) as above
    "dpop": Case(losses.dpop_loss, oracles.dpop, {"beta": 0.1, "penalty": 5.0}, 0.554355, LOG2),
    # 0.3 + 0.01·(30 − 10) = 0.5; log(1 + e^−0.5) = 0.474077;  at the reference log(1 + e^−0.2) = 0.598139
    "rdpo": Case(
        losses.rdpo_loss,
        oracles.rdpo,
        {"beta": 0.1, "length_weight": 0.01},
        0.474077,
        0.598139,
        {"beta": 0.1, "length_weight": 0.01, "longer": 20.0},
        {"length_chosen_B": torch.tensor(30.0), "length_rejected_B": torch.tensor(10.0)},
    ),
    # p = σ(0.3) = 0.574443; p·log(p/0.75) + (1−p)·log((1−p)/0.25) = −0.153188 + 0.226370 = 0.073182; ½·log(½/¾) + ½·log(½/¼)
    "exo": Case(losses.exo_loss, oracles.exo, {"beta": 0.1, "label_smoothing": 0.25}, 0.073182, 0.143841),
    # rewards 0.2 and −0.1: 0.598139 + ½·0.798139 + ½·0.644397
    "nca": Case(losses.nca_loss, oracles.nca, {"beta": 0.1}, 0.598139 + 0.399070 + 0.322198, 2 * LOG2),
    # −log σ(0.2 − 0.05) − log σ(−(−0.1 − 0.05)) = 2·log(1 + e^−0.15);  −log σ(−0.05) − log σ(0.05)
    "bco": Case(losses.bco_loss, oracles.bco, {"beta": 0.1, "shift": 0.05}, 2 * 0.620957, 0.718460 + 0.668460),
    "sppo": Case(losses.sppo_loss, oracles.sppo, {"beta": 0.1}, 3.0**2 + 4.0**2, 50.0),
    "apo-zero": Case(losses.apo_zero_loss, oracles.apo_zero, {"beta": 0.1}, 1 - 0.549834 + 0.475021, 1.0),
    "apo-down": Case(losses.apo_down_loss, oracles.apo_down, {"beta": 0.1}, 0.549834 + 1 - 0.574443, 1.0),
    # m = σ(0.3/0.5) = 0.645656; (1 − m)·0.554355 + m·e^−0.3
    "discopop": Case(
        losses.discopop_loss, oracles.discopop, {"beta": 0.1, "tau": 0.5}, 0.354344 * 0.554355 + 0.645656 * 0.740818, LOG2 / 2 + 0.5
    ),
    # 2·(−1 − −2) − 1 = 1; log(1 + e^−1) = 0.313262;  at equal means log(1 + e^1) = 1.313262
    "simpo": Case(
        losses.simpo_loss,
        oracles.simpo,
        {"beta": 2.0, "gamma": 1.0, "label_smoothing": 0.1},
        0.9 * 0.313262 + 0.1 * 1.313262,
        0.9 * 1.313262 + 0.1 * 0.313262,
        {"beta": 2.0, "gamma_beta_ratio": 0.5, "label_smoothing": 0.1},
    ),
    "cpo": Case(losses.cpo_loss, oracles.cpo, {"beta": 0.3, "label_smoothing": 0.2}, 0.8 * 0.554355 + 0.2 * 0.854355, LOG2),
    # −1 − −2 − 0.5 = 0.5; log(1 + e^−0.5) = 0.474077 and log(1 + e^0.5) = 0.974077;  at equal scores the same with their signs
    "reward": Case(
        losses.reward_loss,
        oracles.reward,
        {"label_smoothing": 0.2},
        0.8 * 0.474077 + 0.2 * 0.974077,
        0.8 * 0.974077 + 0.2 * 0.474077,
        {"label_smoothing": 0.2, "margin": 0.5},
        {"margin_B": torch.tensor(0.5)},
    ),
    # odds e^−1/(1−e^−1) = 0.581977 and e^−2/(1−e^−2) = 0.156518; log of their ratio 1.313262; −log σ of it
    "orpo": Case(losses.orpo_loss, oracles.orpo, {}, 0.238183, LOG2),
}
ALL = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def numbers(*values: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def drawn(num: int, size: int, *, low: float = -6.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [low * torch.rand(size, dtype=torch.float64, generator=generator) - 1e-3 for _ in range(num)]


@ALL
def test_worked_by_hand(case: Case):
    values = PAIR if case.num == 4 else MEANS if case.loss is not losses.cpo_loss else (-10.0, -11.0)
    assert case(*map(numbers, values)).item() == pytest.approx(case.by_hand, abs=2e-6)


@ALL
def test_agrees_with_the_oracle(case: Case):
    values = drawn(case.num, 200)
    expected = [case.expected(*row) for row in zip(*(value.tolist() for value in values), strict=True)]
    torch.testing.assert_close(case(*values), numbers(*expected), rtol=1e-9, atol=1e-12)


@ALL
def test_gradient_is_the_derivative(case: Case):
    values = [value.requires_grad_() for value in drawn(case.num, 5)]
    assert torch.autograd.gradcheck(case, values)


@ALL
def test_where_policy_is_reference(case: Case):
    chosen, rejected = numbers(-3.5, -700.0, -1e-9), numbers(-7.0, -1e-9, -700.0)
    values = (chosen, rejected, chosen, rejected) if case.num == 4 else (chosen, chosen)
    assert case(*values).tolist() == pytest.approx([case.at_reference] * 3, abs=2e-6)


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finite_at_the_ends(case: Case, dtype: torch.dtype):
    """Log-probabilities of −1e4 and −1e-9 in every place, with gradients."""
    ends = torch.cartesian_prod(*[numbers(-1e4, -1e-9, dtype=dtype)] * case.num).unbind(1)
    values = [end.clone().requires_grad_() for end in ends]
    loss = case(*values)
    loss.sum().backward()
    assert bool(torch.isfinite(loss).all())
    assert all(bool(torch.isfinite(value.grad).all()) for value in values)


@ALL
def test_narrow_numbers_are_computed_with_in_float32(case: Case):
    values = [value.to(torch.bfloat16) for value in drawn(case.num, 50)]
    loss = case(*values)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, case(*[value.float() for value in values]), rtol=0, atol=0)


@ALL
def test_each_example_has_its_own_loss(case: Case):
    """Masked equals absent: the others in the batch change nothing."""
    values = drawn(case.num, 6)
    torch.testing.assert_close(case(*values)[2:4], case(*[value[2:4] for value in values]), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["dpo", "cdpo", "robust", "ln-dpo", "cpo", "hinge", "ipo", "exo"])
def test_swapping_the_answers_swaps_the_label(name: str):
    """What depends on the margin alone sees its negative: so the gradient on one answer is minus that on the other."""
    case = CASES[name]
    values = [value.requires_grad_() for value in drawn(case.num, 20)]
    case(*values).sum().backward()
    torch.testing.assert_close(values[0].grad, -values[1].grad)


@pytest.mark.parametrize("name", ["cdpo", "ln-dpo", "cpo", "simpo"])
def test_smoothing_mixes_both_labels(name: str):
    case = CASES[name]
    hard = case.settings | {"label_smoothing": 0.0}
    values = drawn(case.num, 20)
    plain = case.loss(*values, **hard)
    if name == "simpo":  # the margin is asked of the labelled side, whichever it is: the logit as a whole is negated
        flipped = plain + 2.0 * (values[0] - values[1]) - 1.0
    else:
        flipped = case.loss(*(values[place] for place in (1, 0, 3, 2)[: case.num]), **hard)
    epsilon = case.settings["label_smoothing"]
    torch.testing.assert_close(case(*values), (1 - epsilon) * plain + epsilon * flipped)


def test_robust_is_unbiased_under_flips():
    values = drawn(4, 20)
    swapped = [values[place] for place in (1, 0, 3, 2)]
    case = CASES["robust"]
    torch.testing.assert_close(0.8 * case(*values) + 0.2 * case(*swapped), losses.dpo_loss(*values, beta=0.1))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "beta" in case.settings and name not in ("ipo", "sppo", "rdpo")])
def test_beta_scales_log_ratios(name: str):
    """Twice the beta on half the log-probabilities is the same; in ipo and sppo beta is a goal, in rdpo length stands beside."""
    case = CASES[name]
    values = drawn(case.num, 20)
    doubled = case.settings | {"beta": 2 * case.settings["beta"]}
    torch.testing.assert_close(case.loss(*[value / 2 for value in values], **doubled), case(*values))


@pytest.mark.parametrize(
    ("loss", "settings"),
    [
        (losses.robust_loss, {"label_smoothing": 0.0}),
        (losses.dpop_loss, {"penalty": 0.0}),
        (losses.rdpo_loss, {"length_weight": 0.0, "length_chosen_B": numbers(3.0), "length_rejected_B": numbers(900.0)}),
        (losses.ln_dpo_loss, {}),
    ],
    ids=["robust", "dpop", "rdpo", "ln-dpo"],
)
def test_with_its_own_part_at_nothing_it_is_dpo(loss: Callable[..., Tensor], settings: dict[str, Any]):
    values = drawn(4, 20)
    torch.testing.assert_close(loss(*values, beta=0.4, **settings), losses.dpo_loss(*values, beta=0.4), rtol=0, atol=0)


def test_dpop_punishes_a_chosen_answer_that_fell():
    # Δ = (−13 − −12) − (−9 − −8) = 0, fallen by 1: −log σ(0.1·(0 − 5)) = log(1 + e^0.5) = 0.974077
    loss = losses.dpop_loss(numbers(-13), numbers(-9), numbers(-12), numbers(-8), beta=0.1, penalty=5.0)
    assert loss.item() == pytest.approx(0.974077, abs=1e-6)


def test_exo_is_least_where_the_policy_is_as_sure_as_the_label():
    goal = math.log(0.75 / 0.25) / 0.1
    margins = numbers(goal - 1, goal, goal + 1)
    values = losses.exo_loss(margins, *[torch.zeros_like(margins)] * 3, beta=0.1, label_smoothing=0.25)
    assert values[1].item() == pytest.approx(0, abs=1e-12)
    assert min(values[0], values[2]) > 1e-6


def test_discopop_is_finite_where_its_factors_are_not():
    worst = losses.discopop_loss(numbers(-1e4), numbers(-1e-9), numbers(-1e-9), numbers(-1e4), beta=1.0)
    assert worst.item() == pytest.approx(2e4)  # the logistic part; m·e^{−x} is e^{−19x}


@pytest.mark.parametrize("logp", [-1e-9, -1e-6, -0.3, -0.6931, -0.6932, -5.0, -50.0, -1e4])
def test_log_odds_keep_their_digits_in_float32(logp: float):
    # log(p/(1−p)) = log p − log(−expm1(log p)), in float64
    expected = logp - math.log(-math.expm1(logp))
    given = torch.tensor(logp, dtype=torch.float32)
    exact = given.item() - math.log(-math.expm1(given.item()))
    assert log_odds(given).item() == pytest.approx(exact, rel=1e-6, abs=1e-7)
    assert exact == pytest.approx(expected, rel=1e-5, abs=1e-6)


# Thumbs.


def thumbs_of(size: int) -> tuple[Tensor, Tensor, Tensor]:
    logps, ref = drawn(2, size)
    return logps, ref, torch.arange(size) % 3 > 0


def test_kto_by_hand():
    # r = 2 and −1, z0 = 0.5: λ_D·(1 − σ(0.1·1.5)) = 2·0.462570; λ_U·(1 − σ(0.1·(0.5 + 1))) = 3·0.462570
    loss = losses.kto_loss(
        numbers(-10, -9), numbers(-12, -8), torch.tensor([True, False]), z0=0.5, beta=0.1, desirable_weight=2.0, undesirable_weight=3.0
    )
    assert loss.tolist() == pytest.approx([2 * 0.462570, 3 * 0.462570], abs=1e-5)


def test_kto_agrees_with_the_oracle():
    logps, ref, is_up = thumbs_of(100)
    found = losses.kto_loss(logps, ref, is_up, z0=0.7, beta=0.4, desirable_weight=1.5, undesirable_weight=0.5)
    rows = zip(logps.tolist(), ref.tolist(), is_up.tolist(), strict=True)
    expected = [oracles.kto(p, q, up=up, z0=0.7, beta=0.4, desirable=1.5, undesirable=0.5) for p, q, up in rows]
    torch.testing.assert_close(found, numbers(*expected))


def test_bco_thumbs_agree_with_the_oracle_and_with_pairs():
    logps, ref, is_up = thumbs_of(100)
    found = losses.bco_thumbs_loss(logps, ref, is_up, beta=0.4, shift=0.3)
    rows = zip(logps.tolist(), ref.tolist(), is_up.tolist(), strict=True)
    torch.testing.assert_close(found, numbers(*[oracles.bco_thumb(p, q, up=up, beta=0.4, shift=0.3) for p, q, up in rows]))
    chosen, rejected, ref_chosen, ref_rejected = drawn(4, 10)
    both = [
        losses.bco_thumbs_loss(logps, ref, torch.full((10,), up), beta=0.4, shift=0.3)
        for logps, ref, up in ((chosen, ref_chosen, True), (rejected, ref_rejected, False))
    ]
    torch.testing.assert_close(losses.bco_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.4, shift=0.3), sum(both))


@pytest.mark.parametrize(
    "loss", [losses.bco_thumbs_loss, lambda *values, beta: losses.kto_loss(*values, z0=0.2, beta=beta)], ids=["bco", "kto"]
)
def test_thumbs_at_the_ends_and_their_gradients(loss: Callable[..., Tensor]):
    ends = torch.cartesian_prod(numbers(-1e4, -1e-9, dtype=torch.float32), numbers(-1e4, -1e-9, dtype=torch.float32))
    for up in (True, False):
        logps, ref = (end.clone().requires_grad_() for end in ends.unbind(1))
        found = loss(logps, ref, torch.full((4,), up), beta=1.0)
        found.sum().backward()
        assert bool(torch.isfinite(found).all())
        assert bool(torch.isfinite(logps.grad).all())
    logps, ref, is_up = thumbs_of(6)
    assert torch.autograd.gradcheck(lambda *values: loss(*values, is_up, beta=0.7), [logps.requires_grad_(), ref.requires_grad_()])
    narrow = loss(logps.bfloat16(), ref.bfloat16(), is_up, beta=0.7)
    assert narrow.dtype == torch.float32


def test_a_thumb_up_pulls_up_and_a_thumb_down_pushes_down():
    for loss in (lambda *values: losses.kto_loss(*values, z0=0.0, beta=0.1), lambda *values: losses.bco_thumbs_loss(*values, beta=0.1)):
        logps = numbers(-3.0, -3.0).requires_grad_()
        loss(logps, numbers(-3.0, -3.0), torch.tensor([True, False])).sum().backward()
        assert logps.grad[0] < 0 < logps.grad[1]


# Rankings.


def table(*rows: list[float]) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    exists = torch.tensor([[place < len(row) for place in range(width)] for row in rows])
    return torch.tensor([row + [0.0] * (width - len(row)) for row in rows], dtype=torch.float64), exists


def test_plackett_luce_by_hand():
    # e^1/(e^1 + e^0) · 1 = 0.731059; three equal rewards: 1/3 · 1/2
    rewards, exists = table([1.0, 0.0], [0.0, 0.0, 0.0], [5.0])
    ranks = torch.arange(3).expand(3, 3)
    assert losses.plackett_luce_loss(rewards, ranks, exists).tolist() == pytest.approx([0.313262, math.log(6), 0.0], abs=1e-6)


def test_plackett_luce_agrees_with_the_oracle():
    values = drawn(4, 20)
    rewards = torch.stack(values, 1)
    expected = [oracles.plackett_luce(row) for row in rewards.tolist()]
    ranks, exists = torch.arange(4).expand(20, 4), torch.ones(20, 4, dtype=torch.bool)
    torch.testing.assert_close(losses.plackett_luce_loss(rewards, ranks, exists), numbers(*expected))
    order = torch.tensor([2, 0, 3, 1])  # wherever the best one stands
    torch.testing.assert_close(losses.plackett_luce_loss(rewards[:, order], ranks[:, order], exists), numbers(*expected))


def test_plackett_luce_of_two_is_dpo():
    chosen, rejected, ref_chosen, ref_rejected = drawn(4, 20)
    rewards = 0.3 * torch.stack([chosen - ref_chosen, rejected - ref_rejected], 1)
    found = losses.plackett_luce_loss(rewards, torch.tensor([[0, 1]]).expand(20, 2), torch.ones(20, 2, dtype=torch.bool))
    torch.testing.assert_close(found, losses.dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.3))


def test_plackett_luce_gradients_ties_and_what_is_not_there():
    rewards, exists = table([1.0, 0.5, -2.0], [3.0, 1e4])
    ranks = torch.tensor([[0, 0, 1], [0, 1, 7]])
    assert torch.autograd.gradcheck(
        lambda r: losses.plackett_luce_loss(r, ranks, exists), [rewards[:1].expand(2, 3).clone().requires_grad_()]
    )
    given = rewards.clone().requires_grad_()
    losses.plackett_luce_loss(given, ranks, exists).sum().backward()
    assert bool(torch.isfinite(given.grad).all())
    assert given.grad[1, 2] == 0  # nothing is there
    tied = losses.plackett_luce_loss(rewards[:1], ranks[:1], exists[:1])
    everything = math.log(math.exp(1) + math.exp(0.5) + math.exp(-2))
    assert tied.item() == pytest.approx(2 * everything - 1.0 - 0.5)  # both of the first rank are drawn from all three


# Options.


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
    for targets in (distributions.argmax(1), torch.zeros(5, dtype=torch.long)):  # the policy's own words, and others
        logps = distributions.gather(1, targets[:, None])[:, 0]
        found = options.wpo_weight(logps.mean()[None], (2 * distributions).logsumexp(-1).mean()[None], clamp=clamp)
        assert found.item() == pytest.approx(oracles.wpo(logps.tolist(), distributions.exp().tolist(), clamp=clamp))


def test_a_weight_carries_no_gradient():
    logp = numbers(-2.0).requires_grad_()
    assert not options.wpo_weight(logp, numbers(-1.0)).requires_grad


def test_tail_weights_agree_with_the_oracle():
    chosen, rejected = [-1.0, -2.0, -3.0, -4.0], [-5.0, -6.0]
    lengths, shorter = torch.tensor([4, 2]), torch.tensor([2, 2])
    weights = options.tail_weights(lengths, shorter, alpha=0.25, num_tokens=6, dtype=torch.float64)
    weighted = (numbers(*chosen, *rejected) * weights).split([4, 2])
    assert tuple(part.sum().item() for part in weighted) == oracles.ld(chosen, rejected, alpha=0.25)


# The public face.


def test_every_public_loss_is_looked_at_here():
    elsewhere = {"sft_loss", "kto_loss", "bco_thumbs_loss", "plackett_luce_loss", "centring_loss"}
    assert {case.loss.__name__ for case in CASES.values()} | elsewhere == set(losses.__all__)


def modules() -> list[Any]:
    own = {sys.modules[inspect.unwrap(getattr(losses, name)).__module__] for name in losses.__all__}
    return sorted(
        own | {bco, comparisons, dpo, kto, maths, options, pair_method, pairs, ranked, thumbs}, key=lambda module: module.__name__
    )


@pytest.mark.parametrize("module", modules(), ids=lambda module: module.__name__.split(".")[-1])
def test_examples_in_docstrings_are_right(module: Any):
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for name, member in vars(module).items():
        function = inspect.unwrap(member) if inspect.isfunction(member) else None
        if function is not None and function.__module__ == module.__name__ and ">>>" in (function.__doc__ or ""):
            for test in doctest.DocTestFinder(recurse=False).find(function, name, module=False, globs=dict(vars(module))):
                assert runner.run(test).failed == 0
    if module.__name__.rpartition(".")[2] + "_loss" in losses.__all__:
        assert runner.tries >= (0 if module.__name__.endswith("sft") else 2)
