"""The losses of thumbs: worked by hand, an oracle, derivatives, the ends."""

from collections.abc import Callable

import pytest
import torch
from tests.methods import oracles
from tests.methods.numbers import all_finite, at_the_ends, drawn, numbers
from torch import Tensor

from prefopt import losses


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
    for up in (True, False):
        values = at_the_ends(2, dtype=torch.float32)
        assert all_finite(loss(*values, torch.full((4,), up), beta=1.0), *values)
    logps, ref, is_up = thumbs_of(6)
    assert torch.autograd.gradcheck(lambda *values: loss(*values, is_up, beta=0.7), [logps.requires_grad_(), ref.requires_grad_()])
    short = logps.bfloat16(), ref.bfloat16()
    narrow = loss(*short, is_up, beta=0.7)
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow, loss(*(value.float() for value in short), is_up, beta=0.7), rtol=0, atol=0)


def test_a_thumb_up_pulls_up_and_a_thumb_down_pushes_down():
    for loss in (lambda *values: losses.kto_loss(*values, z0=0.0, beta=0.1), lambda *values: losses.bco_thumbs_loss(*values, beta=0.1)):
        logps = numbers(-3.0, -3.0).requires_grad_()
        loss(logps, numbers(-3.0, -3.0), torch.tensor([True, False])).sum().backward()
        assert logps.grad[0] < 0 < logps.grad[1]


def test_bco_thumbs_by_hand():
    # rewards 0.2 and −0.1, δ = 0.05: log(1 + e^−0.15) for the one up, and log(1 + e^−0.15) for the one down
    loss = losses.bco_thumbs_loss(numbers(-10, -9), numbers(-12, -8), torch.tensor([True, False]), beta=0.1, shift=0.05)
    assert loss.tolist() == pytest.approx([0.620957, 0.620957], abs=1e-6)
