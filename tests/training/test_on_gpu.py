"""Whole runs on a GPU: the losses of the CPU, and a resumed run that ends where the uninterrupted one does."""

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tests.training.runs import losses, pair_rows, run, weights, write_rows
from torch import nn
from torch.optim import AdamW

from prefopt.engine.offload import CudaCopies, Offload
from prefopt.training import run as run_module
from prefopt.training.optimizer import make_optimizer, set_learning_rate
from prefopt.training.optimizers.kinds import KINDS

pytestmark = pytest.mark.gpu

Record = Callable[[str, object], None]


def needs(kind: str) -> pytest.MarkDecorator:
    library = KINDS[kind].library
    return pytest.mark.skipif(library is not None and find_spec(library) is None, reason=f"needs {library}")


four_bits = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
SAVING = [pytest.param(name, marks=needs(name)) for name in KINDS if name != "adamw"]
RESUMED = [
    pytest.param("float32", {}, id="float32"),
    pytest.param("bf16", {}, id="bf16"),
    *(pytest.param("bf16", {"optim": name}, marks=needs(name), id=f"saving-{name}") for name in KINDS if name != "adamw"),
    pytest.param("bf16", {"lora_rank": 4, "load_in_4bit": True}, marks=four_bits, id="saving-four_bits"),
]


@pytest.fixture
def data(tmp_path: Path) -> str:
    return write_rows(tmp_path / "pairs.jsonl", pair_rows())


@pytest.fixture
def _deterministic() -> Iterator[None]:
    """Kernels that add up in the same order every time, where there are such."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("precision", "bound"), [("float32", 1e-4), ("bf16", 2e-2)])
@pytest.mark.parametrize("extra", [{}, {"lora_rank": 4}, {"gradient_checkpointing": True}], ids=["full", "adapter", "recomputed"])
def test_losses_of_the_cpu(
    gpu: torch.device, tmp_path: Path, data: str, model_folder, precision: str, bound: float, extra, record_property: Record
):
    model = model_folder()
    run("dpo", model, data, tmp_path / "cpu", **extra)
    run("dpo", model, data, tmp_path / "gpu", device=gpu.type, precision=precision, **extra)
    expected, found = losses(tmp_path / "cpu"), losses(tmp_path / "gpu")
    assert len(found) == len(expected) == 6
    assert expected[-1] < expected[0] - 1e-3  # it learns: the same loss at every step would prove little
    apart = max(abs(one - other) for one, other in zip(found, expected, strict=True))
    record_property("apart", apart)
    assert apart < bound


@pytest.mark.parametrize("optim", SAVING)
def test_losses_of_the_cpu_with_an_optimizer_in_fewer_bits(
    gpu: torch.device, tmp_path: Path, data: str, model_folder, optim: str, record_property: Record
):
    model = model_folder()
    run("dpo", model, data, tmp_path / "cpu", precision="bf16", optim=optim)
    run("dpo", model, data, tmp_path / "gpu", device=gpu.type, precision="bf16", optim=optim)
    run("dpo", model, data, tmp_path / "whole", precision="bf16")
    expected, found, whole = (losses(tmp_path / name) for name in ("cpu", "gpu", "whole"))
    assert len(found) == 6
    assert expected[-1] < expected[0] - 1e-3
    apart = max(abs(one - other) for one, other in zip(found, expected, strict=True))
    record_property("apart", apart)
    record_property("from adamw", max(abs(one - other) for one, other in zip(found, whole, strict=True)))
    assert apart < 2e-2


@pytest.mark.parametrize("kind", ["adamw", *SAVING])
def test_an_optimizer_goes_the_way_of_adamw_in_float64(gpu: torch.device, kind: str, record_property: Record):
    """Forty steps under noisy gradients: the distance from where AdamW on the CPU in float64 ends, by the length of its way."""
    generator = torch.Generator().manual_seed(0)
    start, slope = ((0.1 * torch.randn(64, 128, generator=generator)).bfloat16() for _ in range(2))
    mine = nn.Parameter(start.to(gpu, KINDS[kind].trained, copy=True))
    optimizer = make_optimizer([("weight", mine)], weight_decay=0.1, kind=kind)
    exact = nn.Parameter(start.double())
    expected = AdamW([exact], lr=0.0, betas=(0.9, 0.99 if kind == "adamw-bf16" else 0.999), weight_decay=0.1)
    for number in range(40):
        gradient = (slope + 0.1 * torch.randn(64, 128, generator=generator)).bfloat16()
        for parameter, one in ((mine, optimizer), (exact, expected)):
            parameter.grad = gradient.to(parameter.device, parameter.dtype, copy=True)
            set_learning_rate(one, 1e-3 * (1 - number / 40))
            one.step()
    way = float((exact.detach() - start.double()).norm())
    far = float((mine.detach().double().cpu() - exact.detach()).norm()) / way
    record_property("far", far)
    assert way > 0.5
    assert far < {"adamw": 1e-5, "adamw-8bit": 0.05, "adamw-bf16": 0.05}[kind]


@four_bits
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_losses_of_the_cpu_on_a_base_in_four_bits(
    gpu: torch.device, tmp_path: Path, data: str, model_folder, precision: str, record_property: Record
):
    """A weight between two levels may go to either, so the bound is wider than that of a base in float32."""
    model, qlora = model_folder(), {"lora_rank": 4, "load_in_4bit": True, "learning_rate": 3e-2}
    run("dpo", model, data, tmp_path / "cpu", **qlora)
    run("dpo", model, data, tmp_path / "gpu", device=gpu.type, precision=precision, **qlora)
    expected, found = losses(tmp_path / "cpu"), losses(tmp_path / "gpu")
    assert expected[-1] < expected[0] - 0.05
    apart = max(abs(one - other) for one, other in zip(found, expected, strict=True))
    record_property("apart", apart)
    assert found[0] == pytest.approx(0.693147, abs=1e-4)  # the reference is the packed base, on a GPU too
    assert apart < 3e-2


@pytest.mark.usefixtures("_deterministic")
def test_offloaded_activations_change_no_loss(
    gpu: torch.device, tmp_path: Path, data: str, model_folder, monkeypatch: pytest.MonkeyPatch, record_property: Record
):
    """Of a model so small that every activation would stay, so the limit is set to one byte."""
    if gpu.type != "cuda":
        pytest.skip("from a CPU there is nowhere to move activations to, and the setting is refused")
    made: list[Offload] = []

    def making(copies: CudaCopies) -> Offload:
        made.append(Offload(copies, smallest=1, under_way=2**16))
        return made[-1]

    common = {"device": gpu.type, "precision": "bf16"}
    model = model_folder()
    run("dpo", model, data, tmp_path / "stays", **common)
    run("dpo", model, data, tmp_path / "again", **common)
    monkeypatch.setattr(run_module, "Offload", making)
    run("dpo", model, data, tmp_path / "moved", offload_activations=True, **common)
    assert made[0].counts.num_moved > 20
    assert made[0].counts.num_back > 0
    noise, apart = (_apart(tmp_path / "stays", tmp_path / other) for other in ("again", "moved"))
    record_property("moved", made[0].counts.bytes_moved)
    record_property("apart", apart)
    assert apart <= 2 * noise


@pytest.mark.usefixtures("_deterministic")
@pytest.mark.parametrize(("precision", "extra"), RESUMED)
def test_a_resumed_run_ends_where_the_whole_one_does(
    gpu: torch.device, tmp_path: Path, data: str, model_folder, precision: str, extra: dict[str, object], record_property: Record
):
    """To the bit where two whole runs are equal to the bit; else no further apart than twice what those are."""
    settings = {"device": gpu.type, "precision": precision, "save_every_steps": 3, "keep_checkpoints": 9, **extra}
    model = model_folder()
    run("dpo", model, data, tmp_path / "whole", **settings)
    run("dpo", model, data, tmp_path / "again", **settings)
    run("dpo", model, data, tmp_path / "resumed", **settings)
    for folder in sorted((tmp_path / "resumed" / "checkpoints").iterdir())[1:]:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    for name in ("status.json", "summary.json"):
        (tmp_path / "resumed" / name).unlink(missing_ok=True)
    run("dpo", model, data, tmp_path / "resumed", resume=True, **settings)
    noise, apart = (_apart(tmp_path / "whole", tmp_path / other) for other in ("again", "resumed"))
    record_property("two whole runs apart", noise)
    record_property("resumed apart", apart)
    assert apart <= 2 * noise
    if noise == 0:
        assert weights(tmp_path / "resumed") == weights(tmp_path / "whole")


def _apart(one: Path, other: Path) -> float:
    return max(abs(a - b) for a, b in zip(losses(one), losses(other), strict=True))
