"""Packed attention in the compiled core: against float64, the same bits on any number of threads, and in the policy."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny_models import tiny_llama
from torch import Tensor

from bandit_rft.model import Policy
from bandit_rft.ops import attention

SHAPES = [  # lengths, query heads, key and value heads, head size
    ([47] * 8, 8, 4, 16),
    ([1, 5, 33, 64, 65, 2, 100], 4, 4, 16),
    ([40, 7], 6, 2, 64),
    ([70, 1], 3, 1, 40),
    ([3, 31, 32, 33], 2, 1, 6),
    ([129], 2, 2, 1),
]


def inputs(lengths: list[int], heads: int, key_value_heads: int, size: int) -> tuple[list[Tensor], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths) + size)
    shapes = [(sum(lengths), n, size) for n in (heads, key_value_heads, key_value_heads, heads)]
    *qkv, grad = (torch.randn(shape, generator=generator) for shape in shapes)
    return qkv, grad, torch.tensor([0, *lengths]).cumsum(0)


def ours(qkv: list[Tensor], grad: Tensor, cu_seqlens: Tensor, scaling: float) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in qkv]
    out = attention.packed_attention(*leaves, cu_seqlens, scaling)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def reference(qkv: list[Tensor], grad: Tensor, cu_seqlens: Tensor, scaling: float, dtype: torch.dtype) -> list[Tensor]:
    """One sequence at a time, by PyTorch."""
    leaves = [x.to(dtype).requires_grad_() for x in qkv]
    outs = []
    for begin, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        q, k, v = (x[begin:end].transpose(0, 1)[None] for x in leaves)
        outs.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)[0])
    out = torch.cat([x.transpose(0, 1) for x in outs])
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]


@pytest.mark.usefixtures("each_instruction_set")
@pytest.mark.parametrize("shape", SHAPES)
def test_error_is_at_most_twice_pytorchs(shape: tuple[list[int], int, int, int]) -> None:
    qkv, grad, cu_seqlens = inputs(*shape)
    exact = reference(qkv, grad, cu_seqlens, 0.3, torch.float64)
    theirs = reference(qkv, grad, cu_seqlens, 0.3, torch.float32)
    mine = ours(qkv, grad, cu_seqlens, 0.3)
    for name, x, other, truth in zip(["out", "dq", "dk", "dv"], mine, theirs, exact, strict=True):
        error, allowed = float((x - truth).abs().max()), 2 * float((other - truth).abs().max()) + 1e-6
        assert error <= allowed, name


@pytest.mark.usefixtures("each_instruction_set")
def test_large_scores_neither_overflow_nor_lose_the_softmax() -> None:
    qkv, grad, cu_seqlens = inputs([50, 20], 2, 1, 16)
    qkv[0] *= 300
    exact = reference(qkv, grad, cu_seqlens, 1.0, torch.float64)
    for mine, truth in zip(ours(qkv, grad, cu_seqlens, 1.0), exact, strict=True):
        torch.testing.assert_close(mine.double(), truth, atol=2e-3 * float(truth.abs().max()), rtol=0)


def test_bits_depend_on_the_sequence_alone() -> None:
    lengths = [47, 3, 64, 90, 33, 16] * 6
    qkv, grad, cu_seqlens = inputs(lengths, 8, 2, 16)
    default = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = ours(qkv, grad, cu_seqlens, 0.25)
        torch.set_num_threads(3)
        three = ours(qkv, grad, cu_seqlens, 0.25)
    finally:
        torch.set_num_threads(default)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))
    begin, end = int(cu_seqlens[9]), int(cu_seqlens[10])
    alone = ours([x[begin:end] for x in qkv], grad[begin:end], torch.tensor([0, end - begin]), 0.25)
    assert all(torch.equal(a, b[begin:end]) for a, b in zip(alone, one, strict=True))


def test_empty_sequences_and_no_tokens() -> None:
    qkv, grad, _ = inputs([4, 3], 2, 1, 8)
    with_empty = ours(qkv, grad, torch.tensor([0, 0, 4, 4, 7, 7]), 1.0)
    assert all(
        torch.equal(a, b) for a, b in zip(with_empty, ours(qkv, grad, torch.tensor([0, 4, 7]), 1.0), strict=True)
    )
    none = [x[:0] for x in qkv]
    assert ours(none, grad[:0], torch.tensor([0]), 1.0)[0].shape == (0, 2, 8)


def test_bad_input_is_refused() -> None:
    (q, k, v), _, _ = inputs([4, 3], 4, 2, 8)
    for cu_seqlens, message in (
        (torch.tensor([0, 4, 8]), "end with T"), (torch.tensor([1, 4, 7]), "begin with 0"),
        (torch.tensor([0, 5, 4, 7]), "not decrease"), (torch.tensor([0, 7], dtype=torch.int32), "int64"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            attention.packed_attention(q, k, v, cu_seqlens, 1.0)
    whole = torch.tensor([0, 7])
    with pytest.raises(ValueError, match="a multiple of key's"):
        attention.packed_attention(q[:, :3], k, v, whole, 1.0)
    with pytest.raises(ValueError, match="key must be a contiguous float32"):
        attention.packed_attention(q, k[:5], v[:5], whole, 1.0)


def test_policy_attends_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    packed_attention = attention.packed_attention

    def counted(*args: Tensor | float) -> Tensor:
        calls.append(len(args[0]))
        return packed_attention(*args)

    monkeypatch.setattr(attention, "packed_attention", counted)
    policy = Policy(tiny_llama())
    policy._in_core = None  # by its modules, as most models are computed
    calls.clear()
    ids, lengths = torch.randint(0, policy.vocab_size, (21,)), [9, 1, 11]
    native = policy.hidden_states(ids, lengths)
    assert calls == [21] * policy.model.config.num_hidden_layers
    monkeypatch.setenv("BANDIT_RFT_BACKEND", "torch")
    plain = policy.hidden_states(ids, lengths)
    assert len(calls) == policy.model.config.num_hidden_layers
    torch.testing.assert_close(native, plain, atol=1e-5, rtol=1e-5)
    weights = policy.parameters()
    grads = [torch.autograd.grad(h.pow(2).sum(), weights, allow_unused=True) for h in (native, plain)]
    for mine, theirs in zip(*grads, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-3)
