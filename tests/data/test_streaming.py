"""Data larger than memory: what is held does not grow with the rows, and what comes out is what came out of memory."""

import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefopt.cli import main
from prefopt.data import growing, sources, store, words, workers
from prefopt.data.cache import kept, prune, report
from prefopt.data.dataset import load, split
from prefopt.data.store import record_of
from prefopt.errors import DataError


def row(number: int) -> dict[str, str]:
    text = " ".join(f"word{(number * 7 + place) % 97}" for place in range(60))
    return {"prompt": f"{number} {text}? ", "chosen": f"good answer {number}", "rejected": "bad"}


def written(path: Path, rows: int, make: Callable[[int], dict[str, Any]] = row) -> str:
    with path.open("w") as file:
        for number in range(rows):
            file.write(json.dumps(make(number)) + "\n")
    return str(path)


def peak_bytes(path: str, settings: Callable[..., Any], tokenizer: Any, **given: Any) -> int:
    """The most that reading and tokenising held at once, and looking at each tree and splitting too."""
    tracemalloc.start()
    made = load([path], settings(data_workers=1, **given), tokenizer, kind="pair")
    split(made.trees, 0.1, 0)
    for tree in made.trees:
        assert tree.num_tokens
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


def test_memory_does_not_grow_with_the_rows(tmp_path: Path, settings, tokenizer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(store, "HELD", 100_000)
    monkeypatch.setattr(words, "KEPT", 1000)  # each row has words of its own, and some of them are kept
    few, many = 1024, 4096
    paths = [written(tmp_path / f"{number}.jsonl", number) for number in (few, many)]
    load([written(tmp_path / "first.jsonl", 600)], settings(), tokenizer, kind="pair")  # what is loaded once, the proof of words too
    of_few, of_many = (peak_bytes(path, settings, tokenizer) for path in paths)
    per_row = (of_many - of_few) / (many - few)
    held_before = (Path(paths[1]).stat().st_size) / many
    assert held_before > 450
    assert per_row < 150, "what stands in the index, and some arrays of numbers while they are split"


def test_a_file_and_memory_give_the_same(tmp_path: Path, settings, tokenizer, monkeypatch: pytest.MonkeyPatch):
    path = written(tmp_path / "a.jsonl", 700)
    small = load([path], settings(), tokenizer, kind="pair")
    monkeypatch.setattr(store, "HELD", 1000)
    monkeypatch.setattr(growing, "CHUNK", 64)
    large = load([path], settings(cache_dir=tmp_path / "other"), tokenizer, kind="pair")
    again = load([path], settings(cache_dir=tmp_path / "other"), tokenizer, kind="pair")
    for made in (large, again):
        assert [record_of(tree) for tree in made.trees] == [record_of(tree) for tree in small.trees]
        assert made.fingerprint == small.fingerprint
        for one, other in zip(split(made.trees, 0.2, 3), split(list(small.trees), 0.2, 3), strict=True):
            assert [tree.row_id for tree in one] == [tree.row_id for tree in other]
    assert again.summary.from_cache


def test_a_chat_far_down_is_still_a_chat(tmp_path: Path, settings, chatml):
    def mixed(number: int) -> dict[str, Any]:
        turn = {"role": "user", "content": f"question {number}"}
        answers = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
        return {"prompt": [turn], **answers} if number == 130 else row(number)

    path = written(tmp_path / "a.jsonl", 140, mixed)
    made = load([path], settings(data_format="chat_pair"), chatml, kind="pair")
    assert made.summary.num_rows == made.summary.num_trees == 140
    assert made.trees[130].prompt_ids.tolist() == chatml("<|im_start|>user\nquestion 130<|im_end|>\n<|im_start|>assistant\n")["input_ids"]


def test_processes_join_in_when_much_is_left(tmp_path: Path, settings, tokenizer, monkeypatch: pytest.MonkeyPatch):
    asked = []
    monkeypatch.setattr(workers, "ENOUGH", 100)
    monkeypatch.setattr(growing, "CHUNK", 64)
    monkeypatch.setattr(workers.os, "cpu_count", lambda: 2)

    def beside(grower: Any, batches: Any, number: int) -> Any:
        asked.append(number)
        return (grower.grow(batch) for batch in batches)

    monkeypatch.setattr(workers, "in_processes", beside)
    made = load([written(tmp_path / "a.jsonl", 300)], settings(data_workers=0), tokenizer, kind="pair")
    assert asked == [2]
    assert [tree.row_id for tree in made.trees] == [f"a.jsonl:{number + 1}" for number in range(300)]


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path):
    path = Path(written(tmp_path / "a.jsonl", 5))
    (source,) = (sources.read(place) for place in sources.find([str(path)]).places)
    assert len(source.rows()) == 5
    assert len(source.rows()) == 5, "as often as it is asked"
    with path.open("a") as file:
        file.write(json.dumps(row(6)) + "\n")
    with pytest.raises(DataError, match="was changed while it was read"):
        source.rows()


# The command.


def entries(folder: Path) -> None:
    for kind, name, days in (
        ("tokens", "old.trees", 40),
        ("tokens", "new.trees", 1),
        ("tokens", "not ours.txt", 400),
        ("reference", "old.sqlite", 31),
        ("reference", "new.sqlite", 0),
    ):
        path = folder / kind / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * 10_000_000)
        os.utime(path, (path.stat().st_mtime - days * 86400,) * 2)


def test_pruning_removes_what_nobody_has_used_for_long(tmp_path: Path):
    entries(tmp_path)
    assert report(tmp_path)[1:] == [
        "  tokens: 2 files, 0.02 GB, the longest unused for 40 days",
        "  reference values: 2 files, 0.02 GB, the longest unused for 31 days",
    ]
    assert prune(tmp_path, 30) == "removed 2 files, 0.02 GB"
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["new.sqlite", "new.trees", "not ours.txt"]
    assert report(tmp_path / "nothing")[1] == "  tokens: 0 files, 0.00 GB"


def test_what_is_used_is_not_pruned(tmp_path: Path, settings, tokenizer):
    path = written(tmp_path / "a.jsonl", 5)
    load([path], settings(), tokenizer, kind="pair")
    (entry,) = kept(tmp_path / "cache", "tokens")
    os.utime(entry.path, (0, 0))
    assert load([path], settings(), tokenizer, kind="pair").summary.from_cache
    assert prune(tmp_path / "cache", 1) == "removed 0 files, 0.00 GB"


def test_the_command_says_and_prunes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    entries(tmp_path)
    assert main(["cache", "--cache-dir", str(tmp_path)]) == 0
    assert "tokens: 2 files" in capsys.readouterr().out
    assert main(["cache", "--cache-dir", str(tmp_path), "--older-than-days", "3"]) == 2
    assert "give prune too" in capsys.readouterr().err
    assert main(["cache", "--cache-dir", str(tmp_path), "--prune", "--older-than-days", "0"]) == 0
    assert "removed 4 files" in capsys.readouterr().out
