"""Runs on a base in four bits, from the command line to the merged model."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.command_line import prefopt, refused
from tests.training.group_server import Server
from tests.training.runs import losses, rows, run, weights
from tests.training.test_sharding import cut_short

from prefopt.errors import ConfigError, ModelError, RunError
from prefopt.methods.dpo import DPO, DPOSettings
from prefopt.models.quantise import FOUR_BITS
from prefopt.training.assemble import method_named, settings_for
from prefopt.training.combination import check_combination
from prefopt.training.group.processes import ALONE, Processes
from prefopt.training.memory.available import Available
from prefopt.training.memory.check import MemoryCheck, Micro, estimate_memory
from prefopt.training.record.resume import FREE, ROUNDING
from prefopt.training.settings import RunSettings

pytest.importorskip("bitsandbytes")

CPU = torch.device("cpu")
SAME: dict[str, Any] = {"lora_rank": 4, "load_in_4bit": True, "save_every_steps": 2, "keep_checkpoints": 9, "eval_fraction": 0.3}
TWO = Processes(0, 2, CPU)


@pytest.fixture(scope="module")
def finished(model_folder: Callable[..., Path], pairs: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; nobody writes into it."""
    folder = tmp_path_factory.mktemp("qlora")
    run("dpo", model_folder(), pairs, folder / "run", learning_rate=3e-2, **SAME)
    return folder / "run"


def settings(model: Path | str, **given: Any) -> RunSettings:
    return settings_for(method_named("dpo")).model_validate({"model": str(model), "data": "pairs.jsonl", "out": "out"} | given)


def test_it_starts_at_a_margin_of_0_and_learns(finished: Path):
    found = rows(finished)
    assert found[0]["rewards/margin"] == 0.0
    assert found[0]["loss"] == pytest.approx(0.693147, abs=1e-6)
    assert found[-1]["loss"] < 0.6


def test_it_goes_on_to_the_bit(finished: Path, model_folder: Callable[..., Path], pairs: str, tmp_path: Path):
    out = cut_short(finished, tmp_path / "run")
    run("dpo", model_folder(), pairs, out, learning_rate=3e-2, resume=True, **SAME)
    assert losses(out) == losses(finished)
    assert weights(out) == weights(finished)
    state = json.loads((out / "manifest.json").read_text())
    assert state["resumed"][0]["differences"] == []


def test_what_it_was_is_noted_and_cannot_change_when_it_goes_on(
    finished: Path, model_folder: Callable[..., Path], pairs: str, tmp_path: Path
):
    manifest = json.loads((finished / "manifest.json").read_text())
    assert manifest["model"]["quantisation"] == FOUR_BITS
    assert manifest["model"]["num_parameters"] == 47264  # the weights, not the bytes
    assert manifest["settings"]["load_in_4bit"] is True
    assert {"load_in_4bit", "optim"}.isdisjoint({*FREE, *ROUNDING})
    out = cut_short(finished, tmp_path / "run")
    with pytest.raises(RunError, match="load_in_4bit was True, is False"):
        run("dpo", model_folder(), pairs, out, learning_rate=3e-2, resume=True, **(SAME | {"load_in_4bit": False}))


def test_the_adapter_alone_is_saved_and_its_card_says_what_it_stood_on(finished: Path):
    assert not (finished / "model" / "model.safetensors").exists()
    assert all("lora_" in name for name in _names(finished / "model" / "adapter_model.safetensors"))
    card = (finished / "model" / "README.md").read_text()
    assert f"In training the base was held in {FOUR_BITS}." in card
    assert "load_in_4bit=True" in card


def test_references_of_every_kind(model_folder: Callable[..., Path], finished: Path, pairs: str, tmp_path: Path):
    """Switched off in every step; the adapter that it started from; another model, which is held in four bits too."""
    common = {"load_in_4bit": True, "reference_cache": False, "max_steps": 2}
    run("dpo", model_folder(), pairs, tmp_path / "off", lora_rank=4, **common)
    run("dpo", finished / "model", pairs, tmp_path / "start", **common)
    run("dpo", model_folder(), pairs, tmp_path / "other", lora_rank=4, reference=str(model_folder("llama", seed=1)), **common)
    run("dpo", model_folder(), pairs, tmp_path / "same", lora_rank=4, reference=str(model_folder()), **common)
    first = {name: rows(tmp_path / name)[0]["rewards/margin"] for name in ("off", "start", "other", "same")}
    assert first["off"] == first["start"] == first["same"] == 0.0
    assert abs(first["other"]) > 1e-3


def test_several_processes_make_the_run_of_one(
    groups: Server, finished: Path, model_folder: Callable[..., Path], pairs: str, tmp_path: Path
):
    given = {"learning_rate": 3e-2, "cache_dir": tmp_path / "cache", **SAME}
    groups.run("train", method="dpo", model=model_folder(), data=pairs, out=tmp_path / "run", parallel="ddp", **given)
    assert losses(tmp_path / "run") == pytest.approx(losses(finished), abs=1e-5)


def test_what_does_not_go_together_is_refused_before_anything_is_read(model_folder: Callable[..., Path], finished: Path, monkeypatch: Any):
    adapter = {"lora_rank": 4, "load_in_4bit": True}
    check_combination(settings(model_folder(), **adapter), ALONE)
    check_combination(settings(finished / "model", load_in_4bit=True), TWO)
    check_combination(settings(model_folder(), parallel="fsdp", **adapter), ALONE)  # one process cuts nothing
    with pytest.raises(ConfigError, match=r"--load-in-4bit with --parallel fsdp: .* Use --parallel ddp"):
        check_combination(settings(model_folder(), parallel="fsdp", **adapter), TWO)
    with pytest.raises(ModelError, match="cannot be trained itself"):
        check_combination(settings(model_folder(), load_in_4bit=True), ALONE)
    monkeypatch.setattr("prefopt.models.quantise.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"--load-in-4bit needs the library bitsandbytes.*pip install 'prefopt\[bits\]'"):
        check_combination(settings(model_folder(), **adapter), ALONE)


def test_the_memory_that_it_takes_is_that_of_the_packed_weights(model_folder: Callable[..., Path]):
    method = DPO(DPOSettings())
    whole, packed = (
        {part.name: part.num_bytes for part in estimate_memory(method, settings(model_folder(), **given), positions=256, device=CPU).parts}
        for given in ({"lora_rank": 4, "precision": "bf16"}, {"lora_rank": 4, "precision": "bf16", "load_in_4bit": True})
    )
    linear = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64)  # two layers: q, o; k, v; gate, up, down
    saved = whole["frozen weights (bf16)"] - packed["frozen weights (4 bits)"]
    assert saved == pytest.approx(linear * (2 - 4.127 / 8), rel=0.02)
    assert packed["one layer written out"] == 2 * 32 * 64
    assert whole["one layer written out"] == 0
    for name in ("trained weights", "gradients", "AdamW's moments", "activations of 256 positions"):
        assert packed[name] == whole[name]


def test_it_is_proposed_where_memory_lacks(model_folder: Callable[..., Path]):
    def remedies(**given: Any) -> list[str]:
        check = MemoryCheck(DPO(DPOSettings()), settings(model_folder(), **given), 1, CPU, Available(1000, "of this machine"))
        return [words for words, *_ in check._remedies(Micro(512, (40, 20, 20), accumulates=False))]

    assert "--load-in-4bit on" in remedies(lora_rank=4)
    assert "--load-in-4bit on" not in remedies() + remedies(lora_rank=4, load_in_4bit=True) + remedies(lora_rank=4, parallel="fsdp")


def test_the_command_line_from_training_to_one_model(model_folder: Callable[..., Path], pairs: str, tmp_path: Path):
    out = tmp_path / "run"
    common = ["--data", pairs, "--max-length", "128", "--samples", "1", "--sample-tokens", "4", "--learning-rate", "1e-2"]
    said = prefopt(
        "train", "dpo", "--model", str(model_folder()), "--out", str(out), *common, "--lora-rank", "4", "--load-in-4bit",
        "--batch-size", "4", "--eval-fraction", "0.3", "--cache-dir", str(tmp_path / "cache"),
    ).check()  # fmt: skip
    assert said.code == 0, said.err
    assert f"on a base in {FOUR_BITS}" in said.err + said.out
    again = prefopt("train", "--config", str(out / "manifest.json"), "--out", str(tmp_path / "again"))
    assert again.code == 0, again.err
    assert losses(tmp_path / "again") == losses(out)

    ask = ["generate", str(out), "--prompt", "Is number 3 good?", "--max-new-tokens", "4"]
    answered = prefopt(*ask, "--logps", "--out", str(tmp_path / "a.jsonl"))
    assert answered.code == 0, answered.err
    assert f"in {FOUR_BITS}" in answered.err + answered.out  # as it was trained
    plain = prefopt(*ask, "--load-in-4bit", "off")
    assert plain.code == 0, plain.err
    assert FOUR_BITS not in plain.err + plain.out

    merged = prefopt("merge", str(out), "--out", str(tmp_path / "merged"))
    assert merged.code == 0, merged.err
    note = r"note: the adapter was trained on its base in 4 bits, and is merged into the base as it is stored.* are (\S+) nats"
    found = re.search(note, merged.out + merged.err)
    assert found is not None
    assert 1e-4 < float(found[1]) < 0.5
    assert "WARNING" not in merged.out + merged.err
    notes = json.loads((tmp_path / "merged" / "prefopt_merge.json").read_text())
    assert notes["trained_in_4bit"] is True
    assert notes["comparison"]["merged"] <= notes["comparison"]["allowed"]
    assert "merged into the base as it is stored" in (tmp_path / "merged" / "README.md").read_text()

    error = refused("train", "dpo", "--model", str(model_folder()), "--out", str(tmp_path / "full"), *common, "--load-in-4bit")
    assert "in 4 bits cannot be trained itself" in error


def _names(path: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return list(file.keys())
