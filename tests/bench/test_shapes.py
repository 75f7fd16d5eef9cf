"""Operations are counted as torch counts them, and sizes are those that the names promise."""

import pytest
import torch
from bench.versus.shapes import SHAPES, MatrixRate, Shape
from torch.utils.flop_counter import FlopCounterMode

SMALL = Shape(hidden=32, layers=3, heads=4, kv_heads=2, mlp=48, vocabulary=64)


def model(shape: Shape) -> torch.nn.Module:
    from transformers import Qwen2ForCausalLM

    return Qwen2ForCausalLM._from_config(shape.config(), attn_implementation="eager")


def test_products_are_counted_as_torch_counts_them():
    """One completion behind a prompt of one token: torch counts all pairs of positions, the formula those that are seen."""
    length = 10
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(SMALL)(input_ids=torch.arange(length)[None])
    all_pairs, seen = length**2, length * (length + 1) / 2
    attention = 4 * SMALL.hidden * SMALL.layers
    head = 2 * SMALL.vocabulary * SMALL.hidden  # of the prompt's one position, which torch computes too
    rotary = counter.get_flop_counts()["Global"][torch.ops.aten.bmm] - attention * all_pairs  # positions times frequencies
    assert 0 <= rotary < 0.02 * counter.get_total_flops()
    assert SMALL.forward_flops((1, [length - 1])) == counter.get_total_flops() - rotary - head - attention * (all_pairs - seen)


def test_a_prompt_is_counted_once():
    """Two completions cost less than twice one, by what the prompt costs; with no prompt to share nothing is saved but a token."""
    one, two = SMALL.forward_flops((100, [10])), SMALL.forward_flops((100, [10, 10]))
    completion = 2 * SMALL.layers * SMALL.layer_weights * 10 + 2 * SMALL.vocabulary * SMALL.hidden * 10
    completion += 4 * SMALL.hidden * SMALL.layers * (100 * 10 + 55)
    assert two - one == completion


def test_training_takes_three_forward_passes_and_two_under_an_adapter():
    lengths = (5, (3, 4))
    assert SMALL.train_flops(lengths, adapter=False) == 3 * SMALL.forward_flops(lengths)
    assert SMALL.train_flops(lengths, adapter=True) == 2 * SMALL.forward_flops(lengths)


@pytest.mark.parametrize(
    ("name", "size"), [("10m", 10.5e6), ("32m", 32e6), ("135m", 135e6), ("0.5b", 0.49e9), ("1.5b", 1.54e9), ("7b", 6.7e9), ("8b", 8e9)]
)
def test_shapes_have_the_size_of_their_name(name: str, size: float):
    shape = SHAPES[name]
    embeddings = shape.vocabulary * shape.hidden * (1 if shape.tied else 2)
    assert shape.layers * shape.layer_weights + embeddings == pytest.approx(size, rel=0.02)


def test_the_32m_shape_is_that_of_the_bars():
    assert SHAPES["32m"] == Shape(hidden=512, layers=8, heads=8, kv_heads=4, mlp=1408, vocabulary=16384)


def test_the_probe_counts_the_products_that_it_runs():
    probe = MatrixRate(SMALL, positions=7, scored=6, dtype=torch.float32, device=torch.device("cpu"))
    with FlopCounterMode(display=False) as counter:
        probe._once()
    assert counter.get_total_flops() == probe.flops == 2 * SMALL.layer_weights * 7 + 2 * SMALL.vocabulary * SMALL.hidden * 2
