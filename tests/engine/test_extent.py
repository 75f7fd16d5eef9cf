"""How much a batch computes is counted before it is packed, and consecutive trees stand together as far as that allows."""

from itertools import pairwise

import pytest

from prefopt.engine.batch import Sharing, pack
from prefopt.engine.extent import batches, num_positions
from prefopt.trees import Completion, PromptTree, token_ids

TREES = [
    PromptTree(token_ids(range(size)), (Completion(token_ids([1])), Completion(token_ids(range(1 + size % 7)))))
    for size in (3, 9, 4, 40, 2)
]
WAYS: tuple[Sharing, ...] = ("flat", "fork", "plain")


@pytest.mark.parametrize("sharing", WAYS)
def test_what_is_counted_is_what_is_packed(sharing: Sharing):
    for number in range(1, len(TREES) + 1):
        assert num_positions(TREES[:number], sharing) == pack(TREES[:number], sharing=sharing).num_tokens


@pytest.mark.parametrize("sharing", WAYS)
@pytest.mark.parametrize("most", [1, 50, 90, 10_000])
def test_batches_hold_as_much_as_they_may_and_lose_nothing(sharing: Sharing, most: int):
    found = list(batches(TREES, sharing=sharing, max_tokens=most))
    assert [tree for batch in found for tree in batch] == TREES
    assert all(len(batch) == 1 or num_positions(batch, sharing) <= most for batch in found)
    for batch, (first, *_) in pairwise(found):
        assert num_positions([*batch, first], sharing) > most


def test_forked_batches_are_counted_by_prompts_and_completions():
    trees = [PromptTree(token_ids(range(100)), tuple(Completion(token_ids([5])) for _ in range(8))) for _ in range(3)]
    assert num_positions(trees, "fork") == 3 * 100 + 24
    assert [len(batch) for batch in batches(trees, sharing="fork", max_tokens=324)] == [3]
    assert [len(batch) for batch in batches(trees, sharing="plain", max_tokens=324)] == [1, 1, 1]


def test_nothing_makes_no_batch():
    assert list(batches([], sharing="flat", max_tokens=10)) == []
