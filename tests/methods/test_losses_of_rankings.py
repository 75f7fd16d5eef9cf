"""The loss of a whole order: worked by hand, an oracle, derivatives, ties, the ends."""

import math

import pytest
import torch
from tests.methods import oracles
from tests.methods.numbers import all_finite, at_the_ends, drawn, numbers
from torch import Tensor

from prefopt import losses


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ranks", [[0, 1, 2, 3], [3, 1, 0, 2], [0, 0, 1, 1], [1, 0, 1, 1]], ids=str)
def test_plackett_luce_is_finite_at_the_ends(ranks: list[int], dtype: torch.dtype):
    """Rewards of −1e4 and −1e-9 in every place, with gradients; and where the last of four is not there."""
    for there in (4, 3):
        values = at_the_ends(4, dtype=dtype)
        rewards = torch.stack(values, 1)
        shape = rewards.shape
        exists = (torch.arange(4) < there).expand(shape)
        loss = losses.plackett_luce_loss(rewards, torch.tensor(ranks).expand(shape), exists)
        assert loss.dtype == dtype
        assert all_finite(loss, *values)
        assert bool((loss >= 0).all())
        # the largest of three that can stand before −1e4 with a reward of 0 each loses 1e4, so that K − 1 times it is the most
        assert loss.max().item() <= 3 * 1e4 + 4 * math.log(4)


def test_plackett_luce_computes_with_narrow_numbers_in_float32():
    rewards = torch.stack(drawn(3, 40), 1).bfloat16()
    ranks, exists = torch.tensor([2, 0, 1]).expand(40, 3), torch.ones(40, 3, dtype=torch.bool)
    narrow = losses.plackett_luce_loss(rewards, ranks, exists)
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow, losses.plackett_luce_loss(rewards.float(), ranks, exists), rtol=0, atol=0)


def test_the_probabilities_of_all_orders_add_up_to_one():
    (rewards,) = drawn(1, 4)
    orders = torch.cartesian_prod(*[torch.arange(4)] * 4)
    orders = orders[[len(set(order.tolist())) == 4 for order in orders]]
    found = losses.plackett_luce_loss(rewards.expand(24, 4), orders, torch.ones(24, 4, dtype=torch.bool))
    assert (-found).exp().sum().item() == pytest.approx(1.0)
