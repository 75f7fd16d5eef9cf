"""Whole runs on a GPU: the losses of the CPU, and a resumed run that ends where the uninterrupted one does."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tests.training.runs import losses, pair_rows, run, weights, write_rows

pytestmark = pytest.mark.gpu

Record = Callable[[str, object], None]


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


@pytest.mark.usefixtures("_deterministic")
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_resumed_run_ends_where_the_whole_one_does(
    gpu: torch.device, tmp_path: Path, data: str, model_folder, precision: str, record_property: Record
):
    """To the bit where two whole runs are equal to the bit; else no further apart than twice what those are."""
    settings = {"device": gpu.type, "precision": precision, "save_every_steps": 3, "keep_checkpoints": 9}
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
