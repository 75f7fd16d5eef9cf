"""The pure losses of all methods: numbers worked by hand, an oracle, derivatives, and what must hold at the ends.

Here are those of pairs and of single numbers; thumbs, rankings and what options add have files beside this one.
"""

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
from tests.methods.numbers import all_finite, at_the_ends, drawn, numbers
from torch import Tensor

from prefopt import losses
from prefopt.methods import bco, comparisons, dpo, kto, maths, options, pair_method, pairs, ranked, thumbs
from prefopt.methods.maths import log_odds

PAIR = (-10.0, -9.0, -12.0, -8.0)
"""Chosen, rejected, and both under the reference: log-ratios 2 and −1, Δ = 3."""

MEANS = (-1.0, -2.0)
"""Means per token of chosen and rejected."""

ONE = (-3.5,)
"""The log-probability of an answer, or the mean of two scores."""


@dataclass(frozen=True)
class Case:
    """A loss with settings: on four log-probabilities of a pair, on two, or on one number."""

    loss: Callable[..., Tensor]
    oracle: Callable[..., float]
    settings: dict[str, Any]
    by_hand: float
    """On `PAIR`, `MEANS` or `ONE`."""
    at_reference: float
    """Where policy and reference agree, where both answers are as likely, or at 0."""
    oracle_settings: dict[str, Any] | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def num(self) -> int:
        of_two = (losses.simpo_loss, losses.cpo_loss, losses.orpo_loss, losses.reward_loss)
        return 1 if self.loss in (losses.sft_loss, losses.centring_loss) else 2 if self.loss in of_two else 4

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
    "sft": Case(losses.sft_loss, oracles.sft, {}, 3.5, 0.0),
    # two scores whose mean is −3.5 have the sum −7
    "centring": Case(losses.centring_loss, oracles.centring, {}, 49.0, 0.0),
}
ALL = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@ALL
def test_worked_by_hand(case: Case):
    values = {4: PAIR, 2: MEANS if case.loss is not losses.cpo_loss else (-10.0, -11.0), 1: ONE}[case.num]
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
    values = {4: (chosen, rejected, chosen, rejected), 2: (chosen, chosen), 1: (torch.zeros_like(chosen),)}[case.num]
    assert case(*values).tolist() == pytest.approx([case.at_reference] * 3, abs=2e-6)


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finite_at_the_ends(case: Case, dtype: torch.dtype):
    """Log-probabilities of −1e4 and −1e-9 in every place, with gradients."""
    values = at_the_ends(case.num, dtype=dtype)
    assert all_finite(case(*values), *values)


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


# The public face.


def test_every_public_loss_is_looked_at_here():
    elsewhere = {"kto_loss", "bco_thumbs_loss", "plackett_luce_loss"}  # test_losses_of_thumbs.py, test_losses_of_rankings.py
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
        assert runner.tries >= 2
