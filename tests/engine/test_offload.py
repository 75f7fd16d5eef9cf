"""What autograd keeps is moved out and fetched back; the copies of a GPU are played by copies on the CPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from prefopt.engine.offload import Offload

WIDTH = 32
BYTES = 4 * 64 * WIDTH
"""Of one activation of the tests' model."""


class Played:
    """Copies that are not whole before somebody waits for them, as on a GPU."""

    def __init__(self) -> None:
        self.waited = 0
        self.under_way = self.most_under_way = 0

    def out(self, tensor: Tensor) -> tuple[Tensor, Callable[[], None]]:
        return self._late(tensor)

    def back(self, tensor: Tensor, device: torch.device) -> tuple[Tensor, Callable[[], None]]:
        assert device.type == "cpu"
        return self._late(tensor)

    def _late(self, tensor: Tensor) -> tuple[Tensor, Callable[[], None]]:
        copy = torch.zeros_like(tensor)
        self.under_way += tensor.nbytes
        self.most_under_way = max(self.most_under_way, self.under_way)

        def wait() -> None:
            copy.copy_(tensor)
            self.under_way -= tensor.nbytes
            self.waited += 1

        return copy, wait


class Net(nn.Module):
    def __init__(self, layers: int = 6) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers))

    def forward(self, x: Tensor, again: bool = False) -> Tensor:
        for layer in self.layers:
            x = checkpoint(self._one, layer, x, use_reentrant=False) if again else self._one(layer, x)
        return x

    @staticmethod
    def _one(layer: nn.Module, x: Tensor) -> Tensor:
        return torch.tanh(layer(x)) * x.sigmoid()


def gradients(net: nn.Module, offload: Offload | None, **given: Any) -> tuple[list[Tensor], Tensor]:
    net.zero_grad()
    x = torch.linspace(-1, 1, 64 * WIDTH).view(64, WIDTH).requires_grad_()
    if offload is None:
        out = net(x, **given)
    else:
        with offload.during(net):
            out = net(x, **given)
    out.square().sum().backward()
    assert x.grad is not None
    return [parameter.grad.clone() for parameter in net.parameters() if parameter.grad is not None], x.grad


@pytest.mark.parametrize("under_way", [0, 3 * BYTES, 10**9])
@pytest.mark.parametrize("again", [False, True])
def test_gradients_are_the_same_to_the_bit(under_way: int, again: bool):
    net = Net()
    plain, moved = gradients(net, None, again=again), gradients(net, Offload(Played(), smallest=1, under_way=under_way), again=again)
    assert all(torch.equal(one, other) for one, other in zip(plain[0], moved[0], strict=True))
    assert torch.equal(plain[1], moved[1])


def test_weights_and_small_tensors_stay_and_every_storage_is_moved_once():
    net = Net()
    offload = Offload(Played(), smallest=BYTES, under_way=0)
    gradients(net, offload)
    # Of a layer: its input, kept for the product and for the sigmoid, and the outputs of tanh and sigmoid, kept by their own backward
    # and by the product of the two.
    assert offload.counts.num_moved == 6 * 2 + 6
    assert offload.counts.bytes_moved == offload.counts.num_moved * BYTES
    assert offload.counts.num_shared > 0
    assert offload.counts.num_left >= 6  # the weights
    nothing = Offload(Played(), smallest=BYTES + 1)
    gradients(net, nothing)
    assert nothing.counts.num_moved == 0


def test_what_is_still_leaving_when_the_backward_pass_begins_is_used_where_it_is():
    offload = Offload(Played(), smallest=1, under_way=10**9)
    gradients(Net(), offload)
    assert offload.counts.num_moved > 0
    assert offload.counts.num_back == 0
    strict = Offload(Played(), smallest=1, under_way=0)
    gradients(Net(), strict)
    assert strict.counts.num_back == strict.counts.num_moved


def test_no_more_than_the_limit_is_on_the_way():
    copies = Played()
    gradients(Net(12), Offload(copies, smallest=1, under_way=4 * BYTES))
    assert copies.most_under_way <= 4 * BYTES + 2 * BYTES
    assert copies.under_way == 0 or copies.waited > 0


def test_of_a_storage_that_is_written_into_between_two_uses_each_finds_what_it_saw():
    net = nn.Linear(WIDTH, WIDTH, bias=False)
    offload = Offload(Played(), smallest=1, under_way=0)
    x = torch.ones(64, WIDTH)
    with offload.during(net):
        first = net(x)
        x.add_(1.0)
        out = (first * net(x)).sum()
    out.backward()
    assert net.weight.grad is not None
    expected = nn.Linear(WIDTH, WIDTH, bias=False)
    expected.load_state_dict(net.state_dict())
    one, two = torch.ones(64, WIDTH), torch.full((64, WIDTH), 2.0)
    (expected(one) * expected(two)).sum().backward()
    assert torch.allclose(net.weight.grad, expected.weight.grad)


def test_a_second_backward_pass_finds_everything_again():
    net, offload = Net(2), Offload(Played(), smallest=1, under_way=0)
    x = torch.ones(64, WIDTH, requires_grad=True)
    with offload.during(net):
        out = net(x).sum()
    (first,) = torch.autograd.grad(out, x, retain_graph=True)
    (second,) = torch.autograd.grad(out, x)
    assert torch.equal(first, second)


def test_views_of_one_storage_come_back_with_their_strides():
    class Views(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            left, right = x.exp().t().chunk(2, dim=0)
            return left @ right.t()

    offload = Offload(Played(), smallest=1, under_way=0)
    x = torch.linspace(0, 1, 64 * WIDTH).view(64, WIDTH).requires_grad_()
    with offload.during(Views()):
        out = Views()(x)
    (moved,) = torch.autograd.grad(out.sum(), x)
    (plain,) = torch.autograd.grad(Views()(x).sum(), x)
    assert torch.equal(moved, plain)
    assert offload.counts.num_moved == 1
