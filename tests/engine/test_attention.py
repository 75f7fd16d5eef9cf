"""Tree attention, in each of its implementations, against attention written from the definition.

The definition: token q sees token k where both are of one tree, k is of the prompt or of q's own completion, and k's
position is not after q's nor a window or more before it. Everything else (stretches, gathered keys, block masks) is a
way to compute that.
"""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import varlen
from transformers import AttentionInterface

from prefopt.engine import attention
from prefopt.engine.attention import TREE_ATTENTION, _flex, _varlen, tree_attention
from prefopt.engine.layout import FlatLayout, TreeSpan

Shape = tuple[int, tuple[int, ...]]
"""A tree: tokens of its prompt, tokens of its completions."""

FORESTS: dict[str, list[Shape]] = {
    "a pair": [(5, (4, 3))],
    "one completion": [(3, (6,))],
    "shortest": [(1, (1, 1))],
    "several": [(5, (4, 3)), (1, (2,)), (7, (1, 6, 9)), (2, (8, 8))],
}
WINDOWS = [None, 1, 2, 3, 5, 7, 8, 15, 16, 17, 100]
"""`several` has prompts of up to 7 and branches of up to 16 tokens: some windows are smaller, some equal, some larger."""

SCALE = 0.3


def layout_of(forest: list[Shape]) -> FlatLayout:
    spans: list[TreeSpan] = []
    positions: list[int] = []
    for prompt, completions in forest:
        spans.append(TreeSpan(len(positions), prompt, completions))
        positions += [*range(prompt), *(prompt + index for length in completions for index in range(length))]
    return FlatLayout(tuple(spans), torch.tensor(positions))


def who_sees_whom(forest: list[Shape], window: int | None) -> Tensor:
    """[T, T] bool, query by key, token by token from the definition."""
    tokens = [
        (tree, branch, position)
        for tree, (prompt, completions) in enumerate(forest)
        for branch, first, length in [(0, 0, prompt), *((index + 1, prompt, length) for index, length in enumerate(completions))]
        for position in range(first, first + length)
    ]
    return torch.tensor(
        [
            [
                query_tree == key_tree and key_branch in (0, query_branch) and 0 <= query_at - key_at < (window or 10**6)
                for key_tree, key_branch, key_at in tokens
            ]
            for query_tree, query_branch, query_at in tokens
        ]
    )


def dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sees_TT: Tensor,
    *,
    scale: float = SCALE,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """[H, T, E], [G, T, E], [G, T, F] -> [T, H, F], one head after the other: Σ exp(s)·v / (Σ exp(s) + exp(sink))."""
    heads: list[Tensor] = []
    for head in range(query.shape[0]):
        group = head * key.shape[0] // query.shape[0]
        scores_TT = query[head] @ key[group].T * scale
        if softcap is not None:
            scores_TT = softcap * torch.tanh(scores_TT / softcap)
        weights_TT = scores_TT.exp() * sees_TT
        total_T = weights_TT.sum(1) + (0 if sinks is None else sinks[head].exp())
        heads.append(weights_TT @ value[group] / total_T[:, None])
    return torch.stack(heads, dim=1)


def draw(forest: list[Shape], *, heads: int = 4, groups: int = 2, size: int = 6, value_size: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    length = layout_of(forest).num_tokens

    def one(count: int, width: int) -> Tensor:
        return torch.randn(count, length, width, dtype=torch.float64, generator=generator).requires_grad_()

    return one(heads, size), one(groups, size), one(groups, value_size)


def as_model_calls(query: Tensor, key: Tensor, value: Tensor, layout: FlatLayout, **options: object) -> Tensor:
    """Through the registered function, with the keywords that transformers' layers pass: [T, H, F]."""
    options = {"scaling": SCALE, "dropout": 0.0, "position_ids": layout.position_ids_T[None]} | options
    out, weights = tree_attention(nn.Identity(), query[None], key[None], value[None], None, tree_layout=layout, **options)  # type: ignore[arg-type]
    assert weights is None
    assert out.shape == (1, query.shape[1], query.shape[0], value.shape[-1])
    return out[0]


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def equal_with_gradients(found: Tensor, expected: Tensor, wanted: list[Tensor]) -> None:
    close(found, expected)
    pull = torch.randn(expected.shape, dtype=expected.dtype, generator=torch.Generator().manual_seed(1))
    found_gradients, expected_gradients = (torch.autograd.grad((out * pull).sum(), wanted) for out in (found, expected))
    for one, other in zip(found_gradients, expected_gradients, strict=True):
        close(one, other)


def test_transformers_knows_it_by_name():
    assert AttentionInterface()[TREE_ATTENTION] is tree_attention


# Per tree


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("forest", FORESTS.values(), ids=FORESTS)
def test_per_tree(forest: list[Shape], window: int | None):
    query, key, value = draw(forest)
    found = as_model_calls(query, key, value, layout_of(forest), sliding_window=window)
    equal_with_gradients(found, dense(query, key, value, who_sees_whom(forest, window)), [query, key, value])


@pytest.mark.parametrize("window", [None, 3, 16])
@pytest.mark.parametrize("with_sinks", [True, False], ids=["sinks", "no sinks"])
@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_per_tree_with_groups_softcap_and_sinks(groups: int, softcap: float | None, with_sinks: bool, window: int | None):
    forest = FORESTS["several"]
    query, key, value = draw(forest, groups=groups)
    sinks = torch.tensor([-1.0, 0.0, 0.5, 3.0], dtype=torch.float64, requires_grad=True) if with_sinks else None
    found = as_model_calls(query, key, value, layout_of(forest), sliding_window=window, softcap=softcap, s_aux=sinks)
    expected = dense(query, key, value, who_sees_whom(forest, window), softcap=softcap, sinks=sinks)
    equal_with_gradients(found, expected, [query, key, value, *([] if sinks is None else [sinks])])


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("value_size", [3, 8])
def test_per_tree_with_values_of_another_size(value_size: int, softcap: float | None):
    forest = FORESTS["several"]
    query, key, value = draw(forest, value_size=value_size)
    found = as_model_calls(query, key, value, layout_of(forest), softcap=softcap)
    equal_with_gradients(found, dense(query, key, value, who_sees_whom(forest, None), softcap=softcap), [query, key, value])


def test_scores_are_divided_by_the_root_of_the_head_size_unless_told_otherwise():
    forest = FORESTS["a pair"]
    query, key, value = draw(forest)
    found = as_model_calls(query, key, value, layout_of(forest), scaling=None)
    close(found, dense(query, key, value, who_sees_whom(forest, None), scale=6**-0.5))


@pytest.mark.parametrize("options", [{}, {"sliding_window": 3}, {"softcap": 0.7, "sliding_window": 4}], ids=["causal", "window", "softcap"])
def test_per_tree_passes_gradcheck(options: dict[str, object]):
    forest: list[Shape] = [(3, (2, 2)), (1, (2,))]
    layout = layout_of(forest)
    sinks = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)

    parts = draw(forest, heads=2, groups=1, size=2, value_size=2)

    def run(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None = None) -> Tensor:
        return as_model_calls(query, key, value, layout, s_aux=sinks, **options)

    assert torch.autograd.gradcheck(run, parts)
    assert torch.autograd.gradcheck(run, (*parts, sinks))


def test_masks_of_one_layout_serve_layers_with_different_windows():
    # Layers of one model ask the same layout for different windows, and its masks are kept.
    forest = FORESTS["several"]
    layout = layout_of(forest)
    query, key, value = draw(forest)
    for window in [3, None, 5, 3, None]:
        for softcap in [None, 0.7]:
            found = as_model_calls(query, key, value, layout, sliding_window=window, softcap=softcap)
            close(found, dense(query, key, value, who_sees_whom(forest, window), softcap=softcap))


def test_a_completion_does_not_feel_its_siblings_or_other_trees():
    forest = FORESTS["several"]
    query, key, value = (part.detach() for part in draw(forest))
    before = as_model_calls(query, key, value, layout_of(forest))
    span = layout_of(forest).spans[2]
    (first, length), *_ = list(span.branches())[1:]
    for part in (query, key, value):
        part[:, first : first + length] += 1
    after = as_model_calls(query, key, value, layout_of(forest))
    moved = (before != after).flatten(1).any(1).nonzero().flatten().tolist()
    assert moved == list(range(first, first + length))


# Variable-length flash attention


def flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_offsets: Tensor,
    key_offsets: Tensor,
    max_queries: int,
    max_keys: int,
    *,
    scale: float,
    window_size: tuple[int, int],
) -> Tensor:
    """What flash attention computes: query i of a stretch sees keys i + K − Q − left to i + K − Q + right; −1: all."""
    assert query.is_contiguous()
    assert query.shape[1] == key.shape[1] == value.shape[1]  # as many key heads as query heads
    assert query_offsets.dtype == key_offsets.dtype == torch.int32
    assert len(query_offsets) == len(key_offsets)
    queries, keys = query_offsets.diff().tolist(), key_offsets.diff().tolist()
    assert (max(queries), max(keys)) == (max_queries, max_keys)
    assert (int(query_offsets[-1]), int(key_offsets[-1])) == (len(query), len(key)) == (sum(queries), len(value))
    left, right = window_size
    pieces: list[Tensor] = []
    for stretch, (num_queries, num_keys) in enumerate(zip(queries, keys, strict=True)):
        own = slice(int(query_offsets[stretch]), int(query_offsets[stretch + 1]))
        read = slice(int(key_offsets[stretch]), int(key_offsets[stretch + 1]))
        distance = torch.arange(num_queries)[:, None] + num_keys - num_queries - torch.arange(num_keys)[None, :]
        sees = torch.ones_like(distance, dtype=torch.bool)
        if left != -1:
            sees &= distance <= left
        if right != -1:
            sees &= distance >= -right
        scores = torch.einsum("qhe,khe->hqk", query[own], key[read]) * scale
        pieces.append(torch.einsum("hqk,khe->qhe", scores.masked_fill(~sees, float("-inf")).softmax(-1), value[read]))
    return torch.cat(pieces)


@pytest.fixture
def _flash_is_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    signature = inspect.signature(varlen.varlen_attn)

    def emulated(*args: object, **kwargs: object) -> Tensor:
        signature.bind(*args, **kwargs)  # the installed torch takes the call
        return flash(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(varlen, "varlen_attn", emulated)


@pytest.mark.usefixtures("_flash_is_emulated")
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("forest", FORESTS.values(), ids=FORESTS)
def test_varlen(forest: list[Shape], window: int | None):
    query, key, value = draw(forest)
    found = _varlen(query, key, value, layout_of(forest), SCALE, window)
    equal_with_gradients(found, dense(query, key, value, who_sees_whom(forest, window)), [query, key, value])


@pytest.mark.usefixtures("_flash_is_emulated")
@pytest.mark.parametrize("groups", [1, 4])
def test_varlen_with_groups(groups: int):
    forest = FORESTS["several"]
    query, key, value = draw(forest, groups=groups)
    found = _varlen(query, key, value, layout_of(forest), SCALE, 5)
    equal_with_gradients(found, dense(query, key, value, who_sees_whom(forest, 5)), [query, key, value])


def test_varlen_plan_by_hand():
    # Prompt 0 1 2, completions 3 4 | 5 | 6 7; then prompt 8, completion 9.
    layout = layout_of([(3, (2, 1, 2)), (1, (1,))])
    plan = layout.varlen()
    assert plan.keys_K.tolist() == [0, 1, 2, 3, 4, *(0, 1, 2, 5), *(0, 1, 2, 6, 7), *(8, 9)]
    assert plan.query_offsets.tolist() == [0, 5, 6, 8, 10]
    assert plan.key_offsets.tolist() == [0, 5, 9, 14, 16]
    assert (plan.max_queries, plan.max_keys) == (5, 5)
    assert layout.varlen() is plan  # made once per batch, read in every layer


# FlexAttention


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("forest", FORESTS.values(), ids=FORESTS)
def test_mask_that_flex_asks_for(forest: list[Shape], window: int | None):
    layout = layout_of(forest)
    token = torch.arange(layout.num_tokens)
    none = torch.tensor(0)
    sees = layout.visible(window)(none, none, token[:, None], token[None, :])
    assert sees.tolist() == who_sees_whom(forest, window).tolist()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")  # compiling takes a minute, and means the same
@pytest.mark.parametrize("window", [None, 3, 16])
@pytest.mark.parametrize("with_sinks", [True, False], ids=["sinks", "no sinks"])
@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("value_size", [6, 4])
def test_flex(value_size: int, softcap: float | None, with_sinks: bool, window: int | None):
    # Forward only: FlexAttention has no backward on a CPU.
    forest = FORESTS["several"]
    layout = layout_of(forest)
    query, key, value = (part.detach() for part in draw(forest, value_size=value_size))
    sinks = torch.tensor([-1.0, 0.0, 0.5, 3.0], dtype=torch.float64) if with_sinks else None
    expected = dense(query, key, value, who_sees_whom(forest, window), softcap=softcap, sinks=sinks)
    for _ in range(2):  # the second time with the mask that the first one kept
        found = _flex(query, key, value, layout, SCALE, window, softcap, sinks)
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


# Which implementation runs


class OnGpu(Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = property(lambda _self: True)  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("expected", "dtype", "size", "value_size", "options"),
    [
        ("_varlen", torch.bfloat16, 8, 8, {}),
        ("_varlen", torch.float16, 256, 256, {"sliding_window": 5}),
        ("_flex", torch.bfloat16, 16, 16, {"softcap": 30.0}),
        ("_flex", torch.bfloat16, 16, 16, {"s_aux": torch.zeros(2)}),
        ("_flex", torch.bfloat16, 24, 16, {}),  # flash takes one size for both
        ("_flex", torch.bfloat16, 288, 288, {}),  # and 256 at most
        ("_flex", torch.bfloat16, 20, 20, {}),  # and multiples of 8
        ("_per_tree", torch.bfloat16, 8, 8, {"softcap": 30.0}),  # flex takes no heads below 16
        ("_per_tree", torch.bfloat16, 24, 8, {}),
        ("_per_tree", torch.float32, 8, 8, {}),
        ("_per_tree", torch.float32, 8, 8, {"softcap": 30.0}),
    ],
)
def test_which_implementation_runs_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, expected: str, dtype: torch.dtype, size: int, value_size: int, options: dict[str, object]
):
    called: list[str] = []

    def pretend(name: str) -> Callable[..., Tensor]:
        def run(query: Tensor, *_: object) -> Tensor:
            called.append(name)
            return query.transpose(0, 1)

        return run

    for name in ("_varlen", "_flex", "_per_tree"):
        monkeypatch.setattr(attention, name, pretend(name))
    query, key, value = (torch.zeros(1, 2, 9, width, dtype=dtype).as_subclass(OnGpu) for width in (size, size, value_size))
    tree_attention(nn.Identity(), query, key, value, None, tree_layout=layout_of([(3, (4, 2))]), **options)  # type: ignore[arg-type]
    assert called == [expected]


def test_under_autocast_on_a_gpu_float32_queries_beside_bf16_values_take_the_fast_way(monkeypatch: pytest.MonkeyPatch):
    """So they come from every layer: position embeddings are float32."""
    seen: list[torch.dtype] = []

    def run(query: Tensor, key: Tensor, value: Tensor, *_: object) -> Tensor:
        seen.extend((query.dtype, key.dtype, value.dtype))
        return query.transpose(0, 1)

    monkeypatch.setattr(attention, "_varlen", run)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda _: torch.bfloat16)
    query, key = (torch.zeros(1, 2, 9, 8).as_subclass(OnGpu) for _ in range(2))
    value = torch.zeros(1, 2, 9, 8, dtype=torch.bfloat16).as_subclass(OnGpu)
    out, _ = tree_attention(nn.Identity(), query, key, value, None, tree_layout=layout_of([(3, (4, 2))]))
    assert [*seen, out.dtype] == [torch.bfloat16] * 4


def test_on_a_cpu_attention_is_float32_at_least_and_gives_back_what_the_values_were():
    exact = [torch.randn(1, 2, 9, 8, dtype=torch.bfloat16) for _ in range(3)]
    layout = layout_of([(3, (4, 2))])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = tree_attention(nn.Identity(), *exact, None, tree_layout=layout)
    expected, _ = tree_attention(nn.Identity(), *(row.double() for row in exact), None, tree_layout=layout)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected.bfloat16())  # nothing is rounded on the way


def test_on_a_cpu_a_long_stretch_is_computed_in_what_autocast_says(monkeypatch: pytest.MonkeyPatch):
    seen: list[tuple[int, torch.dtype]] = []
    kernel = attention.scaled_dot_product_attention

    def run(query: Tensor, *arguments: Any, **others: Any) -> Tensor:
        seen.append((query.shape[2], query.dtype))
        return kernel(query, *arguments, **others)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", run)
    monkeypatch.setattr(attention, "LONG_STRETCH", 7)
    rows = [torch.randn(1, 2, 15, 8) for _ in range(3)]
    layout = layout_of([(3, (4, 2)), (2, (4,))])
    exact, _ = tree_attention(nn.Identity(), *rows, None, tree_layout=layout)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = tree_attention(nn.Identity(), *rows, None, tree_layout=layout)
    single, half = torch.float32, torch.bfloat16
    assert seen == [(7, single), (2, single), (6, single), (7, half), (2, single), (6, single)]
    assert out.dtype == exact.dtype == single
    torch.testing.assert_close(out, exact, rtol=0, atol=0.03)
    assert torch.equal(out[:, 7:], exact[:, 7:])


@pytest.mark.parametrize(("window", "passed_on"), [(None, None), (6, 6), (7, None), (100, None)])
def test_a_window_that_hides_nothing_costs_nothing(monkeypatch: pytest.MonkeyPatch, window: int | None, passed_on: int | None):
    seen: list[object] = []

    def pretend(query: Tensor, *arguments: object) -> Tensor:
        seen.append(arguments[4])
        return query.transpose(0, 1)

    monkeypatch.setattr(attention, "_per_tree", pretend)
    row = torch.zeros(1, 2, 9, 8)
    tree_attention(nn.Identity(), row, row, row, None, tree_layout=layout_of([(3, (4, 2))]), sliding_window=window)
    assert seen == [passed_on]


# What it refuses


def refused(change: Callable[[dict[str, object]], object], match: str) -> None:
    layout = layout_of([(3, (2, 2))])
    query, key, value = (part[None] for part in draw([(3, (2, 2))]))
    arguments: dict[str, object] = {"query": query, "key": key, "value": value, "attention_mask": None, "tree_layout": layout}
    change(arguments)
    with pytest.raises(ValueError, match=match):
        tree_attention(nn.Identity(), **arguments)  # type: ignore[arg-type]


def test_refuses_to_run_without_a_layout():
    refused(lambda arguments: arguments.pop("tree_layout"), "does not pass keywords on to its attention")


def test_refuses_a_mask():
    refused(lambda arguments: arguments.update(attention_mask=torch.zeros(1, 1, 7, 7)), "one flat row of the layout's length")


def test_refuses_a_row_of_another_length():
    refused(lambda arguments: arguments.update(tree_layout=layout_of([(3, (2, 3))])), "one flat row of the layout's length")


def test_refuses_several_rows():
    def double(arguments: dict[str, object]) -> None:
        for name in ("query", "key", "value"):
            part = arguments[name]
            assert isinstance(part, Tensor)
            arguments[name] = part.expand(2, -1, -1, -1)

    refused(double, "one flat row of the layout's length")


def test_refuses_keys_from_a_cache():
    def lengthen(arguments: dict[str, object]) -> None:
        for name in ("key", "value"):
            part = arguments[name]
            assert isinstance(part, Tensor)
            arguments[name] = torch.cat([part, part], dim=2)

    refused(lengthen, "one flat row of the layout's length")
