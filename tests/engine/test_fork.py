"""Prompts once and completions from copies of their cache: where everything stands, and that it is the same function."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.models.architectures import one_thread, tiny_model
from tests.training.runs import losses, pair_rows, run, write_rows

from prefopt.data.store import Sizes
from prefopt.engine.batch import TreeBatch, pack
from prefopt.engine.extent import num_positions
from prefopt.engine.layout import ForkLayout
from prefopt.models.policy import EnginePath, Policy
from prefopt.models.proof import prove
from prefopt.training.cut import cut, needed_positions
from prefopt.trees import Completion, PromptTree, token_ids


def tree(prompt: list[int], *completions: list[int]) -> PromptTree:
    return PromptTree(token_ids(prompt), tuple(Completion(token_ids(ids)) for ids in completions))


TREES = [tree([1, 2, 3], [4, 5], [6]), tree([7], [8, 9, 10], [11], [12, 13])]


def layout_of(batch: TreeBatch) -> ForkLayout:
    assert isinstance(batch.layout, ForkLayout)
    return batch.layout


def test_where_everything_stands():
    batch = pack(TREES, sharing="fork")
    layout = layout_of(batch)
    assert batch.input_ids.tolist() == [[1, 2, 3], [0, 0, 7]]
    assert layout.prompt_mask_BP.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert layout.completion_ids_CL.tolist() == [[4, 5, 0], [6, 0, 0], [8, 9, 10], [11, 0, 0], [12, 13, 0]]
    assert layout.completion_mask_CL.tolist() == [[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 0, 0], [1, 1, 0]]
    assert layout.prompt_of_C.tolist() == [0, 0, 1, 1, 1]
    assert layout.prompt_positions_BP.tolist() == [[0, 1, 2], [0, 0, 0]]
    assert layout.completion_positions_CL.tolist() == [[3, 4, 5], [3, 4, 5], [1, 2, 3], [1, 2, 3], [1, 2, 3]]
    assert layout.seen_CK[3].tolist() == [0, 0, 1, 1, 0, 0]
    assert batch.sharing == "fork"
    assert batch.num_tokens == 2 * 3 + 5 * 3
    flattened = torch.cat([batch.input_ids.flatten(), layout.completion_ids_CL.flatten()])
    assert flattened[batch.last_C].tolist() == [5, 6, 10, 11, 13]
    assert flattened[batch.predict_from_N].tolist() == [3, 4, 3, 7, 8, 9, 7, 7, 12]
    assert batch.target_N.tolist() == [4, 5, 6, 8, 9, 10, 11, 12, 13]


def test_scored_prompts_are_predicted_from_their_own_row():
    scored = PromptTree(token_ids([7, 8, 9]), (Completion(token_ids([1])),), prompt_scored=torch.tensor([False, True, True]).numpy())
    batch = pack([tree([1, 2, 3, 4, 5], [6]), scored], sharing="fork")
    assert batch.prompt_lengths_B.tolist() == [0, 2]
    assert batch.input_ids.flatten()[batch.predict_from_N[2:]].tolist() == [7, 8]
    assert batch.target_N[2:].tolist() == [8, 9]


@pytest.mark.parametrize("name", ["qwen3_5_text", "qwen3_next", "lfm2", "mamba2", "bamba", "bloom"])
@one_thread()
def test_long_rows_are_the_same_function(name: str):
    """Beyond the 64 tokens at a time in which linear attention is computed, in prompts and in completions, and padded by more than that."""
    model = tiny_model(name)
    generator = torch.Generator().manual_seed(0)

    def draw(length: int) -> list[int]:
        return torch.randint(101, (length,), generator=generator).tolist()

    trees = [tree(draw(130), draw(70), draw(3)), tree(draw(5), draw(90), draw(66)), tree(draw(64), draw(64), draw(1))]
    values = {}
    for sharing in ("plain", "fork", "flat") if name != "bloom" else ("plain", "fork"):
        policy = Policy(model, EnginePath(sharing, prove(model, max_length=64).path.chunked_head))
        logps = policy(pack(trees, sharing=sharing))
        gradients = torch.autograd.grad((logps.values_N * torch.linspace(-1, 1, len(logps.values_N))).sum(), list(model.parameters()))
        values[sharing] = (logps.values_N.detach(), torch.cat([gradient.flatten() for gradient in gradients]))
    for sharing in values.keys() - {"plain"}:
        for shared, plain in zip(values[sharing], values["plain"], strict=True):
            assert float((shared - plain).norm() / plain.norm()) < 2e-5


def test_a_batch_holds_what_padding_takes():
    for sharing in ("fork", "plain"):
        (plan,) = cut(TREES * 4, max_tokens=40, sharing=sharing)
        sizes = [pack(micro_batch.trees, sharing=sharing).num_tokens for micro_batch in plan]
        assert max(sizes) <= 40
        assert len(sizes) > 1
        assert needed_positions(Sizes.of([TREES[1]]), sharing).tolist() == [pack([TREES[1]], sharing=sharing).num_tokens]
        assert num_positions([TREES[1]], sharing) == pack([TREES[1]], sharing=sharing).num_tokens


def test_a_run_gives_the_same_losses(model_folder: Callable[..., Path], tmp_path: Path):
    """Of a plain transformer, which would be shared in one row: all three ways are the same arithmetic."""
    pairs = write_rows(tmp_path / "pairs.jsonl", pair_rows())
    for sharing in ("flat", "fork", "plain"):
        run("dpo", model_folder(), pairs, tmp_path / sharing, sharing=sharing, learning_rate=1e-3)
    for sharing in ("fork", "plain"):
        assert losses(tmp_path / sharing) == pytest.approx(losses(tmp_path / "flat"), abs=2e-5)
