"""Values of the reference before training: each is computed once, and all processes end with all of them."""

import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from tests.training.group_server import Server
from tests.training.runs import figures, losses, rows, run

from prefopt.models.reference_cache import CacheContext, ReferenceCache
from prefopt.training.precompute import lacking, portions, value_lengths
from prefopt.trees import Completion, PromptTree, token_ids


def test_each_value_is_claimed_by_the_first_tree_that_gives_it():
    tree = PromptTree(token_ids([1, 2]), (Completion(token_ids([3])), Completion(token_ids([4, 5]))))
    swapped = PromptTree(tree.prompt_ids, tree.completions[::-1])
    half = PromptTree(tree.prompt_ids, (tree.completions[0], Completion(token_ids([6]))))
    assert list(value_lengths(tree).values()) == [1, 2]
    assert lacking([tree, swapped, half], {}) == [0, 2]
    assert lacking([tree, swapped, half], value_lengths(tree)) == [2]
    assert lacking([tree, swapped, half], value_lengths(tree) | value_lengths(half)) == []


def test_values_are_sent_in_portions(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("prefopt.training.precompute.SENT_AT_ONCE", 5)
    lengths = {b"a": 3, b"b": 2, b"c": 1, b"d": 9, b"e": 4}
    assert list(portions(lengths)) == [[b"a", b"b"], [b"c"], [b"d"], [b"e"]]
    assert list(portions({})) == []


@pytest.mark.parametrize("knows", ["main", "other", "both in part"])
def test_caches_that_differ_give_the_run_that_one_cache_gives(
    groups: Server, model_folder: Callable[..., Path], pairs: str, tmp_path: Path, knows: str
):
    """What the main process has it hands out, what it lacks is computed; in the end every machine has all of it."""
    caches = [tmp_path / "cache of main", tmp_path / "cache of other"]
    first = Path(pairs).read_text().splitlines()
    halves = [tmp_path / "first.jsonl", tmp_path / "second.jsonl"]
    halves[0].write_text("\n".join(first[:8]) + "\n")
    halves[1].write_text("\n".join(first[5:]) + "\n")
    known = {"main": [(caches[0], pairs)], "other": [(caches[1], pairs)], "both in part": list(zip(caches, map(str, halves), strict=True))}
    for cache, data in known[knows]:
        run("dpo", model_folder(), data, tmp_path / f"filled {cache.name}", cache_dir=cache, max_steps=1, batch_size=12, samples=0)
    run("dpo", model_folder(), pairs, tmp_path / "one", cache_dir=tmp_path / "cache", samples=0, max_steps=2)
    of_rank = {"1": {"cache_dir": caches[1]}}
    same = {"method": "dpo", "model": model_folder(), "data": pairs, "samples": 0, "max_steps": 2}
    groups.run("train", out=tmp_path / "two", cache_dir=caches[0], of_rank=of_rank, parallel="fsdp", **same)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)


def test_a_run_on_little_memory_is_the_run_on_much(
    model_folder: Callable[..., Path], pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Trees read from the disk, the reference computed in parts and read from its cache: the same numbers, but for how parts are packed."""
    run("dpo", model_folder(), pairs, tmp_path / "much", eval_fraction=0.3)
    for name, limit in (("data.store.HELD", 100), ("models.reference_values.HELD", 100), ("training.precompute.PORTION", 4)):
        monkeypatch.setattr(f"prefopt.{name}", limit)
    settings = {"eval_fraction": 0.3, "cache_dir": tmp_path / "other cache"}
    run("dpo", model_folder(), pairs, tmp_path / "little", **settings)
    assert losses(tmp_path / "little") == pytest.approx(losses(tmp_path / "much"), abs=1e-5)
    evaluated = [[row["eval/loss"] for row in rows(tmp_path / name) if "eval/loss" in row] for name in ("little", "much")]
    assert evaluated[0] == pytest.approx(evaluated[1], abs=1e-5)
    run("dpo", model_folder(), pairs, tmp_path / "again", **settings)
    assert figures(tmp_path / "again") == figures(tmp_path / "little"), "from the caches, to the bit"


def test_one_more_method_leaves_the_values_of_those_before_alone(model_folder: Callable[..., Path], pairs: str, tmp_path: Path):
    """KTO runs each answer beside one of another prompt, which rounds otherwise: a later run of DPO is to find what the first one had."""
    shared = {"cache_dir": tmp_path / "cache", "samples": 0, "max_steps": 2}
    run("dpo", model_folder(), pairs, tmp_path / "before", **shared)
    [path] = (tmp_path / "cache").rglob("*.sqlite")
    cache_at(path).put({key: value + 1e-5 for key, value in values_in(path).items()})  # by about what rounding does
    moved = values_in(path)
    run("kto", model_folder(), pairs, tmp_path / "kto", **shared)
    now = values_in(path)
    assert len(now) > len(moved)
    assert all(np.array_equal(now[key], value) for key, value in moved.items())


def cache_at(path: Path) -> ReferenceCache:
    with closing(sqlite3.connect(path)) as connection:
        [[context]] = connection.execute("SELECT json FROM context")
    return ReferenceCache(path.parent, CacheContext(**json.loads(context)))


def values_in(path: Path) -> dict[bytes, np.ndarray]:
    with closing(sqlite3.connect(path)) as connection:
        keys = [key for (key,) in connection.execute("SELECT key FROM logps")]
    return cache_at(path).get(keys)
