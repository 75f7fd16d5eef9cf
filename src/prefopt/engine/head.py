"""The language-model head on scored positions only, in chunks, so that full logits never exist.

For N positions and a vocabulary of V the logits are N·V numbers, the largest tensor of a training step. Here a
chunk of them exists at a time, in the forward pass and again in the backward pass, where it is recomputed from
the hidden states: one more matrix product, against a memory that does not grow with N. The first few chunks stay, as the
product left them, so that small batches do not compute it twice.

    z = cap·tanh(s·(h·Wᵀ + b) / cap)      log π(y) = z_y − log Σ_v exp z_v

s and cap are 1 and ∞ for most models (Cohere and Granite scale, Gemma 2 caps). Products run in the compute
dtype; everything from z on in float32 (float64 for float64 models).

Shapes: N scored positions, D hidden size, V vocabulary, n positions of a chunk.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_LOGITS = {"cpu": 2**23, "cuda": 2**26}
"""Logits that exist at a time, by device: 32 MB and 256 MB in float32."""

KEPT_CHUNKS = 2
"""Chunks of a forward pass whose logits wait for the backward pass in the compute dtype: in bf16 as much as one chunk in float32."""


@dataclass(frozen=True, slots=True)
class HeadShape:
    """What a head does around its matrix product: z = cap·tanh(scale·(h·Wᵀ + b) / cap)."""

    scale: float = 1.0
    soft_cap: float | None = None


def head_logps(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    target_N: Tensor,
    shape: HeadShape = HeadShape(),
    *,
    extras: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Log-probability of each target under the head's distribution.

    Args:
        hidden_ND: hidden states that predict the targets, any float dtype.
        weight_VD, bias_V: the head's parameters.
        target_N: token ids, int64.
        shape: scale and soft-cap of the logits.
        extras: also compute the entropy and log Σπ² of each distribution.

    Returns:
        log-probabilities [N], entropies [N] or None, log Σπ² [N] without gradient or None; float32 at least.
    """
    device_type = hidden_ND.device.type
    compute_dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else weight_VD.dtype
    logps_N, entropy_N, log_sum_squares_N = _HeadLogps.apply(  # type: ignore[no-untyped-call]  # autograd gives apply no types
        hidden_ND, weight_VD, bias_V, target_N, shape, extras, compute_dtype
    )
    return (logps_N, entropy_N, log_sum_squares_N) if extras else (logps_N, None, None)


class _HeadLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        target_N: Tensor,
        shape: HeadShape,
        extras: bool,
        compute_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        result_dtype = torch.promote_types(compute_dtype, torch.float32)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            hidden = hidden_ND.to(compute_dtype)
            weight = weight_VD.to(compute_dtype)
            logps_N = hidden_ND.new_empty(len(target_N), dtype=result_dtype)
            entropy_N = torch.empty_like(logps_N) if extras else logps_N.new_empty(0)
            log_sum_squares_N = torch.empty_like(entropy_N)
            kept: list[Tensor] = []
            for chunk in _chunks(hidden, weight):
                product = hidden[chunk] @ weight.T
                if len(kept) < KEPT_CHUNKS and any(ctx.needs_input_grad):
                    kept.append(product)
                # One pass over each row, where logsumexp takes four over the whole chunk: a third of its time on a CPU.
                all_logps = _logits(product, bias_V, shape, result_dtype).log_softmax(-1)
                logps_N[chunk] = all_logps.gather(-1, target_N[chunk, None]).squeeze(-1)
                if extras:
                    log_sum_squares_N[chunk] = (2 * all_logps).logsumexp(-1)
                    entropy_N[chunk] = -(all_logps.exp() * all_logps).sum(-1)
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, target_N, entropy_N, *kept)
        ctx.shape, ctx.extras, ctx.compute_dtype = shape, extras, compute_dtype
        ctx.mark_non_differentiable(log_sum_squares_N)
        ctx.set_materialize_grads(False)
        return logps_N, entropy_N, log_sum_squares_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logps_N: Tensor | None, grad_entropy_N: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VD, bias_V, target_N, entropy_N, *kept = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        result_dtype = entropy_N.dtype
        hidden = hidden_ND.to(ctx.compute_dtype)
        weight = weight_VD.to(ctx.compute_dtype)
        grad_hidden = torch.empty_like(hidden_ND) if needs_hidden else None
        # Chunks of a bf16 head add up in float32: their sum would lose the small ones.
        grad_weight = torch.zeros_like(weight_VD, dtype=result_dtype) if needs_weight else None
        grad_bias = torch.zeros_like(bias_V, dtype=result_dtype) if needs_bias else None
        for index, chunk in enumerate(_chunks(hidden, weight)):
            product = kept[index] if index < len(kept) else hidden[chunk] @ weight.T
            logits = _logits(product, bias_V, ctx.shape, result_dtype)
            # d logits of the softmax, then through cap and scale: dz/dx = s·(1 − (z/cap)²).
            slope = None if ctx.shape.soft_cap is None else 1 - (logits / ctx.shape.soft_cap).square()
            grad_logits = _grad_logits(logits, target_N[chunk], grad_logps_N, grad_entropy_N, entropy_N, chunk)
            if slope is not None:
                grad_logits.mul_(slope)
            if ctx.shape.scale != 1.0:
                grad_logits.mul_(ctx.shape.scale)
            if grad_bias is not None:
                grad_bias += grad_logits.sum(0)
            grad_logits = grad_logits.to(ctx.compute_dtype)
            if grad_hidden is not None:
                grad_hidden[chunk] = grad_logits @ weight
            if grad_weight is not None:
                _add_product(grad_weight, grad_logits, hidden[chunk])
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight_VD.dtype),
            None if grad_bias is None else grad_bias.to(bias_V.dtype),
            None,
            None,
            None,
            None,
        )


def _chunks(hidden_ND: Tensor, weight_VD: Tensor) -> list[slice]:
    size = max(16, CHUNK_LOGITS.get(hidden_ND.device.type, CHUNK_LOGITS["cuda"]) // weight_VD.shape[0])
    return [slice(start, start + size) for start in range(0, len(hidden_ND), size)]


def _logits(product_nV: Tensor, bias_V: Tensor | None, shape: HeadShape, dtype: torch.dtype) -> Tensor:
    """z of hidden states times weights, which may be kept and is not changed."""
    logits = product_nV.to(dtype)
    if bias_V is not None:
        logits = logits + bias_V
    if shape.scale != 1.0:
        logits = logits * shape.scale
    if shape.soft_cap is not None:
        logits = (logits / shape.soft_cap).tanh_().mul_(shape.soft_cap)
    return logits


def _grad_logits(
    logits_nV: Tensor,
    target_n: Tensor,
    grad_logps_N: Tensor | None,
    grad_entropy_N: Tensor | None,
    entropy_N: Tensor,
    chunk: slice,
) -> Tensor:
    """d log π(y)/dz = 1_y − π;  dH/dz = −π·(log π + H)."""
    if grad_entropy_N is None:
        grad = logits_nV.softmax(-1)
    else:
        all_logps = logits_nV.log_softmax(-1)
        probs = all_logps.exp()
        grad = all_logps.add_(entropy_N[chunk, None]).mul_(probs).mul_(-grad_entropy_N[chunk, None])
        if grad_logps_N is None:
            return grad
        grad -= probs * grad_logps_N[chunk, None]
        return grad.scatter_add_(1, target_n[:, None], grad_logps_N[chunk, None])
    if grad_logps_N is None:
        return grad.zero_()
    grad.mul_(-grad_logps_N[chunk, None])
    return grad.scatter_add_(1, target_n[:, None], grad_logps_N[chunk, None])


def _add_product(total_VD: Tensor, grad_nV: Tensor, hidden_nD: Tensor) -> None:
    if total_VD.dtype == grad_nV.dtype:
        total_VD.addmm_(grad_nV.T, hidden_nD)
    else:
        total_VD += grad_nV.T @ hidden_nD
