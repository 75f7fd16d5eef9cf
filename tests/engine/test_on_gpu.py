"""Tree attention's kernels and the head on a GPU in half precision, against the definition in float64 on the CPU.

Both are given the same numbers, rounded to bf16, so what is left is the rounding inside: a few thousandths. A window that is off by
one, a mask that is shifted or a prompt that is not found moves results by a tenth and more.
"""

from collections.abc import Callable

import pytest
import torch
from tests.engine.test_attention import FORESTS, SCALE, Shape, as_model_calls, dense, draw, layout_of, who_sees_whom
from tests.engine.test_offload import Played
from torch import Tensor, nn

from prefopt.engine import attention
from prefopt.engine.head import HeadShape, head_logps
from prefopt.engine.layout import FlatLayout
from prefopt.engine.offload import CudaCopies, Offload

pytestmark = pytest.mark.gpu

CLOSE = {torch.bfloat16: 1.5e-2, torch.float32: 1e-5}
LONG: list[Shape] = [(300, (150, 40)), (1, (200,)), (70, (3, 90, 129))]
"""Longer than the blocks of 64 and 128 that kernels work in."""

Record = Callable[[str, object], None]


def on(device: torch.device, forest: list[Shape]) -> FlatLayout:
    layout = layout_of(forest)
    return FlatLayout(layout.spans, layout.position_ids_T.to(device))


def apart(found: Tensor, expected: Tensor, smallest: float = 0.0) -> float:
    difference = (found.detach().double().cpu() - expected.detach()).norm()
    return float(difference / expected.detach().norm().clamp(min=smallest))


def check(
    gpu: torch.device,
    dtype: torch.dtype,
    forest: list[Shape],
    record: Record,
    *,
    size: int,
    value_size: int = 0,
    groups: int = 2,
    **options,
) -> None:
    """Result and gradients of queries, keys, values and sinks."""
    window, softcap, with_sinks = options.get("window"), options.get("softcap"), options.get("sinks", False)
    rounded = [part.detach().to(dtype) for part in draw(forest, groups=groups, size=size, value_size=value_size or size)]
    sinks = [torch.tensor([-1.0, 0.0, 0.5, 3.0], dtype=dtype)] if with_sinks else []
    exact = [part.double().requires_grad_() for part in (*rounded, *sinks)]
    given = [part.to(gpu).requires_grad_() for part in (*rounded, *sinks)]
    expected = dense(*exact[:3], who_sees_whom(forest, window), softcap=softcap, sinks=exact[3] if with_sinks else None)
    more = {"sliding_window": window, "softcap": softcap, "s_aux": given[3] if with_sinks else None}
    found = as_model_calls(*given[:3], on(gpu, forest), scaling=SCALE, **more)
    pull = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    wanted = torch.autograd.grad((expected * pull.double()).sum(), exact)
    gradients = torch.autograd.grad((found * pull.to(gpu)).sum(), given)
    smallest = 1e-2 * max(float(gradient.norm()) for gradient in wanted)  # a window of 1 leaves queries and keys without any
    distances = [apart(found, expected), *(apart(one, other, smallest) for one, other in zip(gradients, wanted, strict=True))]
    record("apart", max(distances))
    assert max(distances) < CLOSE[dtype], distances


def kernel_is(gpu: torch.device, monkeypatch: pytest.MonkeyPatch, name: str) -> list[str]:
    """Which kernel runs, noted; on a CPU there is one only."""
    called: list[str] = []
    for each in ("_varlen", "_flex", "_per_tree"):
        real = getattr(attention, each)

        def noting(*arguments, real=real, each=each):
            called.append(each)
            return real(*arguments)

        monkeypatch.setattr(attention, each, noting)
    return [name] if gpu.type == "cuda" else called


@pytest.mark.parametrize("size", [16, 64, 128])
@pytest.mark.parametrize("window", [None, 1, 3, 8, 15, 16])
def test_flash_with_its_window(gpu: torch.device, size: int, window: int | None, record_property: Record):
    check(gpu, torch.bfloat16, FORESTS["several"], record_property, size=size, window=window)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 100])
def test_flash_over_several_blocks(
    gpu: torch.device, groups: int, window: int | None, record_property: Record, monkeypatch: pytest.MonkeyPatch
):
    called = kernel_is(gpu, monkeypatch, "_varlen")
    check(gpu, torch.bfloat16, LONG, record_property, size=64, groups=groups, window=window)
    assert set(called) <= {"_varlen", "_per_tree"}


@pytest.mark.parametrize(("softcap", "sinks"), [(0.7, False), (None, True), (0.7, True)], ids=["softcap", "sinks", "both"])
@pytest.mark.parametrize("window", [None, 8])
def test_flex_backward(gpu: torch.device, softcap: float | None, sinks: bool, window: int | None, record_property: Record):
    check(gpu, torch.bfloat16, FORESTS["several"], record_property, size=64, softcap=softcap, sinks=sinks, window=window)


@pytest.mark.parametrize("options", [{"softcap": 0.7, "window": 100}, {"sinks": True}], ids=["softcap", "sinks"])
def test_flex_over_several_blocks(gpu: torch.device, options: dict[str, object], record_property: Record):
    check(gpu, torch.bfloat16, LONG, record_property, size=64, **options)


def test_flex_with_values_of_another_size(gpu: torch.device, record_property: Record):
    check(gpu, torch.bfloat16, LONG, record_property, size=48, value_size=32)


def test_heads_too_narrow_for_the_kernels(gpu: torch.device, record_property: Record):
    check(gpu, torch.bfloat16, FORESTS["several"], record_property, size=8, softcap=0.7, sinks=True)


@pytest.mark.parametrize("window", [None, 5])
def test_float32_stretch_by_stretch(gpu: torch.device, window: int | None, record_property: Record):
    check(gpu, torch.float32, FORESTS["several"], record_property, size=16, window=window)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [HeadShape(), HeadShape(scale=0.25, soft_cap=30.0)], ids=["plain", "scaled, capped"])
def test_head(gpu: torch.device, dtype: torch.dtype, shape: HeadShape, record_property: Record):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(700, 64, generator=generator).to(dtype), (torch.randn(5000, 64, generator=generator) / 4).to(dtype)
    target, pull = torch.randint(0, 5000, (700,), generator=generator), torch.randn(700, generator=generator)
    exact, given = ([part.to(*kind).requires_grad_() for part in (hidden, weight)] for kind in ((torch.float64,), (gpu,)))
    expected = head_logps(*exact, None, target, shape)[0]
    found = head_logps(*given, None, target.to(gpu), shape)[0]
    wanted = torch.autograd.grad((expected * pull).sum(), exact)
    gradients = torch.autograd.grad((found * pull.to(gpu)).sum(), given)
    distances = [apart(one, other) for one, other in zip((found, *gradients), (expected, *wanted), strict=True)]
    record_property("apart", max(distances))
    assert max(distances) < CLOSE[dtype], distances


WIDE = 512
ACTIVATION = 4 * 1024 * WIDE
"""Bytes of an activation of the net below: 2 MiB, more than what `Offload` leaves where it is."""


class Deep(nn.Module):
    """Layers that keep two activations each for the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weights = nn.ParameterList(torch.randn(WIDE, WIDE, generator=generator) / WIDE**0.5 for _ in range(8))

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.weights:
            x = torch.tanh(x @ weight)
        return x


def step_of(net: Deep, device: torch.device, offload: Offload | None) -> tuple[list[Tensor], int]:
    """Gradients, and the bytes that the GPU held for the backward pass when the forward pass was done; 0 on a CPU."""
    net.zero_grad()
    x = torch.linspace(-1, 1, 1024 * WIDE, device=device).view(1024, WIDE).requires_grad_()
    before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    if offload is None:
        out = net(x)
    else:
        with offload.during(net):
            out = net(x)
    held = torch.cuda.memory_allocated() - before if device.type == "cuda" else 0
    out.square().sum().backward()
    assert x.grad is not None
    return [x.grad, *(weight.grad.clone() for weight in net.weights if weight.grad is not None)], held


@pytest.mark.parametrize("under_way", [0, 3 * ACTIVATION, 2**30])
def test_activations_that_waited_in_main_memory_are_what_they_were(gpu: torch.device, under_way: int, record_property: Record):
    """Twenty times: a copy that is used before it is whole, or written over before it has left, may go well by chance."""
    net = Deep().to(gpu)
    expected, held = step_of(net, gpu, None)
    exact, _ = step_of(Deep(), torch.device("cpu"), None)
    assert max(apart(one, other.double()) for one, other in zip(expected, exact, strict=True)) < 1e-2  # TF32 may be on
    copies = CudaCopies(gpu) if gpu.type == "cuda" else Played()
    for _ in range(20):
        offload = Offload(copies, under_way=under_way)
        found, held_less = step_of(net, gpu, offload)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        assert offload.counts.num_moved == 9  # the input and what each tanh gave, which the next product needs too
        assert offload.counts.bytes_moved == 9 * ACTIVATION
        assert offload.counts.num_back == {0: 9, 3 * ACTIVATION: 6, 2**30: 0}[under_way]
    record_property("held after the forward pass", f"{held} bytes, {held_less} with the last {under_way} on the way")
    if gpu.type == "cuda" and under_way == 0:
        assert held_less <= held - 7 * ACTIVATION  # but for what the caller holds


def test_copies_go_to_pinned_memory_and_back(gpu: torch.device):
    if gpu.type != "cuda":
        pytest.skip("streams and pinned memory are a GPU's")
    copies = CudaCopies(gpu)
    given = torch.arange(2**24, dtype=torch.int32, device=gpu).view(torch.uint8)
    host, wait = copies.out(given)
    wait()
    torch.cuda.synchronize()
    assert host.is_pinned()
    assert torch.equal(host, given.cpu())
    again, wait = copies.back(host, gpu)
    wait()
    assert torch.equal(again, given)
