"""The chunked head against the plain one: logits of everything, then log_softmax."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prefopt.engine import head
from prefopt.engine.head import HeadShape, head_logps

N, D, V = 53, 6, 29

SHAPES = {
    "plain": HeadShape(),
    "scaled": HeadShape(scale=0.25),
    "capped": HeadShape(soft_cap=2.0),
    "scaled and capped": HeadShape(scale=1.7, soft_cap=3.0),
}


@pytest.fixture(params=["one chunk", "four chunks"])
def _chunking(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """53 rows in one chunk, or in three of 16 rows (the smallest there is) and one of 5."""
    if request.param == "four chunks":
        few_logits(monkeypatch)


def few_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "CHUNK_LOGITS", {"cpu": 1, "cuda": 1})


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed + sum(shape)))


def parts(dtype: torch.dtype = torch.float64, *, bias: bool = True) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Hidden states, weight, bias and targets; the same target in several rows, and the first and the last token among them."""
    hidden, weight, bias_V = draw(N, D, dtype=dtype), draw(V, D, dtype=dtype), draw(V, dtype=dtype) if bias else None
    for part in (hidden, weight, bias_V):
        if part is not None:
            part.requires_grad_()
    return hidden, weight, bias_V, torch.tensor([0, V - 1, *(index * 7 % V for index in range(N - 2))])


def plain(hidden: Tensor, weight: Tensor, bias: Tensor | None, shape: HeadShape) -> Tensor:
    """log π of every token, [N, V], written from the definition: z = cap·tanh(scale·(h·Wᵀ + b) / cap)."""
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    logits = logits * shape.scale
    if shape.soft_cap is not None:
        logits = shape.soft_cap * torch.tanh(logits / shape.soft_cap)
    return logits.log_softmax(-1)


def close(found: Tensor | None, expected: Tensor) -> None:
    assert found is not None
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("_chunking")
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_are_those_of_log_softmax(shape: HeadShape, bias: bool):
    hidden, weight, bias_V, target = parts(bias=bias)
    logps, entropy, log_sum_squares = head_logps(hidden, weight, bias_V, target, shape, extras=True)
    all_logps = plain(hidden, weight, bias_V, shape)
    close(logps, all_logps[torch.arange(N), target])
    close(entropy, -(all_logps.exp() * all_logps).sum(-1))
    close(log_sum_squares, all_logps.exp().square().sum(-1).log())


@pytest.mark.usefixtures("_chunking")
@pytest.mark.parametrize("with_entropy", [True, False], ids=["entropy", "logps"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_gradients_are_those_of_log_softmax(shape: HeadShape, bias: bool, with_entropy: bool):
    hidden, weight, bias_V, target = parts(bias=bias)
    wanted = [part for part in (hidden, weight, bias_V) if part is not None]
    weights = draw(N, seed=1)  # every token pulls in its own direction and strength
    entropy_weights = draw(N, seed=2)

    logps, entropy, _ = head_logps(hidden, weight, bias_V, target, shape, extras=with_entropy)
    all_logps = plain(hidden, weight, bias_V, shape)
    total, expected_total = (weights * logps).sum(), (weights * all_logps[torch.arange(N), target]).sum()
    if entropy is not None:
        total = total + (entropy_weights * entropy).sum()
        expected_total = expected_total - (entropy_weights * (all_logps.exp() * all_logps).sum(-1)).sum()
    for found, expected in zip(torch.autograd.grad(total, wanted), torch.autograd.grad(expected_total, wanted), strict=True):
        close(found, expected)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_gradients_pass_gradcheck(shape: HeadShape, monkeypatch: pytest.MonkeyPatch):
    few_logits(monkeypatch)
    hidden, weight, bias = (draw(*size).requires_grad_() for size in ((18, 3), (7, 3), (7,)))
    target = torch.arange(18) % 7

    def run(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        logps, entropy, _ = head_logps(hidden, weight, bias, target, shape, extras=True)
        assert entropy is not None
        return logps, entropy

    assert torch.autograd.gradcheck(run, (hidden, weight, bias))


def test_entropy_alone_has_its_gradient():
    hidden, weight, bias, target = parts()
    _, entropy, _ = head_logps(hidden, weight, bias, target, extras=True)
    all_logps = plain(hidden, weight, bias, HeadShape())
    assert entropy is not None
    (found,) = torch.autograd.grad(entropy.sum(), hidden)
    (expected,) = torch.autograd.grad(-(all_logps.exp() * all_logps).sum(), hidden)
    close(found, expected)


def test_worked_example():
    # Logits log 1, log 2, log 5: π = 1/8, 1/4, 5/8. Scores for token 1: log ¼. H = ⅛·log 8 + ¼·log 4 + ⅝·log 1.6. Σπ² = 30/64.
    hidden, weight = torch.ones(1, 1, dtype=torch.float64), torch.tensor([[1.0], [2.0], [5.0]], dtype=torch.float64).log()
    logps, entropy, log_sum_squares = head_logps(hidden, weight, None, torch.tensor([1]), extras=True)
    assert entropy is not None
    assert log_sum_squares is not None
    assert logps.exp().item() == pytest.approx(0.25)
    assert entropy.item() == pytest.approx(0.900256, abs=1e-6)
    assert log_sum_squares.exp().item() == pytest.approx(30 / 64)


def test_extras_are_only_there_when_asked_for_and_collision_has_no_gradient():
    hidden, weight, bias, target = parts()
    assert head_logps(hidden, weight, bias, target)[1:] == (None, None)
    _, entropy, log_sum_squares = head_logps(hidden, weight, bias, target, extras=True)
    assert entropy is not None
    assert log_sum_squares is not None
    assert entropy.requires_grad
    assert not log_sum_squares.requires_grad


def test_no_scored_token_gives_no_values_and_zero_gradients():
    weight, bias = draw(V, D).requires_grad_(), draw(V).requires_grad_()
    hidden = draw(0, D).requires_grad_()
    logps, entropy, _ = head_logps(hidden, weight, bias, torch.empty(0, dtype=torch.int64), extras=True)
    assert logps.shape == (0,)
    assert entropy is not None
    assert entropy.shape == (0,)
    gradients = torch.autograd.grad(logps.sum(), [hidden, weight, bias])
    assert [tuple(gradient.shape) for gradient in gradients] == [(0, D), (V, D), (V,)]
    assert all(bool((gradient == 0).all()) for gradient in gradients)


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_extreme_logits_stay_finite(scale: float):
    hidden, weight, bias, target = parts(torch.float32)
    logps, entropy, log_sum_squares = head_logps(hidden, weight, bias, target, HeadShape(scale=scale), extras=True)
    assert entropy is not None
    assert log_sum_squares is not None
    gradients = torch.autograd.grad(logps.sum() + entropy.sum(), [hidden, weight])
    assert all(bool(torch.isfinite(part).all()) for part in (logps, entropy, log_sum_squares, *gradients))


def test_autocast_computes_products_in_bf16_and_the_rest_in_float32(monkeypatch: pytest.MonkeyPatch):
    few_logits(monkeypatch)
    hidden, weight, bias, target = parts(torch.float32)
    wanted = [part for part in (hidden, weight, bias) if part is not None]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logps, entropy, log_sum_squares = head_logps(hidden, weight, bias, target, extras=True)
    exact, *_ = head_logps(hidden, weight, bias, target)
    assert {part.dtype for part in (logps, entropy, log_sum_squares) if part is not None} == {torch.float32}
    assert logps.tolist() != exact.tolist()  # bf16 was used
    # The products' inputs are rounded to 8 bits (2⁻⁹ each) and nothing else is: a few hundredths of a nat on logits of size 3.
    torch.testing.assert_close(logps, exact, rtol=0, atol=0.06)
    rounded = plain(hidden.bfloat16().double(), weight.bfloat16().double(), bias, HeadShape())[torch.arange(N), target]
    torch.testing.assert_close(logps.double(), rounded, rtol=0, atol=0.06)
    found, expected = torch.autograd.grad(logps.sum(), wanted), torch.autograd.grad(exact.sum(), wanted)
    for gradient, other in zip(found, expected, strict=True):
        assert gradient.dtype == torch.float32
        assert (gradient - other).norm() < 0.01 * other.norm()


def test_bf16_head_adds_up_its_chunks_in_float32(monkeypatch: pytest.MonkeyPatch):
    few_logits(monkeypatch)
    rows = 16 * 400
    hidden, weight = torch.ones(rows, 1, dtype=torch.bfloat16), torch.zeros(2, 1, dtype=torch.bfloat16).requires_grad_()
    logps, *_ = head_logps(hidden, weight, None, torch.zeros(rows, dtype=torch.int64))
    (gradient,) = torch.autograd.grad(logps.sum(), weight)
    # 6,400 · ½ = 3,200; added up in bf16, 8 at a time, the sum stands still at 2,048.
    assert gradient.dtype == torch.bfloat16
    assert gradient.flatten().tolist() == [3200, -3200]


def test_float64_stays_float64_and_float32_stays_float32():
    for dtype in (torch.float32, torch.float64):
        hidden, weight, bias, target = parts(dtype)
        assert head_logps(hidden, weight, bias, target)[0].dtype == dtype


class LargestTensor(TorchDispatchMode):
    """Watches every operation, those of the backward pass too, for the number of elements that it gives out."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor))])
        self.products += "mm" in str(func)
        return out


@pytest.mark.parametrize("extras", [True, False], ids=["extras", "logps"])
@pytest.mark.parametrize("shape", [HeadShape(), HeadShape(scale=0.5, soft_cap=2.0)], ids=["plain", "capped"])
def test_full_logits_never_exist(shape: HeadShape, extras: bool, monkeypatch: pytest.MonkeyPatch):
    rows, width, vocabulary, chunk = 400, 4, 1000, 20
    monkeypatch.setattr(head, "CHUNK_LOGITS", {"cpu": chunk * vocabulary, "cuda": chunk * vocabulary})
    hidden, weight = draw(rows, width).requires_grad_(), draw(vocabulary, width).requires_grad_()
    with LargestTensor() as seen:
        logps, entropy, _ = head_logps(hidden, weight, None, torch.arange(rows), shape, extras=extras)
        total = logps.sum() if entropy is None else logps.sum() + entropy.sum()
        torch.autograd.grad(total, [hidden, weight])
    assert seen.elements == chunk * vocabulary
    # Each chunk: forward; its two gradients; and again in the backward pass, unless it is one of those that were kept.
    assert seen.products == 20 + 2 * 20 + (20 - head.KEPT_CHUNKS)


@pytest.mark.parametrize("kept", [0, 1])
@pytest.mark.parametrize("which", [0, 1, 2], ids=["hidden", "weight", "bias"])
def test_only_the_gradients_that_are_needed_are_computed(which: int, kept: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(head, "KEPT_CHUNKS", kept)
    hidden, weight, bias, target = parts()
    assert bias is not None
    for index, part in enumerate((hidden, weight, bias)):
        part.requires_grad_(index == which)
    logps, *_ = head_logps(hidden, weight, bias, target)
    with LargestTensor() as seen:
        logps.sum().backward()
    assert [part.grad is not None for part in (hidden, weight, bias)] == [index == which for index in range(3)]
    assert seen.products == (1 - kept) + (which != 2)  # the logits again, unless they were kept, and one gradient that is a product


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_logits_that_are_kept_give_the_same_to_the_bit(shape: HeadShape, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    few_logits(monkeypatch)
    found = []
    for kept in (0, 2, 100):
        monkeypatch.setattr(head, "KEPT_CHUNKS", kept)
        hidden, weight, bias, target = parts(torch.float32)
        inputs = [part.detach().to(dtype).requires_grad_() for part in (hidden, weight, bias) if part is not None]
        logps, entropy, _ = head_logps(*inputs, target, shape, extras=True)
        assert entropy is not None
        found.append([logps, entropy, *torch.autograd.grad(logps.sum() + entropy.square().sum(), inputs)])
    for others in found[1:]:
        for one, other in zip(found[0], others, strict=True):
            assert torch.equal(one, other)


def test_a_frozen_head_needs_no_backward_of_its_own():
    hidden, weight, bias, target = parts()
    with torch.no_grad():
        logps, *_ = head_logps(hidden, weight, bias, target)
    assert not logps.requires_grad
    close(logps, plain(hidden, weight, bias, HeadShape())[torch.arange(N), target].detach())
