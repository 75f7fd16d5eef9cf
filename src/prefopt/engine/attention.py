"""Tree attention: every completion looks at its own prompt and at itself.

Registered with transformers as an attention function, so that a model's own layers call it with their queries,
keys and values; nothing of the model is patched. The layout of the row travels as a keyword of the model's
forward (`tree_layout`), so that recomputation under gradient checkpointing sees the same one.

Three implementations, one meaning:
    per tree     scaled_dot_product_attention for each stretch: CPU, and float32 on a GPU
    varlen       one flash-attention call for the whole row, prompt keys gathered per completion: CUDA in half precision
    flex         FlexAttention with a block mask: CUDA where a model caps its scores, has attention sinks, or heads of a width that
                 flash attention does not take

Shapes: H query heads, G key heads, T tokens of the row, E head size, Q and K tokens of a stretch.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from prefopt.engine.layout import FlatLayout

TREE_ATTENTION = "prefopt_tree"
"""The name under which transformers knows it: `model.set_attn_implementation(TREE_ATTENTION)`."""

LONG_STRETCH = 1024
"""Tokens from which a stretch is computed in what autocast says on a CPU too: there bf16's backward pass takes a fifth less time."""

SMALLEST_FLEX = 16
"""FlexAttention refuses heads that are narrower on CUDA; only toy models have them."""


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    tree_layout: FlatLayout | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_others: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer over a flat row, as transformers calls it.

    Args:
        module: the calling layer, unread.
        query, key, value: [1, H, T, E] and [1, G, T, E].
        attention_mask: must be None; the layout says who sees whom.
        tree_layout: the trees of the row.
        scaling: factor of the scores; None: 1/√E.
        sliding_window: how many positions back a token sees, itself included; None: all.
        softcap: scores become cap·tanh(score / cap).
        s_aux: attention sinks, one logit per head that joins the softmax and carries no value.
        _others: what else transformers hands to attention functions (dropout, position ids). An architecture
            that needs something here would come out wrong, and is caught by the proof at load.

    Returns:
        [1, T, H, E], and None in place of attention weights.

    Raises:
        ValueError: the layout did not arrive, or the row is not a flat one.
    """
    if tree_layout is None:
        raise ValueError("tree attention was called without tree_layout: this architecture does not pass keywords on to its attention")
    if attention_mask is not None or query.shape[0] != 1 or query.shape[2] != tree_layout.num_tokens or key.shape[2] != query.shape[2]:
        raise ValueError("tree attention takes one flat row of the layout's length, without a mask and without a cache")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if sliding_window is not None and sliding_window >= tree_layout.longest_branch:
        sliding_window = None
    dtype = compute_dtype(query)
    rows = (query[0].to(dtype), key[0].to(dtype), value[0].to(dtype))
    arguments = (*rows, tree_layout, scale, sliding_window)
    sizes = (query.shape[-1], value.shape[-1])
    half = query.is_cuda and dtype in (torch.float16, torch.bfloat16)
    if half and softcap is None and s_aux is None and sizes[0] == sizes[1] and sizes[0] <= 256 and sizes[0] % 8 == 0:
        out = _varlen(*arguments)
    elif half and min(sizes) >= SMALLEST_FLEX:
        out = _flex(*arguments, softcap, s_aux)
    else:
        long_dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") and not query.is_cuda else dtype
        with torch.autocast(query.device.type, enabled=False):  # it would take each stretch back to bf16
            out = _per_tree(*arguments, softcap, s_aux, long_dtype)
    return out[None].to(value.dtype), None


def compute_dtype(query: Tensor) -> torch.dtype:
    """What attention computes in, whatever the layer hands over.

    On a GPU what autocast says: position embeddings are float32 there, so that queries come as float32 and values as bf16, and the
    fast kernels take neither the one nor both. On a CPU float32 at least: exacter than bf16 and twice as fast, because its bf16
    kernels are written anew for every length (docs/experiments.md); where a stretch is long that does not matter (`LONG_STRETCH`).
    """
    if query.is_cuda:
        return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query.dtype
    return torch.promote_types(query.dtype, torch.float32)


AttentionInterface.register(TREE_ATTENTION, tree_attention)


def _per_tree(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: FlatLayout,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    long_dtype: torch.dtype,
) -> Tensor:
    """[H, T, E] -> [T, H, E], stretch by stretch: the prompt with its first completion, then each other completion."""
    # Split once: slicing the row per tree would fill a gradient of the whole row with zeros for every slice.
    stretches = zip(*(row.split(layout.stretches, dim=1) for row in (query, key, value)), strict=True)
    pieces: list[Tensor] = []
    for span in layout.spans:
        queries, keys, values = next(stretches)
        prompt_keys, prompt_values = keys[:, : span.prompt], values[:, : span.prompt]
        if queries.shape[1] >= LONG_STRETCH and softcap is None and sinks is None:
            queries, keys, values = (part.to(long_dtype) for part in (queries, keys, values))
        mask = None if window is None else layout.first_branch_mask(queries.shape[1], window, queries.dtype)
        pieces.append(_stretch(queries, keys, values, mask, scale, softcap, sinks, layout).to(query.dtype))
        for length in span.completions[1:]:
            queries, keys, values = next(stretches)
            mask = layout.later_branch_mask(span.prompt, length, window, query.dtype)
            keys, values = torch.cat([prompt_keys, keys], dim=1), torch.cat([prompt_values, values], dim=1)
            pieces.append(_stretch(queries, keys, values, mask, scale, softcap, sinks, layout))
    return torch.cat(pieces, dim=1).transpose(0, 1)


def _stretch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask_QK: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    layout: FlatLayout,
) -> Tensor:
    """[H, Q, E] over [G, K, E]; causal where no mask is given."""
    if softcap is None and sinks is None:
        grouped = query.shape[0] != key.shape[0]
        return scaled_dot_product_attention(
            query[None], key[None], value[None], attn_mask=mask_QK, is_causal=mask_QK is None, scale=scale, enable_gqa=grouped
        )[0]
    if mask_QK is None:
        mask_QK = layout.first_branch_mask(query.shape[1], key.shape[1] + 1, query.dtype)
    repeats = query.shape[0] // key.shape[0]
    scores = (query @ key.repeat_interleave(repeats, dim=0).transpose(1, 2)) * scale
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    scores = scores + mask_QK
    if sinks is not None:
        sink_column = sinks.to(scores.dtype)[:, None, None].expand(-1, scores.shape[1], 1)
        scores = torch.cat([scores, sink_column], dim=-1)
    upcast = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.softmax(-1, dtype=upcast).to(value.dtype)
    if sinks is not None:
        weights = weights[..., :-1]
    return weights @ value.repeat_interleave(repeats, dim=0)


def _varlen(query: Tensor, key: Tensor, value: Tensor, layout: FlatLayout, scale: float, window: int | None) -> Tensor:
    """One flash-attention call. Its causal mask aligns the last query with the last key, as a completion needs."""
    from torch.nn.attention.varlen import varlen_attn

    plan = layout.varlen()
    out = varlen_attn(
        query.transpose(0, 1).contiguous(),
        _for_flash(key, plan.keys_K, query.shape[0]),
        _for_flash(value, plan.keys_K, query.shape[0]),
        plan.query_offsets,
        plan.key_offsets,
        plan.max_queries,
        plan.max_keys,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
    )
    assert isinstance(out, Tensor)  # a pair only where the log-sum-exp is asked for
    return out


def _for_flash(row: Tensor, places_K: Tensor, num_heads: int) -> Tensor:
    """[G, T, E] -> [K, H, E]: the keys of all stretches. Key heads are repeated, because the grouped call is not in all supported
    versions of torch; after they are gathered, so that less is gathered."""
    return row.transpose(0, 1)[places_K].repeat_interleave(num_heads // row.shape[0], dim=1)


def _flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: FlatLayout,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """FlexAttention over the whole row; blocks of the mask that are empty are skipped."""
    from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask

    memo_key = ("block_mask", window)
    block_mask = layout.memo.get(memo_key)
    if not isinstance(block_mask, BlockMask):
        num_tokens = layout.num_tokens
        block_mask = create_block_mask(layout.visible(window), None, None, num_tokens, num_tokens, device=query.device)
        layout.memo[memo_key] = block_mask

    def cap(score: Tensor, _batch: Tensor, _head: Tensor, _q: Tensor, _k: Tensor) -> Tensor:
        return score if softcap is None else softcap * torch.tanh(score / softcap)

    out, aux = _flex_kernel(compiled=query.is_cuda)(
        query[None],
        key[None],
        value[None],
        score_mod=None if softcap is None else cap,
        block_mask=block_mask,
        scale=scale,
        enable_gqa=query.shape[0] != key.shape[0],
        return_aux=AuxRequest(lse=True),
    )
    out_THE: Tensor = out[0].transpose(0, 1)
    if sinks is not None:
        # A sink adds exp(sink) to the softmax's denominator: out·exp(lse) / (exp(lse) + exp(sink)).
        keep_TH = torch.sigmoid(aux.lse[0] - sinks.to(aux.lse.dtype)[:, None]).transpose(0, 1)
        out_THE = out_THE * keep_TH[..., None].to(out_THE.dtype)
    return out_THE


@cache
def _flex_kernel(compiled: bool) -> Callable[..., Any]:
    """FlexAttention; compiled once per process, for shapes that change with every batch."""
    from torch.nn.attention.flex_attention import flex_attention

    kernel: Callable[..., Any] = flex_attention
    return torch.compile(kernel, dynamic=True) if compiled else kernel
