"""Layers that carry a state, inside a flat row: where their rows stand, what runs together, and that it is the same function."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.models.architectures import one_thread, tiny_model
from torch import Tensor

from prefopt.engine.batch import pack
from prefopt.engine.head import HeadShape
from prefopt.engine.layout import FlatLayout
from prefopt.engine.states import CALL, PIECE, STEP, Rows, alike, arranged, forked
from prefopt.models.load import checkpoint_activations
from prefopt.models.policy import EnginePath, Policy
from prefopt.trees import Completion, PromptTree, token_ids

CPU = torch.device("cpu")


def tree(prompt: list[int], *completions: list[int]) -> PromptTree:
    return PromptTree(token_ids(prompt), tuple(Completion(token_ids(ids)) for ids in completions))


def layout_of(*trees: PromptTree) -> FlatLayout:
    layout = pack(trees, sharing="flat").layout
    assert isinstance(layout, FlatLayout)
    return layout


def test_where_everything_stands():
    """[1 2 3 | 4 5 | 6] and [7 | 8 9 10 | 11]: places 0 to 5 and 6 to 10."""
    (forks,) = arranged(layout_of(tree([1, 2, 3], [4, 5], [6]), tree([7], [8, 9, 10], [11]))).forks
    assert forks.prompts.index_RL.tolist() == [[0, 1, 2], [0, 0, 6]]
    assert forks.prompts.mask_RL.tolist() == [[1, 1, 1], [0, 0, 1]]
    ((rows, prompt_of_R),) = forks.completions
    assert rows.index_RL.tolist() == [[7, 8, 9], [3, 4, 0], [5, 0, 0], [10, 0, 0]]
    assert rows.mask_RL.tolist() == [[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 0, 0]]
    assert prompt_of_R.tolist() == [1, 0, 0, 1]


@given(st.lists(st.tuples(st.integers(1, 400), st.integers(1, 300), st.integers(1, 20)), min_size=1, max_size=12))
def test_every_token_comes_back_to_its_place(lengths: list[tuple[int, int, int]]):
    layout = layout_of(*(tree([1] * prompt, [2] * first, [3] * second) for prompt, first, second in lengths))
    found = arranged(layout)
    rows = [part for forks in found.forks for part in (forks.prompts, *(own for own, _ in forks.completions))]
    assert torch.equal(torch.cat([own.index_RL.flatten() for own in rows])[found.back_T], torch.arange(layout.num_tokens))
    assert sum(int(own.mask_RL.sum()) for own in rows) == layout.num_tokens
    assert arranged(layout) is found


def test_a_completion_continues_its_own_prompt_whatever_the_groups():
    layout = layout_of(tree([1] * 300, [2] * 9, [2] * 200), *(tree([1] * 20, [2] * 8, [2] * 10) for _ in range(9)))
    long, short = arranged(layout).forks
    assert long.prompts.index_RL.shape == (1, 300)
    assert [(rows.index_RL.shape, places.tolist()) for rows, places in long.completions] == [((2, 200), [0, 0])]
    assert short.prompts.index_RL.shape == (9, 20)
    ((rows, prompt_of_R),) = short.completions
    firsts = [layout.spans[1 + place].start for place in prompt_of_R.tolist()]
    assert [int(index) - first in (20, 28) for index, first in zip(rows.index_RL[:, 0], firsts, strict=True)] == [True] * 18


def test_lengths_go_apart_where_padding_costs_more_than_a_call():
    assert alike("ab", [CALL - STEP, CALL]) == [["b", "a"]]
    assert alike("abc", [STEP, STEP, CALL]) == [["c"], ["a", "b"]]
    assert alike("ab", [1, STEP]) == [["b", "a"]]  # one length, to a step


@pytest.mark.parametrize(("width", "chunk"), [(40, 40), (64, 64), (65, 33), (155, 52), (512, 64)])
def test_rows_are_cut_into_equal_chunks(width: int, chunk: int):
    assert Rows.of([(0, width), (width, 3)], on_the_left=False, device=CPU).chunk_size == chunk


@pytest.mark.parametrize(("width", "widths"), [(PIECE, [PIECE]), (PIECE + 1, [241, 240]), (3 * PIECE, [PIECE] * 3)])
def test_long_rows_go_in_pieces(width: int, widths: list[int]):
    rows = Rows.of([(0, width), (width, 3)], on_the_left=True, device=CPU)
    assert [piece.index_RL.shape[1] for piece in rows.pieces()] == widths
    assert torch.equal(torch.cat([piece.index_RL for piece in rows.pieces()], 1), rows.index_RL)


def draw(length: int, seed: int) -> list[int]:
    return torch.randint(3, 101, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


# Two groups of prompts, and of completions; a prompt and completions of a single token; more than one chunk,
# and than one piece.
FOREST = [
    tree(draw(500, 0), draw(70, 1), draw(1, 2)),
    tree(draw(1, 3), draw(90, 4), draw(300, 5)),
    tree(draw(9, 6), draw(1, 7), draw(1, 8)),
]


def gradients(policy: Policy) -> tuple[Tensor, Tensor]:
    values_N = policy(pack(FOREST, sharing=policy.path.sharing)).values_N
    (values_N * torch.linspace(-1, 1, len(values_N))).sum().backward()
    return values_N.detach(), torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["qwen3_5_text", "lfm2", "bamba"])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
@one_thread()
def test_it_is_the_plain_function(name: str, recompute: bool):
    plain = gradients(Policy(tiny_model(name), EnginePath("plain", HeadShape())))
    model = tiny_model(name)
    if recompute:
        checkpoint_activations(model)
    assert len(arranged(layout_of(*FOREST)).forks) == 2
    for own, expected in zip(gradients(Policy(model.train(), EnginePath("flat", HeadShape()))), plain, strict=True):
        assert float((own - expected).norm() / expected.norm()) < 2e-5


def test_a_copy_of_a_model_runs_on_its_own_weights():
    """As a frozen reference is made."""
    policy = Policy(tiny_model("qwen3_5_text"), EnginePath("flat", HeadShape()))
    batch = pack(FOREST, sharing="flat")
    with torch.no_grad():
        before = policy(batch).values_N
        twin = copy.deepcopy(policy)
        for parameter in policy.model.model.layers[0].linear_attn.parameters():
            parameter.zero_()
        assert torch.equal(twin(batch).values_N, before)
        assert not torch.allclose(policy(batch).values_N, before)


def test_a_forked_cache_leaves_the_prompts_own_as_it_was():
    from transformers import DynamicCache

    model = tiny_model("qwen3_5_text")
    layer = DynamicCache(config=model.config).layers[0]
    layer.update_conv_state(torch.ones(2, 3, 4))
    layer.update_recurrent_state(torch.arange(2.0)[:, None])
    own = forked(layer, torch.tensor([1, 0, 1]))
    continued = own.recurrent_states[0]
    own.update_recurrent_state(torch.full((3, 1), 9.0))
    assert continued.tolist() == [[1.0], [0.0], [1.0]]  # where the backward pass reads it
    assert own.recurrent_states[0].tolist() == [[9.0]] * 3
    assert layer.recurrent_states[0].tolist() == [[0.0], [1.0]]
