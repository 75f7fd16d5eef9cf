"""The benches of one file: that they measure what they say, at sizes that take no time."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from bench.compile import Steps, micro_batches
from bench.head import RUNS, Trial, table, try_one
from bench.packing import BAR, LENGTHS, evenness, least, ranges, trees_of
from bench.processes import WAYS
from bench.processes import table as processes_table


@pytest.mark.parametrize("max_tokens", [2048, 8192])
@pytest.mark.parametrize("num_processes", [2, 4, 8])
def test_no_process_has_much_more_than_the_mean(max_tokens: int, num_processes: int):
    """The bar, on hh-rlhf's lengths: every step of an epoch of 64 pairs, in the way in which nearly all models run."""
    own = evenness(trees_of(LENGTHS), batch_size=64, max_tokens=max_tokens, num_processes=num_processes, sharing="flat")
    assert own.worst <= BAR
    assert own.lockstep <= BAR


@pytest.mark.parametrize(("sharing", "longer"), [("fork", 1.15), ("plain", 1.10)])
@pytest.mark.parametrize("num_processes", [2, 4, 8])
def test_padded_rows_are_spread_nearly_as_a_search_would(sharing, longer: float, num_processes: int):
    """Against the least that is found for the most loaded process: 600 moves of borders for each number of batches, and one more pass."""
    own = evenness(trees_of(LENGTHS)[:640], batch_size=64, max_tokens=8192, num_processes=num_processes, sharing=sharing)
    assert 1.0 <= own.longer <= longer
    assert own.searched <= own.mean
    assert own.mean <= BAR + 0.02


@pytest.mark.parametrize("sharing", ["fork", "plain"])
def test_the_search_finds_nearly_the_best_cut_of_few_examples(sharing):
    """Against all cuts of seven examples, sorted by length, into batches, and all ways to give these to two processes."""
    trees = trees_of(LENGTHS)[:7]
    table = ranges(trees, sharing)
    best = float("inf")
    for inner in range(1 << 6):
        borders = [0, *(place + 1 for place in range(6) if inner >> place & 1), 7]
        sizes = [table[begin][end] for begin, end in pairwise(borders)]
        for taken in range(1 << len(sizes)):
            own = sum(size for place, size in enumerate(sizes) if taken >> place & 1)
            best = min(best, max(own, sum(sizes) - own))
    found, _ = least(trees, max_tokens=10_000, num_processes=2, sharing=sharing, passes=3, seed=0)
    assert best <= found <= 1.10 * best


@pytest.mark.parametrize("name", ["plain", "ours", "torch"])
def test_every_head_gives_the_same(name: str):
    if name == "torch" and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        pytest.skip("this torch has no fused head")
    trial = Trial(name, (37, 300, 16), torch.float32, "cpu")
    value = RUNS[name](trial.hidden, trial.weight, trial.target, trial.pull).item()
    base = Trial("plain", (37, 300, 16), torch.float32, "cpu")
    assert value == pytest.approx(RUNS["plain"](base.hidden, base.weight, base.target, base.pull).item(), abs=1e-4)
    assert max(trial.errors()) < 1e-5


def test_a_head_that_is_not_there_is_listed_with_the_reason():
    row = try_one("cce", (8, 32, 16), "float32", "cpu", 1)
    ours = try_one("ours", (8, 32, 16), "float32", "cpu", 1)
    assert row["failure"]
    lines = table([ours, row]).splitlines()
    assert lines[2].startswith("| 8 | 32 | 16 | ours |")
    assert row["failure"] in lines[3]


def test_compiling_starts_from_the_same_model():
    trees = micro_batches(1, 4096, 300)[0]
    assert sum(tree.num_tokens for tree in trees) <= 300
    assert all(micro_batches(20, 4096, 120))
    sides = [Steps("1m", torch.device("cpu"), None, compiled=False) for _ in range(2)]
    losses = [side.step(trees)[1] for side in sides]
    assert losses[0] == losses[1]
    assert sides[0].step(trees)[1] < losses[0]


def test_the_table_of_processes_takes_medians_and_the_worst_loss():
    def run(way: str, speed: float, loss: float) -> dict:
        return {"way": way, "pairs_per_second": speed, "losses": [0.5, loss], "memory_gb": [1.0] * WAYS[way][0], "threads": 1}

    runs = [run("one", 4, 0.25), run("one", 2, 0.25), run("one", 3, 0.25), run("two, ddp", 6, 0.25), run("two, fsdp", 1.5, 0.125)]
    spec = {"shape": "1m", "precision": "float32", "batch_size": 4, "max_length": 64, "steps": 2}
    own = {"date": "a day", "processor": "one", "cores": 2, "torch": "2", "transformers": "5"}
    lines = processes_table({"runs": runs, "spec": spec, "machine": own, "command": "x"}).splitlines()
    assert "| one | 1 × 1 | 3 (4, 2, 3) | 1.00x | 1.00 | 1.00 | 0.0e+00 |" in lines
    assert "| two, ddp | 2 × 1 | 6 (6) | 2.00x | 1.00, 1.00 | 2.00 | 0.0e+00 |" in lines
    assert "| two, fsdp | 2 × 1 | 1.5 (1.5) | 0.50x | 1.00, 1.00 | 2.00 | 1.2e-01 |" in lines


def test_lengths_that_do_not_fit_are_not_drawn(tmp_path: Path):
    from bench.versus.contestants import UsageError
    from bench.versus.workloads import rows_for, tokenizer_texts, train_tokenizer

    file = tmp_path / "lengths.json"
    file.write_text(json.dumps({"what": "", "lengths": [[10, 5, 5], [10, 1, 5], [100, 5, 5], [10, 5, 60]]}))
    tokenizer = train_tokenizer(tokenizer_texts("lengths", None), vocabulary=4096)
    rows, _ = rows_for("lengths", 6, tokenizer, seed=0, data=None, lengths=file, sizes=(None, None), max_length=64)
    assert {len(tokenizer(row["prompt"])["input_ids"]) for row in rows} == {10}
    assert {len(tokenizer(row[name])["input_ids"]) for row in rows for name in ("chosen", "rejected")} == {4}
    with pytest.raises(UsageError, match="none of the lengths"):
        rows_for("lengths", 6, tokenizer, seed=0, data=None, lengths=file, sizes=(None, None), max_length=9)
