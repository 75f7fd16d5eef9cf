"""KL estimates: by hand, and against the exact divergence of a distribution small enough to be written out."""

import itertools
import math

import pytest
import torch

from prefopt.evaluate.kl import KL, estimate_kl

LENGTH, VOCABULARY = 3, 4


def test_worked_example() -> None:
    # x per token: 1, -½ | 2; k1 per completion: ½, 2; k3 per token: e⁻¹, e^½ − 3/2, e⁻² + 1
    figures = estimate_kl(torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-2.0, -1.5, -2.5]), torch.tensor([2, 1]))
    assert figures.kl == pytest.approx(1.25)
    assert figures.kl_error == pytest.approx(0.75)  # values 1¼ ± ¾: s = ¾·√2, error s/√2
    first, second = math.exp(-1) + math.exp(0.5) - 1.5, math.exp(-2) + 1
    assert figures.k3 == pytest.approx((first + second) / 2)
    assert figures.k3_error == pytest.approx(abs(first - second) / 2)
    assert figures.num_completions == 2


def test_nothing_where_policy_is_reference() -> None:
    logps = torch.tensor([-3.0, -700.0, -0.001])
    assert estimate_kl(logps, logps, torch.tensor([1, 2])) == KL(0.0, 0.0, 0.0, 0.0, 2)


def test_one_completion_has_no_error() -> None:
    assert math.isnan(estimate_kl(torch.tensor([-1.0]), torch.tensor([-2.0]), torch.tensor([1])).kl_error)


class Toy:
    """A language of three tokens out of four, each depending on all before it; two random policies of it."""

    def __init__(self, spread: float) -> None:
        draw = torch.Generator().manual_seed(0)
        prefixes = [prefix for length in range(LENGTH) for prefix in itertools.product(range(VOCABULARY), repeat=length)]
        base = {prefix: torch.randn(VOCABULARY, generator=draw, dtype=torch.float64) for prefix in prefixes}
        self.reference = {prefix: logits.log_softmax(-1) for prefix, logits in base.items()}
        moved = {prefix: logits + spread * torch.randn(VOCABULARY, generator=draw, dtype=torch.float64) for prefix, logits in base.items()}
        self.policy = {prefix: logits.log_softmax(-1) for prefix, logits in moved.items()}
        self.texts = list(itertools.product(range(VOCABULARY), repeat=LENGTH))

    def tokens(self, table: dict[tuple[int, ...], torch.Tensor]) -> torch.Tensor:
        """Log-probability of each token of each text, [texts, LENGTH]."""
        return torch.stack([torch.stack([table[text[:place]][text[place]] for place in range(LENGTH)]) for text in self.texts])


@pytest.mark.parametrize("spread", [0.1, 1.0])
def test_both_estimators_agree_with_enumeration(spread: float) -> None:
    toy = Toy(spread)
    policy, reference = toy.tokens(toy.policy), toy.tokens(toy.reference)
    probability = policy.sum(1).exp()
    assert probability.sum().item() == pytest.approx(1)
    exact = (probability * (policy - reference).sum(1)).sum().item()

    # Exactly unbiased: the mean over all texts, by probability.
    each = [estimate_kl(policy[index], reference[index], torch.tensor([LENGTH])) for index in range(len(toy.texts))]
    assert sum(p * figures.kl for p, figures in zip(probability.tolist(), each, strict=True)) == pytest.approx(exact)
    assert sum(p * figures.k3 for p, figures in zip(probability.tolist(), each, strict=True)) == pytest.approx(exact)

    # And from samples, within the error that they state.
    drawn = torch.multinomial(probability, 20_000, replacement=True, generator=torch.Generator().manual_seed(1))
    figures = estimate_kl(policy[drawn].flatten(), reference[drawn].flatten(), torch.full((20_000,), LENGTH))
    assert abs(figures.kl - exact) < 4 * figures.kl_error
    assert abs(figures.k3 - exact) < 4 * figures.k3_error
    if spread < 1:  # the narrower one only where the two are close
        assert figures.k3_error < 0.1 * figures.kl_error


@pytest.mark.parametrize(("policy", "reference", "lengths"), [(3, 3, [2]), (3, 2, [3]), (0, 0, [])])
def test_refuses_lengths_that_do_not_fit(policy: int, reference: int, lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="as many tokens as the lengths"):
        estimate_kl(torch.zeros(policy), torch.zeros(reference), torch.tensor(lengths, dtype=torch.int64))
