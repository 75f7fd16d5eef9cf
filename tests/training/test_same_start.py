"""A run goes on with the model, the reference and the notes that it began with, or says what is not the same."""

import json
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file
from tests.training.runs import Asks, losses, run
from tests.training.test_resume import manifest_of, stopped_at

from prefopt.errors import RunError
from prefopt.models.reference_cache import weights_digest


@pytest.fixture(scope="module")
def model(model_folder: Callable[..., Path]) -> Path:
    return model_folder()


@pytest.fixture
def other(make_model: Callable[..., Any], model: Path, tmp_path: Path) -> Path:
    """Another model with the same tokenizer."""
    folder = Path(shutil.copytree(model, tmp_path / "other"))
    make_model(seed=5).save_pretrained(folder)
    return folder


def scale_every_other(folder: Path) -> None:
    """Every other number of the larger weights half as large again: a look at 64 of each, evenly spread, would not see it."""
    [path] = folder.glob("*.safetensors")
    tensors = load_file(path)
    large = [tensor for tensor in tensors.values() if tensor.numel() % 128 == 0]
    assert large
    for tensor in large:
        tensor.view(-1)[1::2] *= 1.5
    save_file(tensors, path, metadata={"format": "pt"})


# The model.


@pytest.mark.parametrize("threads", [1, 2])
def test_half_of_a_model_s_numbers_is_enough_to_be_refused(model: Path, pairs: str, tmp_path: Path, threads: int):
    """On another number of threads too, which is the same device."""
    mine = Path(shutil.copytree(model, tmp_path / "model"))
    for lora_rank in (0, 2):
        out = tmp_path / f"run-{lora_rank}"
        stopped_at(2, mine, pairs, out, lora_rank=lora_rank)
        scale_every_other(mine)
        torch.set_num_threads(threads)
        try:
            with pytest.raises(RunError, match=rf"the model {mine} has changed since .*step-000002 was begun from it"):
                run("dpo", mine, pairs, out, resume=True, lora_rank=lora_rank)
        finally:
            torch.set_num_threads(1)
        shutil.copytree(model, mine, dirs_exist_ok=True)


def test_the_fingerprint_is_that_of_all_weights(model: Path, pairs: str, tmp_path: Path):
    mine = Path(shutil.copytree(model, tmp_path / "model"))
    found = []
    for place in range(3):
        run("dpo", mine, pairs, tmp_path / str(place), max_steps=1)
        found.append(manifest_of(tmp_path / str(place))["model"]["fingerprint"])
        [path] = mine.glob("*.safetensors")
        tensors = load_file(path)
        if place == 1:  # one number of all
            next(iter(tensors.values())).view(-1)[7] += 1e-3
        save_file(tensors, path, metadata={"format": "pt"})
    assert found[0] == found[1] != found[2]
    assert len(found[0]) == len(weights_digest({})) == 32


# The reference.


@pytest.mark.parametrize("cache", [True, False], ids=["cached", "live"])
@pytest.mark.parametrize("lora_rank", [0, 2], ids=["full", "lora"])
def test_a_changed_reference_is_refused(model: Path, other: Path, pairs: str, tmp_path: Path, cache: bool, lora_rank: int):
    """The losses after it would be those of another objective."""
    settings = {"reference": str(other), "reference_cache": cache, "lora_rank": lora_rank, "learning_rate": 1e-2}
    out = tmp_path / "run"
    stopped_at(2, model, pairs, out, **settings)
    kept = Path(shutil.copytree(other, tmp_path / "kept"))
    scale_every_other(other)
    with pytest.raises(RunError, match=rf"the reference {other} has changed since .*step-000002 was begun: its weights are others now"):
        run("dpo", model, pairs, out, resume=True, **settings)
    shutil.copytree(kept, other, dirs_exist_ok=True)
    assert run("dpo", model, pairs, out, resume=True, **settings).summary["steps"] == 6
    assert manifest_of(out)["resumed"][0]["differences"] == []
    run("dpo", model, pairs, tmp_path / "whole", **settings)
    assert losses(out) == losses(tmp_path / "whole")
    assert manifest_of(out)["reference"].keys() == {"name", "fingerprint"}


def test_a_reference_that_is_the_start_has_no_fingerprint_of_its_own(model: Path, pairs: str, tmp_path: Path):
    run("dpo", model, pairs, tmp_path / "run", max_steps=1)
    assert "reference" not in manifest_of(tmp_path / "run")


@pytest.mark.parametrize(("shift", "refused"), [(1e-5, False), (1e-2, True), (0.5, True)])
def test_only_rounding_is_taken_for_rounding(model: Path, pairs: str, tmp_path: Path, shift: float, refused: bool):
    """Values of the cache that another program has changed: by a few bits, or so that they are those of another function."""
    out = tmp_path / "run"
    stopped_at(2, model, pairs, out)
    [path] = (tmp_path / "cache").rglob("*.sqlite")
    with sqlite3.connect(path) as connection:
        for key, value in connection.execute("SELECT key, value FROM logps").fetchall():
            moved = (np.frombuffer(value, np.float32) + np.float32(shift)).tobytes()
            checksum = xxhash.xxh3_64_intdigest(moved) - 2**63
            connection.execute("UPDATE logps SET value = ?, checksum = ? WHERE key = ?", (moved, checksum, key))
    connection.close()
    if not refused:
        run("dpo", model, pairs, out, resume=True)
        assert manifest_of(out)["resumed"][0]["differences"] == ["the reference's values were computed anew, in another order"]
        return
    before = (out / "metrics.jsonl").read_bytes()
    with pytest.raises(RunError, match=rf"not those that .*step-000002 was trained with: they differ by {shift:.2g} nats per token"):
        run("dpo", model, pairs, out, resume=True)
    assert (out / "metrics.jsonl").read_bytes() == before
    assert run("dpo", model, pairs, out, resume=True, cache_dir=tmp_path / "another").summary["steps"] == 6


# The notes.


def break_notes(path: Path, how: str) -> None:
    if how == "gone":
        path.unlink()
    elif how == "empty":
        path.write_text("")
    elif how == "one line":
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(["{broken\n", *lines[1:]]))
    else:
        path.write_bytes(b"\xff\x00{" * 100)


@pytest.mark.parametrize("how", ["gone", "empty", "binary", "one line"])
def test_damaged_figures_of_the_held_out_examples_are_told(model: Path, pairs: str, tmp_path: Path, how: str):
    out, settings = tmp_path / "run", {"eval_fraction": 0.33}
    stopped_at(2, model, pairs, out, **settings)
    lines = [json.loads(line) for line in (out / "held_out.jsonl").read_text().splitlines()]
    assert all(line["before"] for line in lines)
    break_notes(out / "held_out.jsonl", how)
    narrator = Asks(lambda done: None)
    run("dpo", model, pairs, out, resume=True, narrator=narrator, **settings)
    lost = 1 if how == "one line" else len(lines)
    said = f"note: held_out.jsonl is damaged or gone: for {lost} of its {len(lines)} examples the figures from before training are lost"
    assert [line for line in narrator.said if line.startswith(said)]
    after = [json.loads(line) for line in (out / "held_out.jsonl").read_text().splitlines()]
    assert sum(not line["before"] for line in after) == lost
    assert all(line["after"] for line in after)


@pytest.mark.parametrize("how", ["gone", "empty", "binary"])
def test_a_damaged_manifest_is_told(model: Path, pairs: str, tmp_path: Path, how: str):
    out = tmp_path / "run"
    stopped_at(2, model, pairs, out)
    break_notes(out / "manifest.json", how)
    narrator = Asks(lambda done: None)
    run("dpo", model, pairs, out, resume=True, narrator=narrator)
    assert [line for line in narrator.said if line.startswith("note: manifest.json is damaged or gone; it is written anew")]
    assert manifest_of(out)["resumed"][0]["step"] == 2


def test_nothing_is_said_of_notes_that_are_whole(model: Path, pairs: str, tmp_path: Path):
    out, narrator = tmp_path / "run", Asks(lambda done: None)
    stopped_at(2, model, pairs, out, eval_fraction=0.33)
    run("dpo", model, pairs, out, resume=True, narrator=narrator, eval_fraction=0.33)
    assert not [line for line in narrator.said if "damaged" in line]
