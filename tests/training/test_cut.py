"""The cut of a step into micro-batches."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefopt.engine.batch import pack
from prefopt.errors import RunError
from prefopt.training.cut import cut
from prefopt.trees import Completion, PromptTree, token_ids


def tree(prompt: int, *completions: int, row: str = "") -> PromptTree:
    return PromptTree(token_ids(np.ones(prompt)), tuple(Completion(token_ids(np.ones(length))) for length in completions), row_id=row)


shapes = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=40)


@given(shapes, st.sampled_from(["flat", "plain"]), st.integers(1, 4), st.integers(100, 300))
def test_every_example_once_within_the_budget_and_evenly(lengths, sharing, num_processes, max_tokens):
    trees = [tree(*shape, row=str(index)) for index, shape in enumerate(lengths)]
    plan = cut(trees, max_tokens=max_tokens, sharing=sharing, num_processes=num_processes)
    assert len(plan) == num_processes
    assert len({len(part) for part in plan}) == 1
    counted = [one.row_id for part in plan for batch in part if batch.counts for one in batch.trees]
    assert sorted(counted, key=int) == [one.row_id for one in trees]
    for part in plan:
        for batch in part:
            assert pack(batch.trees, sharing=sharing).num_tokens <= max_tokens
            assert batch.counts or all(one.weight == 0 for one in batch.trees)


def test_rows_are_filled_evenly():
    trees = [tree(10, 10, 10) for _ in range(16)]  # 480 tokens, at least 5 rows of 100
    loads = [pack(batch.trees, sharing="flat").num_tokens for batch in cut(trees, max_tokens=100, sharing="flat")[0]]
    assert sum(loads) == 480
    assert max(loads) <= 90


def test_a_whole_dataset_is_cut_into_full_rows():
    rng = np.random.default_rng(0)
    trees = [tree(*lengths) for lengths in rng.integers(1, 200, (3000, 3))]
    loads = [pack(batch.trees, sharing="flat").num_tokens for batch in cut(trees, max_tokens=1024, sharing="flat")[0]]
    assert sum(loads) / len(loads) > 0.9 * 1024
    assert max(loads) <= 1024


def test_plain_batches_hold_similar_lengths():
    trees = [tree(5, length, length) for length in (50, 3, 49, 4, 48, 5)]
    batches = cut(trees, max_tokens=400, sharing="plain")[0]
    assert [sorted(len(one.completions[0].ids) for one in batch.trees) for batch in batches] == [[48, 49, 50], [3, 4, 5]]


def test_an_example_too_large_is_named():
    with pytest.raises(RunError, match=r"file:7 takes 120 tokens.*max_tokens = 100.*Raise max_tokens to 120"):
        cut([tree(60, 30, 30, row="file:7")], max_tokens=100, sharing="flat")


@pytest.mark.parametrize("sharing", ["fork", "plain"])
def test_padded_batches_are_shared_out_evenly(sharing):
    """Eight examples as long as can be beside 56 short ones fit into two batches; four processes get one each of like size."""
    trees = [tree(20, length, length) for length in [60] * 8 + [20] * 56]
    plan = cut(trees, max_tokens=8192, sharing=sharing, num_processes=4)
    loads = [sum(pack(batch.trees, sharing=sharing).num_tokens for batch in part) for part in plan]
    assert all(batch.counts for part in plan for batch in part)
    assert max(loads) <= 1.1 * sum(loads) / len(loads)


def test_one_process_fills_padded_batches_one_after_the_other():
    trees = [tree(5, length, length) for length in range(1, 60)]
    alone = cut(trees, max_tokens=700, sharing="plain")[0]
    # 5 × 2 × 64 = 640 positions, 5 × 2 × 59, 6 × 2 × 54, 7 × 2 × 48, 8 × 2 × 41, 10 × 2 × 33, 15 × 2 × 23, 3 × 2 × 8
    assert sorted(pack(batch.trees, sharing="plain").num_tokens for batch in alone) == [48, 590, 640, 648, 656, 660, 672, 690]
