"""Packing worked by hand: which token stands where, what predicts it, and which completion it belongs to."""

import math

import numpy as np
import pytest
import torch

from prefopt.engine.batch import Sharing, TreeBatch, cost, pack
from prefopt.trees import Completion, PromptTree, token_ids

BOTH: tuple[Sharing, Sharing] = ("flat", "plain")


def mask(*bits: int) -> np.ndarray:
    return np.array(bits, dtype=np.bool_)


def worked() -> list[PromptTree]:
    """A pair, where the prompt's third token and not all of the chosen are scored; then a single completion of one token."""
    return [
        PromptTree(
            token_ids([11, 12, 13]),
            (Completion(token_ids([21, 22, 23, 24]), scored=mask(1, 0, 0, 1)), Completion(token_ids([31, 32]))),
            prompt_scored=mask(0, 0, 1),
            weight=0.5,
        ),
        PromptTree(token_ids([41]), (Completion(token_ids([51])),)),
    ]


def test_flat_row_by_hand():
    batch = pack(worked(), sharing="flat")
    #                                       prompt      chosen          rejected prompt completion
    #                                       0   1   2   3   4   5   6   7   8    9   10
    assert batch.input_ids.tolist() == [[11, 12, 13, 21, 22, 23, 24, 31, 32, 41, 51]]
    assert batch.layout is not None
    assert batch.layout.position_ids_T.tolist() == [0, 1, 2, 3, 4, 5, 6, 3, 4, 0, 1]
    assert [(span.start, span.prompt, span.completions, span.end) for span in batch.layout.spans] == [(0, 3, (4, 2), 9), (9, 1, (1,), 11)]
    assert [list(span.branches()) for span in batch.layout.spans] == [[(3, 4), (7, 2)], [(10, 1)]]
    assert (batch.layout.num_tokens, batch.layout.longest_branch) == (11, 7)
    assert batch.attention_mask is None
    # Completions: 21 after 13, 24 after 23; 31 after the prompt's end at 2, 32 after 31; 51 after 41. Then the prompt: 13 after 12.
    assert batch.predict_from_N.tolist() == [2, 5, 2, 7, 9, 1]
    assert batch.target_N.tolist() == [21, 24, 31, 32, 51, 13]
    assert batch.lengths_C.tolist() == [2, 2, 1]
    assert batch.prompt_lengths_B.tolist() == [1, 0]
    assert batch.num_completion_tokens == 5
    assert batch.last_C.tolist() == [6, 8, 10]
    assert batch.weight_B.tolist() == [0.5, 1.0]
    assert batch.num_tokens == 11


def test_plain_rows_by_hand():
    batch = pack(worked(), sharing="plain")
    assert batch.input_ids.tolist() == [
        [11, 12, 13, 21, 22, 23, 24],
        [11, 12, 13, 31, 32, 0, 0],
        [41, 51, 0, 0, 0, 0, 0],
    ]
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[1] * 7, [1] * 5 + [0] * 2, [1] * 2 + [0] * 5]
    assert batch.layout is None
    # Positions of the flattened [3, 7]; the prompt's own token is scored once, in its first row.
    assert batch.predict_from_N.tolist() == [2, 5, 9, 10, 14, 1]
    assert batch.target_N.tolist() == [21, 24, 31, 32, 51, 13]
    assert batch.lengths_C.tolist() == [2, 2, 1]
    assert batch.prompt_lengths_B.tolist() == [1, 0]
    assert batch.num_completion_tokens == 5
    assert batch.last_C.tolist() == [6, 11, 15]
    assert batch.weight_B.tolist() == [0.5, 1.0]
    assert batch.num_tokens == 21


@pytest.mark.parametrize(("multiple", "width"), [(1, 7), (4, 8), (7, 7), (16, 16)])
def test_plain_rows_grow_to_a_multiple(multiple: int, width: int):
    batch = pack(worked(), sharing="plain", pad_to_multiple=multiple)
    assert batch.input_ids.shape == (3, width)
    assert batch.predict_from_N.tolist() == [2, 5, width + 2, width + 3, 2 * width, 1]
    assert batch.last_C.tolist() == [6, width + 4, 2 * width + 1]


@pytest.mark.parametrize("sharing", BOTH)
def test_what_predicts_a_token_stands_just_before_it(sharing: Sharing):
    rng = np.random.default_rng(0)
    trees = [
        PromptTree(
            token_ids(rng.integers(1, 99, 1 + rng.integers(5)).tolist()),
            tuple(Completion(token_ids(rng.integers(1, 99, 1 + rng.integers(6)).tolist())) for _ in range(1 + rng.integers(3))),
        )
        for _ in range(20)
    ]
    batch = pack(trees, sharing=sharing)
    ids = batch.input_ids.flatten().tolist()
    rows = [
        (len(tree.prompt_ids), [*tree.prompt_ids.tolist(), *completion.ids.tolist()]) for tree in trees for completion in tree.completions
    ]
    before = [row[prompt - 1 : -1] for prompt, row in rows]
    assert [ids[position] for position in batch.predict_from_N.tolist()] == [token for row in before for token in row]
    assert batch.target_N.tolist() == [token for completion in batch.completions for token in completion.ids.tolist()]
    assert [ids[position] for position in batch.last_C.tolist()] == [completion.ids[-1] for completion in batch.completions]


@pytest.mark.parametrize("sharing", BOTH)
def test_a_completion_of_which_nothing_is_scored(sharing: Sharing):
    tree = PromptTree(token_ids([1, 2]), (Completion(token_ids([3, 4]), scored=mask(0, 0)), Completion(token_ids([5]))))
    batch = pack([tree], sharing=sharing)
    assert batch.lengths_C.tolist() == [0, 1]
    assert batch.target_N.tolist() == [5]


@pytest.mark.parametrize("sharing", BOTH)
def test_nothing_scored_at_all(sharing: Sharing):
    batch = pack([PromptTree(token_ids([1]), (Completion(token_ids([3]), scored=mask(0)),))], sharing=sharing)
    assert batch.target_N.tolist() == batch.predict_from_N.tolist() == []
    assert batch.target_N.dtype == batch.predict_from_N.dtype == torch.int64
    assert batch.num_completion_tokens == 0


@pytest.mark.parametrize("sharing", BOTH)
def test_dtypes(sharing: Sharing):
    batch = pack(worked(), sharing=sharing)
    integers = (batch.input_ids, batch.predict_from_N, batch.target_N, batch.last_C, batch.lengths_C, batch.prompt_lengths_B)
    assert {tensor.dtype for tensor in integers} == {torch.int64}
    assert batch.weight_B.dtype == torch.float32


def test_packing_leaves_the_trees_alone():
    trees = worked()
    before = [(tree.prompt_ids.tolist(), [completion.ids.tolist() for completion in tree.completions]) for tree in trees]
    batch = pack(trees, sharing="flat")
    batch.input_ids.zero_()
    batch.target_N.zero_()
    assert [(tree.prompt_ids.tolist(), [completion.ids.tolist() for completion in tree.completions]) for tree in trees] == before
    assert batch.trees == tuple(trees)


def test_cost_counts_a_shared_prompt_once():
    tree = worked()[0]
    assert cost(tree, "flat") == 3 + 4 + 2 == pack([tree], sharing="flat").num_tokens
    assert cost(tree, "plain") == (3 + 4) + (3 + 2)


def pairs(num_pairs: int) -> TreeBatch:
    tree = PromptTree(token_ids([1]), (Completion(token_ids([2])), Completion(token_ids([3]))))
    return pack([tree] * num_pairs, sharing="flat")


def uneven() -> TreeBatch:
    """Trees of 1, 3 and 2 completions with everything that a completion can carry."""
    up = Completion(token_ids([1]), label=True, rank=2, reward=0.25)
    down = Completion(token_ids([2]), label=False, rank=0, reward=-1.5)
    bare = Completion(token_ids([3]))
    return pack([PromptTree(token_ids([9]), branches) for branches in [(bare,), (up, down, bare), (bare, bare)]], sharing="flat")


def test_by_tree_fills_the_table_row_by_row():
    values = torch.arange(1.0, 7.0)
    table, exists = uneven().by_tree(values)
    assert table.tolist() == [[1, 0, 0], [2, 3, 4], [5, 6, 0]]
    assert exists.tolist() == [[True, False, False], [True, True, True], [True, True, False]]
    table, _ = uneven().by_tree(values, fill=-math.inf)
    assert table[0].tolist() == [1, -math.inf, -math.inf]


def test_by_tree_carries_gradients_to_values_that_exist():
    values = torch.arange(1.0, 7.0, requires_grad=True)
    table, _ = uneven().by_tree(values, fill=-5.0)
    (gradient,) = torch.autograd.grad((table * torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])).sum(), values)
    assert gradient.tolist() == [1, 4, 5, 6, 7, 8]


def test_labels_ranks_and_rewards_count_as_completions_do():
    batch = uneven()
    assert batch.labels().tolist() == [False, True, False, False, False, False]
    # Where no rank is given, the order of the data.
    assert batch.ranks().tolist() == [0, 2, 0, 2, 0, 1]
    rewards = batch.rewards()
    assert rewards.dtype == torch.float32
    assert rewards[1:3].tolist() == [0.25, -1.5]
    assert torch.isnan(rewards[[0, 3, 4, 5]]).all()
