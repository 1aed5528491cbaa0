"""Causal attention of packed sequences on a CPU, in the compiled core: no padding and no mask.

    out_i = sum_{j <= i} softmax_j(scaling q_i . k_j) v_j      i, j in the same sequence

For the many short sequences of a round, which PyTorch's CPU kernel wants padded, and takes several times as long for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack  # type: ignore[attr-defined]

from . import backends
from .registry import once


def serves(query: Tensor) -> bool:
    """Whether the core attends for tensors of this device and dtype."""
    return query.dtype == torch.float32 and backends.select(query.device, query.dtype) == "cpu"


def packed_attention(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, scaling: float) -> Tensor:
    """Attend causally within each sequence; gradients are the same bits on any number of threads.

    Args:
        query: [T, heads, head_size] float32.
        key: [T, key_value_heads, head_size] float32.
        value: likewise.
        cu_seqlens: [sequences + 1] int64, where each sequence begins, and T.
        scaling: factor of the products q . k.

    Returns:
        [T, heads, head_size], differentiable in query, key and value.
    """
    out: Tensor = _PackedAttention.apply(query, key, value, cu_seqlens, scaling)  # type: ignore[no-untyped-call]
    return out


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, scaling: float) -> Tensor:
        query, key, value, cu_seqlens = (x.contiguous() for x in (query, key, value, cu_seqlens))
        out, lse = attend(query, key, value, cu_seqlens, scaling)
        ctx.save_for_backward(query, key, value, cu_seqlens, out, lse)
        ctx.scaling = scaling
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, cu_seqlens, out, lse = ctx.saved_tensors
        gradients = attend_backward(query, key, value, cu_seqlens, ctx.scaling, out, lse, grad_out.contiguous())
        return *once(gradients), None, None


def attend(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, scaling: float,
    rotation: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out [T, heads, head_size], lse [T, heads]: the logarithm of each softmax's denominator); contiguous tensors.

    With `rotation`, (cos, sin) [T, head_size] of rotary positions, query and key are rotated in place first.
    """
    out, lse = torch.empty_like(query), query.new_empty(query.shape[:2])
    inputs = _inputs(query, key, value, cu_seqlens, scaling, rotation)
    _native().attention_forward(*inputs, _flat(out), to_dlpack(lse), torch.get_num_threads())
    return out, lse


def attend_backward(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, scaling: float, out: Tensor, lse: Tensor,
    grad_out: Tensor, rotation: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """What query, key and value are to get; contiguous tensors, as `attend` has left them.

    With `rotation`, query's and key's are of what they were before it.
    """
    gradients = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    inputs = _inputs(query, key, value, cu_seqlens, scaling, rotation)
    _native().attention_backward(
        *inputs, _flat(out), to_dlpack(lse), _flat(grad_out), *map(_flat, gradients), torch.get_num_threads()
    )
    return gradients


def _inputs(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, scaling: float,
    rotation: tuple[Tensor, Tensor] | None,
) -> list[Any]:  # fmt: skip
    cos, sin = (None, None) if rotation is None else (to_dlpack(x.detach()) for x in rotation)
    return [*map(_flat, (query, key, value)), to_dlpack(cu_seqlens), query.shape[2], scaling, cos, sin]


def _flat(x: Tensor) -> Any:
    return to_dlpack(x.detach().flatten(1))


def _native() -> Any:
    return backends.native
