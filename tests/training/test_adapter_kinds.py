"""DoRA and rank-stabilised LoRA: that they are what they are called, start as the identity, and go on to the bit."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from tests.training.runs import figures, losses, pair_rows, rows, run, weights, write_rows
from tests.training.test_resume import stopped_at

from prefopt.models.load import Precision, load_model
from prefopt.models.settings import ModelSettings

KINDS: dict[str, dict[str, Any]] = {"dora": {"dora": True}, "rslora": {"rslora": True}, "both": {"dora": True, "rslora": True}}


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    return write_rows(tmp_path / "pairs.jsonl", pair_rows())


def scaling(model_folder: Callable[..., Path], **settings: Any) -> set[float]:
    """What the adapter's product is multiplied by, in all layers."""
    wanted = ModelSettings(model=str(model_folder()), **settings)
    loaded = load_model(wanted, precision=Precision(None, torch.float32), device=torch.device("cpu"), seed=0)
    return {module.scaling["default"] for module in loaded.model.modules() if isinstance(getattr(module, "scaling", None), dict)}


@pytest.mark.parametrize(
    ("settings", "factor"),
    [
        ({"lora_rank": 4}, 2.0),
        ({"lora_rank": 8, "lora_alpha": 4}, 0.5),
        ({"lora_rank": 4, "rslora": True}, 8.0),
        ({"lora_rank": 9, "rslora": True, "lora_alpha": 6}, 2.0),
        ({"lora_rank": 4, "dora": True}, 2.0),
    ],
)
def test_the_adapter_is_scaled_by_its_rank_or_the_root_of_it(model_folder: Callable[..., Path], settings: dict[str, Any], factor: float):
    assert scaling(model_folder, **settings) == {factor}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_starts_at_the_reference_learns_and_goes_on_to_the_bit(
    model_folder: Callable[..., Path], pairs: str, tmp_path: Path, kind: str
):
    common = {"lora_rank": 2, "save_every_steps": 2, "keep_checkpoints": 9, **KINDS[kind]}
    run("dpo", model_folder(), pairs, tmp_path / "whole", **common)
    found = losses(tmp_path / "whole")
    assert found[0] == pytest.approx(math.log(2), abs=1e-6)
    assert found[-1] < found[0] - 0.005
    stopped_at(4, model_folder(), pairs, tmp_path / "stopped", **common)
    run("dpo", model_folder(), pairs, tmp_path / "stopped", resume=True, **common)
    assert figures(tmp_path / "stopped") == figures(tmp_path / "whole")
    assert weights(tmp_path / "stopped") == weights(tmp_path / "whole")
    config = json.loads((tmp_path / "whole/model/adapter_config.json").read_text())
    assert (config["use_dora"], config["use_rslora"]) == ("dora" in KINDS[kind], "rslora" in KINDS[kind])


def test_dora_trains_the_lengths_of_the_weights(model_folder: Callable[..., Path], pairs: str, tmp_path: Path):
    run("dpo", model_folder(), pairs, tmp_path / "run", lora_rank=2, dora=True)
    lengths = {name: value for name, value in load_file(tmp_path / "run/model/adapter_model.safetensors").items() if "magnitude" in name}
    base = load_file(model_folder() / "model.safetensors")
    assert len(lengths) == 7 * 2  # linear layers of two blocks
    for name, value in lengths.items():
        own = base[name.removeprefix("base_model.model.").removesuffix(".lora_magnitude_vector") + ".weight"]
        apart = (value - torch.linalg.norm(own, dim=1)).abs().max()
        assert 1e-4 < apart < 0.1


@pytest.mark.parametrize("kind", ["dora", "rslora"])
def test_going_on_from_such_an_adapter_keeps_its_kind_and_its_values(
    model_folder: Callable[..., Path], pairs: str, tmp_path: Path, kind: str
):
    run("dpo", model_folder(), pairs, tmp_path / "first", lora_rank=2, **KINDS[kind])
    run("dpo", tmp_path / "first/model", pairs, tmp_path / "second", max_steps=2, reference_cache=False)
    first = rows(tmp_path / "second")[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)  # the reference is the adapter as it was
    config = json.loads((tmp_path / "second/model/adapter_config.json").read_text())
    assert config["use_dora" if kind == "dora" else "use_rslora"] is True


@pytest.mark.parametrize("kind", ["dora", "rslora"])
def test_they_are_refused_without_an_adapter(kind: str):
    with pytest.raises(ValidationError, match=f"{kind} shapes a new adapter: give lora_rank too"):
        ModelSettings(model="m", **KINDS[kind])
