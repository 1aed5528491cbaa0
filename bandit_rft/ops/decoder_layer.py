"""A Llama-shaped decoder layer on packed sequences, one node of autograd, on a CPU in float32.

    x1 = x + o(attention(rotate(norm(q h)), rotate(norm(k h)), v h)),   h = norm(x)
    y  = x1 + down(silu(gate h1) * up h1),                             h1 = norm(x1)

Through modules such a layer is 35 operations forward and 70 back (views not counted), most of which read and write
[T, H] to multiply by a number. Here only products and attention are not one pass over memory (csrc/cpu/layers.h),
products are the core's own where those are faster, and no gradient is summed by autograd. Weights get the same
gradients on any number of threads as far as the products' library gives them.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack  # type: ignore[attr-defined]

from . import backends
from .attention import attend, attend_backward
from .core_backend import CpuBackend
from .registry import is_eager, once


class LayerWeights(NamedTuple):
    """float32, contiguous. [out, in] of a product, [width] of a norm or bias; None where a layer has none."""

    before_attention: Tensor
    before_mlp: Tensor
    q_proj: Tensor
    k_proj: Tensor
    v_proj: Tensor
    o_proj: Tensor
    gate_proj: Tensor
    up_proj: Tensor
    down_proj: Tensor
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    o_bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None


class Layout(NamedTuple):
    """What all layers of a call share: tensors, then numbers.

    Attributes:
        cu_seqlens: int64 [sequences + 1], where each sequence begins, and T.
        cos: [T, head_size], of the rotary positions.
        sin: likewise.
        scaling: factor of the products q . k.
        eps: of the norms.
    """

    cu_seqlens: Tensor
    cos: Tensor
    sin: Tensor
    scaling: float
    eps: float


def serves(*tensors: Tensor | None) -> bool:
    """Whether the core computes layers of these tensors: all are plain float32 ones in CPU memory."""
    given = [x for x in tensors if x is not None]
    if not is_eager(given) or torch.is_autocast_enabled("cpu"):
        return False
    plain = all(x.dtype == torch.float32 and x.device.type == "cpu" and x.is_contiguous() for x in given)
    return plain and backends.select(given[0].device, torch.float32) == "cpu"


def decoder_layer(x: Tensor, layout: Layout, weights: LayerWeights, rows: Tensor | None = None) -> Tensor:
    """What comes out of a layer, differentiable in x and the weights; where `serves` says so.

    Args:
        x: [T, H].
        layout: of the T tokens.
        weights: of the layer.
        rows: integers [N], the tokens that are wanted, in any order; None: all.

    Returns:
        [T, H], or [N, H].
    """
    out: Tensor = _DecoderLayer.apply(x, layout, rows, *weights)  # type: ignore[no-untyped-call]
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [T, H] / sqrt(mean(x^2) + eps) * weight [H]; differentiable, where `serves` says so."""
    out: Tensor = _RmsNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return out


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return _norm(x, weight, eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        with torch.no_grad():  # create_graph=True
            found = _norm_backward(x, weight, ctx.eps, grad.contiguous(), ctx.needs_input_grad[1])
        return *once(found), None


class _DecoderLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: Layout, rows: Tensor | None, *given: Tensor | None) -> Tensor:
        w, eps = LayerWeights(*cast(Any, given)), layout.eps
        x = x.contiguous()
        h = _norm(x, w.before_attention, eps)
        q, k, v = _linear(h, w.q_proj, w.q_bias), _linear(h, w.k_proj, w.k_bias), _linear(h, w.v_proj, w.v_bias)
        plain_q, plain_k = q, k  # a norm of heads is differentiated at what went in
        q, k = _norm_heads(q, w.q_norm, eps), _norm_heads(k, w.k_norm, eps)
        out, lse = attend(
            _heads(q, layout), _heads(k, layout), _heads(v, layout), layout.cu_seqlens, layout.scaling, layout[1:3]
        )  # fmt: skip
        mixed, residual = out.flatten(1), x
        if rows is not None:
            rows = rows.long()
            mixed, residual = mixed.index_select(0, rows), x.index_select(0, rows)
        x1 = _linear(mixed, w.o_proj, w.o_bias).add_(residual)
        h1 = _norm(x1, w.before_mlp, eps)
        gate, up = _linear(h1, w.gate_proj), _linear(h1, w.up_proj)
        y = _linear(_gated_silu(gate, up), w.down_proj).add_(x1)
        kept = None if w.q_norm is None else plain_q, None if w.k_norm is None else plain_k
        ctx.save_for_backward(x, h, q, k, v, *kept, out, lse, mixed, x1, h1, gate, up, rows, *layout[:3], *given)
        ctx.numbers = layout[3:]
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():  # create_graph=True
            found = _DecoderLayer.gradients(ctx, grad)
        return once(found)

    @staticmethod
    def gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Of x and the weights, in their order."""
        x, h, q, k, v, plain_q, plain_k, out, lse, mixed, x1, h1, gate, up, rows, *more = ctx.saved_tensors
        layout, w = Layout(*more[:3], *ctx.numbers), LayerWeights(*more[3:])
        wanted: Any = LayerWeights(*ctx.needs_input_grad[3:])
        found: dict[str, Tensor | None] = {}
        dy = grad.contiguous()

        def of_weight(name: str, dz: Tensor, inputs: Tensor) -> None:
            if getattr(wanted, f"{name}_proj"):
                found[f"{name}_proj"] = _weight_gradient(dz, inputs)
            if getattr(wanted, f"{name}_bias", False):
                found[f"{name}_bias"] = dz.sum(0)

        dgate, dup, product = _gated_silu_backward(gate, up, _input_gradient((dy, w.down_proj)))
        of_weight("down", dy, product)
        of_weight("gate", dgate, h1)
        of_weight("up", dup, h1)
        dh1 = _input_gradient((dgate, w.gate_proj), (dup, w.up_proj))
        del dgate, dup, product
        dx1, found["before_mlp"] = _norm_backward(x1, w.before_mlp, layout.eps, dh1, wanted.before_mlp, add=dy)
        of_weight("o", dx1, mixed)
        dmixed, dx = _input_gradient((dx1, w.o_proj)), dx1
        if rows is not None:
            dmixed, dx = (t.new_zeros(len(x), t.shape[1]).index_add_(0, rows, t) for t in (dmixed, dx1))
        of_heads = attend_backward(
            _heads(q, layout), _heads(k, layout), _heads(v, layout), layout.cu_seqlens, layout.scaling, out, lse,
            dmixed.view_as(out), layout[1:3],
        )  # fmt: skip
        dq, dk, dv = (t.flatten(1) for t in of_heads)
        dq, found["q_norm"] = _norm_heads_backward(plain_q, w.q_norm, layout.eps, dq, wanted.q_norm)
        dk, found["k_norm"] = _norm_heads_backward(plain_k, w.k_norm, layout.eps, dk, wanted.k_norm)
        for name, dz in (("q", dq), ("k", dk), ("v", dv)):
            of_weight(name, dz, h)
        dh = _input_gradient((dq, w.q_proj), (dk, w.k_proj), (dv, w.v_proj))
        dx, found["before_attention"] = _norm_backward(
            x, w.before_attention, layout.eps, dh, wanted.before_attention, add=dx
        )
        return dx, None, None, *(found.get(name) for name in LayerWeights._fields)


# --- parts ------------------------------------------------------------------------------------------------------------


def _heads(x: Tensor, layout: Layout) -> Tensor:
    return x.view(len(x), -1, layout.cos.shape[1])


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [n, in] . weight [out, in]^T + bias [out]."""
    return _backend().logits(x, weight, bias, x.new_empty(len(x), len(weight)))


def _input_gradient(*products: tuple[Tensor, Tensor]) -> Tensor:
    """The sum of dz [n, out] . weight [out, in] over products."""
    dz, weight = products[0]
    out = dz.new_empty(len(dz), weight.shape[1])
    for i, (dz, weight) in enumerate(products):
        _backend().add_hidden_gradient(dz, weight, out, accumulate=i > 0)
    return out


def _weight_gradient(dz: Tensor, x: Tensor) -> Tensor:
    """dz [n, out]^T . x [n, in]."""
    out = dz.new_empty(dz.shape[1], x.shape[1])
    _backend().add_weight_gradient(dz, x, out, accumulate=False)
    return out


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out = torch.empty_like(x)
    _native().norm_forward(_dl(x), _dl(weight), eps, _dl(out), torch.get_num_threads())
    return out


def _norm_backward(
    x: Tensor, weight: Tensor, eps: float, dy: Tensor, wanted: bool, add: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """(what x is to get and `add`, what the weight is to get if it is wanted)."""
    dx, dweight = torch.empty_like(x), torch.empty_like(weight) if wanted else None
    _native().norm_backward(
        _dl(x), _dl(weight), eps, _dl(dy), None if add is None else _dl(add), _dl(dx),
        None if dweight is None else _dl(dweight), torch.get_num_threads(),
    )  # fmt: skip
    return dx, dweight


def _norm_heads(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Over each head by itself, or over all of them, as wide as the weight is."""
    return x if weight is None else _norm(x.view(-1, len(weight)), weight, eps).view_as(x)


def _norm_heads_backward(
    x: Tensor | None, weight: Tensor | None, eps: float, dy: Tensor, wanted: bool
) -> tuple[Tensor, Tensor | None]:
    if x is None or weight is None:
        return dy, None
    dx, dweight = _norm_backward(x.view(-1, len(weight)), weight, eps, dy.view(-1, len(weight)), wanted)
    return dx.view_as(x), dweight


def _gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    out = torch.empty_like(gate)
    _native().gated_silu_forward(_dl(gate), _dl(up), _dl(out), torch.get_num_threads())
    return out


def _gated_silu_backward(gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(what gate and up are to get, the latter in dy's memory, and silu(gate) * up once more)."""
    found = torch.empty_like(gate), dy, torch.empty_like(gate)
    _native().gated_silu_backward(_dl(gate), _dl(up), _dl(dy), *map(_dl, found), torch.get_num_threads())
    return found


def _native() -> Any:
    return backends.native


def _backend() -> CpuBackend:
    return cast(CpuBackend, backends.named("cpu"))


def _dl(x: Tensor) -> Any:
    return to_dlpack(x.detach() if x.requires_grad else x)
