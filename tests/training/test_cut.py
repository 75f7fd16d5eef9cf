"""The cut of a step into micro-batches."""

import math
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefopt.engine.batch import Sharing, pack
from prefopt.engine.extent import num_positions
from prefopt.errors import RunError
from prefopt.training.cut import PASS, cut
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


@pytest.mark.parametrize("sharing", ["plain", "fork"])
def test_no_other_cut_between_neighbours_by_length_costs_less(sharing: Sharing):
    lengths = [(30, 5), (90, 40), (200, 80), (31, 6), (420, 10), (60, 300), (95, 41), (210, 90)]
    trees = [tree(prompt, length, length + 1) for prompt, length in lengths]
    by_length = sorted(trees, key=lambda tree: -tree.longest)

    def costs(borders: tuple[int, ...]) -> float:
        edges = (0, *borders, len(trees))
        sizes = [num_positions(by_length[start:end], sharing) for start, end in pairwise(edges)]
        return sum(sizes) + PASS * len(sizes) if max(sizes) <= 1500 else math.inf

    every = [borders for count in range(len(trees)) for borders in combinations(range(1, len(trees)), count)]
    found = cut(trees, max_tokens=1500, sharing=sharing)[0]
    assert sum(num_positions(batch.trees, sharing) + PASS for batch in found) == min(map(costs, every))


def test_examples_of_one_length_stay_together_as_long_as_they_fit():
    trees = [tree(10, 20, 20) for _ in range(24)]
    assert [len(batch.trees) for batch in cut(trees, max_tokens=10_000, sharing="plain")[0]] == [24]
    assert sorted(len(batch.trees) for batch in cut(trees, max_tokens=600, sharing="plain")[0]) == [4, 10, 10]
