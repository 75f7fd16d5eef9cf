"""Values outlive the process, belong to one context only, and trouble with the disk costs time, never a run."""

import sqlite3
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from prefopt.models.load import Precision, load_model
from prefopt.models.policy import EnginePath
from prefopt.models.reference_cache import CacheContext, ReferenceCache, key_of, weights_digest
from prefopt.models.save import save_model
from prefopt.models.settings import ModelSettings
from prefopt.training.group.processes import Processes
from prefopt.training.references import cache_context
from prefopt.trees import token_ids

CONTEXT = CacheContext(weights="w", compute="float32", quantisation="", path="flat, chunked head", device="cpu")
CPU = torch.device("cpu")
FLOAT32 = Precision(None, torch.float32)


def values(num: int, seed: int = 0) -> dict[bytes, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        key_of(token_ids([seed + 1]), token_ids([index]), None): rng.normal(size=1 + index % 7).astype(np.float32) for index in range(num)
    }


def same(found: dict[bytes, np.ndarray], expected: dict[bytes, np.ndarray]) -> bool:
    return found.keys() == expected.keys() and all(np.array_equal(found[key], expected[key]) for key in expected)


# What is kept.


def test_values_survive(tmp_path: Path):
    kept = values(1200)  # more than one query asks for
    ReferenceCache(tmp_path / "deep" / "cache", CONTEXT).put(kept)
    again = ReferenceCache(tmp_path / "deep" / "cache", CONTEXT)
    assert same(again.get(kept), kept)
    assert same(again.get([*values(3, seed=9), *list(kept)[:2], *list(kept)[:2]]), dict(list(kept.items())[:2]))
    assert again.get([]) == {}
    found = again.get(kept)
    assert {value.dtype for value in found.values()} == {np.dtype(np.float32)}


def test_later_values_replace_earlier_ones(tmp_path: Path):
    cache = ReferenceCache(tmp_path, CONTEXT)
    key = next(iter(values(1)))
    cache.put({key: np.zeros(3, np.float32)})
    cache.put({key: np.ones(2, np.float32)})
    assert cache.get([key])[key].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("name", ["weights", "compute", "quantisation", "path", "device"])
def test_the_context_separates(tmp_path: Path, name: str):
    kept = values(3)
    ReferenceCache(tmp_path, CONTEXT).put(kept)
    assert ReferenceCache(tmp_path, replace(CONTEXT, **{name: "other"})).get(kept) == {}
    assert ReferenceCache(tmp_path, replace(CONTEXT, engine=CONTEXT.engine + 1)).get(kept) == {}
    assert same(ReferenceCache(tmp_path, replace(CONTEXT)).get(kept), kept)


def test_the_file_says_what_it_belongs_to(tmp_path: Path):
    cache = ReferenceCache(tmp_path, CONTEXT)
    ReferenceCache(tmp_path, CONTEXT)
    with sqlite3.connect(cache.path) as connection:
        rows = connection.execute("SELECT json FROM context").fetchall()
    connection.close()
    assert len(rows) == 1
    assert '"path": "flat, chunked head"' in rows[0][0]


WRITER = """
import importlib.util, sys, types
import numpy as np
torch = types.ModuleType("torch")  # the cache needs it for annotations only, and it takes seconds
torch.Tensor = object
sys.modules["torch"] = torch
from pathlib import Path
spec = importlib.util.find_spec("prefopt")
path = Path(spec.submodule_search_locations[0]) / "models" / "reference_cache.py"
module_spec = importlib.util.spec_from_file_location("reference_cache", path)
module = importlib.util.module_from_spec(module_spec)
sys.modules["reference_cache"] = module
module_spec.loader.exec_module(module)
folder, name = sys.argv[1:]
print("ready", flush=True)
sys.stdin.readline()
context = module.CacheContext(weights="w", compute="float32", quantisation="", path="flat, chunked head", device="cpu")
cache = module.ReferenceCache(Path(folder), context)
for index in range(60):
    cache.put({f"{name} {index}".encode(): np.full(5, index, np.float32), b"shared": np.ones(4, np.float32)})
    assert f"{name} {index}".encode() in cache.get([f"{name} {index}".encode()])
"""


def test_processes_that_write_at_once_lose_nothing(tmp_path: Path):
    command = [sys.executable, "-W", "error", "-c", WRITER, str(tmp_path / "cache")]
    names = ["a", "b", "c"]
    writers = [subprocess.Popen([*command, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for name in names]
    for writer in writers:
        assert writer.stdout.readline() == b"ready\n"
    for writer in writers:  # all at once, the file not made yet
        writer.stdin.write(b"go\n")
        writer.stdin.flush()
    for writer in writers:
        _, errors = writer.communicate(timeout=60)
        assert (writer.returncode, errors.decode()) == (0, "")
    found = ReferenceCache(tmp_path / "cache", CONTEXT).get(
        [f"{name} {index}".encode() for name in names for index in range(60)] + [b"shared"]
    )
    assert len(found) == 3 * 60 + 1
    assert all(found[f"{name} {index}".encode()].tolist() == [index] * 5 for name in names for index in range(60))


# Trouble.


def test_a_damaged_value_is_not_given(tmp_path: Path):
    kept = values(3)
    cache = ReferenceCache(tmp_path, CONTEXT)
    cache.put(kept)
    first, second, third = kept
    with sqlite3.connect(cache.path) as connection:
        connection.execute("UPDATE logps SET value = ? WHERE key = ?", (np.full(1, 7, np.float32).tobytes(), first))
        connection.execute("UPDATE logps SET value = ? WHERE key = ?", (kept[second].tobytes()[:-4], second))
    connection.close()
    assert same(ReferenceCache(tmp_path, CONTEXT).get(kept), {third: kept[third]})
    cache.put(kept)
    assert same(cache.get(kept), kept)


def test_a_file_that_is_no_database_is_put_aside(tmp_path: Path):
    cache = ReferenceCache(tmp_path, CONTEXT)
    cache.path.write_bytes(b"this is no database, however long one reads in it" * 100)
    kept = values(3)
    with pytest.warns(UserWarning, match=r"was damaged \(file is not a database\) and is made anew; the old file is .*\.damaged"):
        cache = ReferenceCache(tmp_path, CONTEXT)
    assert cache.usable
    assert cache.path.with_suffix(".damaged").read_bytes().startswith(b"this is no database")
    cache.put(kept)
    assert same(ReferenceCache(tmp_path, CONTEXT).get(kept), kept)


def test_a_database_with_holes_is_put_aside_when_they_are_met(tmp_path: Path):
    kept = values(2000)
    cache = ReferenceCache(tmp_path, CONTEXT)
    cache.put(kept)
    whole = bytearray(cache.path.read_bytes())
    assert len(whole) > 20_000
    whole[4096 * 2 :] = b"\xff" * (len(whole) - 4096 * 2)
    cache.path.write_bytes(whole)
    with pytest.warns(UserWarning, match="was damaged .* and is made anew"):
        found = cache.get(kept)
    assert all(np.array_equal(found[key], kept[key]) for key in found)
    cache.put(kept)
    assert same(cache.get(kept), kept)


def test_a_folder_that_cannot_be_made_costs_a_warning(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="cannot be used .*; the run goes on without it"):
        cache = ReferenceCache(tmp_path / "file" / "cache", CONTEXT)
    assert not cache.usable
    cache.put(values(2))
    assert cache.get(values(2)) == {}


def test_a_disk_that_fills_up_costs_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cache = ReferenceCache(tmp_path, CONTEXT)
    kept = values(2)
    cache.put(kept)

    class Full(sqlite3.Connection):
        def executemany(self, *_):
            raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(cache, "_connect", lambda: sqlite3.connect(cache.path, factory=Full))
    with pytest.warns(UserWarning, match=r"cannot be used \(database or disk is full\); the run goes on without it"):
        cache.put(values(2, seed=5))
    cache.put(values(2, seed=6))
    assert same(ReferenceCache(tmp_path, CONTEXT).get(kept), kept)


def test_a_file_that_vanishes_costs_a_warning(tmp_path: Path):
    cache = ReferenceCache(tmp_path / "cache", CONTEXT)
    for path in cache.path.parent.iterdir():
        path.unlink()
    cache.path.parent.rmdir()
    with pytest.warns(UserWarning, match="cannot be used .*; the run goes on without it"):
        assert cache.get(values(1)) == {}


# Digests.


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "matrix": torch.randn(4, 6, generator=generator),
        "bf16": torch.randn(3, 5, generator=generator).bfloat16(),
        "scalar": torch.tensor(0.5),
        "empty": torch.zeros(0, 3),
        "flag": torch.tensor([True, False]),
        "count": torch.tensor(3),
        "turned": torch.randn(6, 4, generator=generator).T,
    }


def test_the_digest_changes_with_any_single_number():
    base = weights_digest(tensors())
    assert weights_digest(tensors()) == base
    assert weights_digest(dict(reversed(tensors().items()))) == base
    for name, tensor in tensors().items():
        for place in range(tensor.numel()):
            changed = tensors()
            changed[name] = changed[name].contiguous()
            flat = changed[name].view(-1)
            flat[place] = ~flat[place] if tensor.dtype == torch.bool else flat[place] + 1
            assert weights_digest(changed) != base, (name, place)


def test_the_digest_changes_with_name_shape_and_dtype():
    base = weights_digest(tensors())
    renamed = tensors()
    renamed["other"] = renamed.pop("empty")
    assert weights_digest(renamed) != base
    assert weights_digest(tensors() | {"empty": torch.zeros(3, 0)}) != base
    assert weights_digest(tensors() | {"matrix": tensors()["matrix"].view(6, 4)}) != base
    assert weights_digest(tensors() | {"count": torch.tensor(3, dtype=torch.int32)}) != base
    assert weights_digest(tensors() | {"turned": tensors()["turned"].contiguous()}) == base  # the same numbers, laid out otherwise


def context(folder: Path | str, *, path: str = "flat", precision: Precision = FLOAT32, **settings: object) -> CacheContext:
    loaded = load_model(ModelSettings(model=str(folder), **settings), precision=precision, device=CPU, seed=0)
    return cache_context(loaded, EnginePath(path, None), precision, Processes(0, 1, CPU))


def test_contexts_of_models(model_folder: Callable[..., Path], make_model, chat_tokenizer, tmp_path: Path):
    base = context(model_folder())
    # A new adapter starts from the model itself, whatever its rank and place.
    for settings in ({"lora_rank": 2}, {"lora_rank": 4, "target_modules": ["q_proj"]}, {"lora_rank": 2, "modules_to_save": ["lm_head"]}):
        assert context(model_folder(), **settings) == base
    bf16 = Precision(torch.bfloat16, torch.bfloat16)
    others = [
        context(model_folder(seed=1)),
        context(model_folder(), path="plain"),
        context(model_folder(), precision=Precision(torch.bfloat16, torch.float32)),
        context(model_folder(), precision=bf16, lora_rank=2),
    ]
    # The same weights are another function with another config.
    make_model(rms_norm_eps=1e-3).save_pretrained(tmp_path / "eps")
    chat_tokenizer.save_pretrained(tmp_path / "eps")
    others.append(context(tmp_path / "eps"))
    assert len({one.digest() for one in (base, *others)}) == 1 + len(others)


def test_contexts_of_adapters(model_folder: Callable[..., Path], tmp_path: Path):
    loaded = load_model(ModelSettings(model=str(model_folder()), lora_rank=2), precision=FLOAT32, device=CPU, seed=0)
    save_model(loaded, tmp_path / "adapter")
    first = context(tmp_path / "adapter")
    assert first == context(model_folder(), adapter=str(tmp_path / "adapter"))
    assert first != context(model_folder())
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 4', '"lora_alpha": 8'))
    assert context(tmp_path / "adapter") != first  # the same weights at another scale
