"""A decoder layer in the compiled core: against float64, the same bits on any number of threads, what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.dlpack import to_dlpack

from bandit_rft.ops import attention, backends, use_backend
from bandit_rft.ops.decoder_layer import LayerWeights, Layout, decoder_layer, rms_norm, serves

LENGTHS = (5, 33, 1, 17)
TOKENS = sum(LENGTHS)
SHAPES = {  # hidden size, query heads, key and value heads, head size, intermediate size; biases; norms of heads or all
    "llama": (32, 4, 2, 8, 48, False, None),
    "qwen2": (40, 4, 4, 16, 52, True, None),
    "qwen3": (24, 3, 1, 10, 31, False, "each"),
    "norms over all heads": (32, 4, 2, 8, 33, True, "all"),
    "odd": (7, 1, 1, 2, 5, False, None),
}


def weights_of(name: str) -> LayerWeights:
    hidden, heads, kv, size, inner, biases, norms = SHAPES[name]
    generator = torch.Generator().manual_seed(hidden)

    def normal(*shape: int, mean: float = 0.0) -> Tensor:
        return torch.randn(shape, generator=generator) * (0.3 if len(shape) == 2 else 0.4) + mean

    q, k = heads * size, kv * size
    products = [(q, hidden), (k, hidden), (k, hidden), (hidden, q), (inner, hidden), (inner, hidden), (hidden, inner)]
    widths = {"each": (size, size), "all": (q, k)}.get(norms or "")
    return LayerWeights(
        normal(hidden, mean=1.0), normal(hidden, mean=1.0), *(normal(*shape) for shape in products),
        *((normal(n) for n in (q, k, k, hidden)) if biases else [None] * 4),
        *((normal(n, mean=1.0) for n in widths) if widths else [None] * 2),
    )  # fmt: skip


def packed_of(name: str, dtype: torch.dtype = torch.float32) -> Layout:
    size = SHAPES[name][3]
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[:, None]
    angles = positions * 100.0 ** -(
        torch.arange(size) / size
    )  # the halves turn by other angles: nothing may assume not
    cos, sin = angles.cos().to(dtype), (1.1 * angles.sin()).to(dtype)
    return Layout(torch.tensor([0, *LENGTHS]).cumsum(0), cos, sin, 0.4, 1e-3)


def by_pytorch(x: Tensor, layout: Layout, w: LayerWeights, rows: Tensor | None) -> Tensor:
    """The formula, one sequence of attention at a time."""

    def norm(t: Tensor, weight: Tensor | None) -> Tensor:
        if weight is None:
            return t
        heads = t.unflatten(1, (-1, len(weight)))
        return (heads / (heads.pow(2).mean(-1, keepdim=True) + layout.eps).sqrt() * weight).flatten(1)

    def turned(t: Tensor) -> Tensor:
        heads = t.unflatten(1, (-1, layout.cos.shape[1]))
        low, high = heads.chunk(2, -1)
        return heads * layout.cos[:, None] + torch.cat([-high, low], -1) * layout.sin[:, None]

    h = norm(x, w.before_attention)
    q = turned(norm(F.linear(h, w.q_proj, w.q_bias), w.q_norm))
    k = turned(norm(F.linear(h, w.k_proj, w.k_bias), w.k_norm))
    v = F.linear(h, w.v_proj, w.v_bias).unflatten(1, (-1, q.shape[2]))
    mixed = []
    for one in zip(*(t.split(LENGTHS) for t in (q, k, v)), strict=True):
        one_q, one_k, one_v = (t.transpose(0, 1)[None] for t in one)
        out = F.scaled_dot_product_attention(one_q, one_k, one_v, is_causal=True, scale=layout.scaling, enable_gqa=True)
        mixed.append(out[0].transpose(0, 1).flatten(1))
    x = x + F.linear(torch.cat(mixed), w.o_proj, w.o_bias)
    h = norm(x, w.before_mlp)
    y = x + F.linear(F.silu(F.linear(h, w.gate_proj)) * F.linear(h, w.up_proj), w.down_proj)
    return y if rows is None else y[rows]


def gradients(function: Any, name: str, dtype: torch.dtype, rows: Tensor | None) -> list[Tensor]:
    """What comes out, and the gradients of x and all weights."""
    hidden = SHAPES[name][0]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(TOKENS, hidden, generator=generator).to(dtype).requires_grad_()
    weights = LayerWeights(*(w if w is None else w.to(dtype).requires_grad_() for w in weights_of(name)))
    y = function(x, packed_of(name, dtype), weights, rows)
    grad = torch.randn(TOKENS, hidden, generator=generator).to(dtype)
    leaves = [x, *(w for w in weights if w is not None)]
    return [y.detach(), *torch.autograd.grad(y, leaves, grad if rows is None else grad[rows])]


def distance(x: Tensor, other: Tensor) -> float:
    """The root of the mean square: the largest of a hundred differences is too much of an accident."""
    return float((x.double() - other.double()).pow(2).mean().sqrt())


@pytest.mark.usefixtures("each_instruction_set")
@pytest.mark.parametrize("rows", [None, [3, 40, 7, 55, 20, 21, 22, 23, 24, 25], [11, 5, 11]], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_error_is_at_most_twice_pytorchs(name: str, rows: list[int] | None) -> None:
    chosen = None if rows is None else torch.tensor(rows)
    exact = gradients(by_pytorch, name, torch.float64, chosen)
    theirs = gradients(by_pytorch, name, torch.float32, chosen)
    mine = gradients(decoder_layer, name, torch.float32, chosen)
    assert len(mine) == len(exact)
    for i, (x, other, truth) in enumerate(zip(mine, theirs, exact, strict=True)):
        error, allowed = distance(x, truth), 2 * distance(other, truth) + 1e-6 * distance(truth, 0 * truth)
        assert error <= allowed, (i, error, allowed)


@pytest.mark.parametrize("name", SHAPES)
def test_the_same_bits_on_any_number_of_threads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Vendors' products do not promise that; the core's own do, and serve from 8 rows on.
    monkeypatch.setattr(backends.named("cpu"), "_multiplies", lambda *operands: True)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(gradients(decoder_layer, name, torch.float32, None))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_many_rows_are_shared_out_and_add_up() -> None:
    """More than one block of rows a thread, with a rest."""
    x, weight = torch.randn(3001, 96), torch.randn(96)
    grad = torch.randn_like(x)
    results = []
    for dtype, function in ((torch.float64, None), (torch.float32, rms_norm)):
        leaves = [x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()]
        if function is None:
            y = leaves[0] / (leaves[0].pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * leaves[1]
        else:
            y = function(*leaves, 1e-5)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, grad.to(dtype))])
    for truth, found in zip(*results, strict=True):
        assert torch.allclose(found.double(), truth, rtol=1e-5, atol=1e-5 * float(truth.abs().max()))


def test_large_numbers_do_not_overflow_in_the_gate() -> None:
    for gate in (-3e38, -1e3, -100.0, 100.0, 1e3):
        out = [torch.empty(1, 8) for _ in range(3)]
        g, ones = torch.full((1, 8), gate), torch.ones(1, 8)
        backends.native.gated_silu_backward(*map(to_dlpack, (g, ones, ones, *out)), 1)
        exact = g.double().requires_grad_()
        F.silu(exact).sum().backward()
        assert torch.allclose(out[0].double(), exact.grad, atol=1e-6)
        assert torch.allclose(out[2].double(), F.silu(g.double()), atol=1e-6 * max(1.0, gate))


def test_a_gate_that_has_diverged_shows() -> None:
    for gate in (-torch.inf, torch.nan):
        out, ones = [torch.empty(1, 8) for _ in range(3)], torch.ones(1, 8)
        g = torch.full((1, 8), gate)
        backends.native.gated_silu_backward(*map(to_dlpack, (g, ones, ones, *out)), 1)
        backends.native.gated_silu_forward(*map(to_dlpack, (g, ones, out[0])), 1)
        assert out[0].isnan().all() and out[2].isnan().all() and F.silu(g).isnan().all()


def test_rows_of_another_integer_type() -> None:
    weights, x, rows = weights_of("llama"), torch.randn(TOKENS, 32, requires_grad=True), torch.tensor([3, 3, 9])
    found = [decoder_layer(x, packed_of("llama"), weights, which) for which in (rows, rows.int())]
    assert torch.equal(*found)
    assert torch.equal(*(torch.autograd.grad(y.sum(), x)[0] for y in found))


def test_only_what_is_wanted_gets_gradients() -> None:
    weights = weights_of("qwen3")
    x = torch.randn(TOKENS, 24)
    leaves = LayerWeights(*(w if w is None else w.clone() for w in weights))
    assert leaves.k_norm is not None
    for leaf in (leaves.k_norm, leaves.down_proj):
        leaf.requires_grad_()
    decoder_layer(x, packed_of("qwen3"), leaves).sum().backward()
    have = {name for name, w in zip(leaves._fields, leaves, strict=True) if w is not None and w.grad is not None}
    assert have == {"k_norm", "down_proj"}
    assert not decoder_layer(x, packed_of("qwen3"), weights).requires_grad


@pytest.mark.parametrize("own", [True, False], ids=["own products", "the vendor's"])
def test_a_second_derivative_raises_and_a_changed_weight_too(own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.named("cpu"), "_multiplies", lambda *operands: own)
    weights = LayerWeights(*(w if w is None else w.requires_grad_() for w in weights_of("llama")))
    x = torch.randn(TOKENS, 32, requires_grad=True)
    (first,) = torch.autograd.grad(decoder_layer(x, packed_of("llama"), weights).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate"):
        first.sum().backward()
    (first,) = torch.autograd.grad(rms_norm(x, weights.before_mlp, 1e-5).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate"):
        first.sum().backward()
    y = decoder_layer(x, packed_of("llama"), weights).sum()
    with torch.no_grad():
        weights.up_proj.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_what_it_serves() -> None:
    plain = torch.ones(4, 4)
    assert serves(plain, None)
    assert not serves(plain, plain.double())
    assert not serves(plain.bfloat16())
    assert not serves(torch.ones(4, 6)[:, ::2])
    assert not serves(plain.to("meta"))
    with use_backend("torch"):
        assert not serves(plain)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not serves(plain)


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        ("norm_forward", [(3, 4), (5,), 1e-5, (3, 4)], "weight"),
        ("norm_forward", [(3, 4), (4,), 1e-5, (2, 4)], "out"),
        ("norm_backward", [(3, 4), (4,), 1e-5, (3, 5), None, (3, 4), None], "dy"),
        ("norm_backward", [(3, 4), (4,), 1e-5, (3, 4), (2, 4), (3, 4), None], "add"),
        ("norm_backward", [(3, 4), (4,), 1e-5, (3, 4), None, (3, 4), (3,)], "dweight"),
        ("gated_silu_forward", [(3, 4), (3, 5), (3, 4)], "up"),
        ("gated_silu_backward", [(3, 4), (3, 4), (4, 3), (3, 4), (3, 4), (3, 4)], "dy"),
        ("gated_silu_backward", [(3, 4), (3, 4), (3, 4), (3, 4), (3, 4), (3, 3)], "out"),
    ],
    ids=str,
)
def test_the_core_refuses_shapes_that_do_not_fit(function: str, arguments: list[Any], message: str) -> None:
    given = [to_dlpack(torch.zeros(a)) if isinstance(a, tuple) else a for a in arguments]
    with pytest.raises(ValueError, match=message):
        getattr(backends.native, function)(*given, 1)


@pytest.mark.parametrize(
    ("size", "cos", "sin", "message"),
    [
        (4, (2, 4), (3, 4), "cos"), (4, (3, 4), (3, 2), "sin"), (4, (3, 4), None, "cos and sin go together"),
        (1, (3, 1), (3, 1), "an even size"),
    ],
)  # fmt: skip
def test_the_core_refuses_rotations_that_do_not_fit(
    size: int, cos: tuple[int, int], sin: tuple[int, int] | None, message: str
) -> None:
    q, k, cu_seqlens = torch.zeros(3, 8), torch.zeros(3, 4), torch.tensor([0, 3])
    angles = [None if shape is None else to_dlpack(torch.zeros(shape)) for shape in (cos, sin)]
    results = map(to_dlpack, (torch.zeros(3, 8), torch.zeros(3, 8 // size)))
    with pytest.raises(ValueError, match=message):
        backends.native.attention_forward(*map(to_dlpack, (q, k, k, cu_seqlens)), size, 1.0, *angles, *results, 1)


def test_attention_is_that_of_the_operation() -> None:
    q, k = torch.randn(TOKENS, 4, 8), torch.randn(TOKENS, 2, 8)
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0)
    assert torch.equal(
        attention.attend(q, k, k, cu_seqlens, 0.3)[0], attention.packed_attention(q, k, k, cu_seqlens, 0.3)
    )
