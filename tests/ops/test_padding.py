"""pack and unpack: padded rectangles as the operations take them, and back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bandit_rft import PolicyObjective, linear_policy_loss, pack, unpack

MASK = torch.tensor([[1, 1, 0, 1], [0, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1]])


@pytest.mark.parametrize("mask", [MASK, MASK.bool(), MASK.float()], ids=["int", "bool", "float"])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
def test_there_and_back(mask: Tensor, shape: tuple[int, ...]) -> None:
    padded = torch.randn(4, 4, *shape)
    values, cu_seqlens = pack(padded, mask)
    assert cu_seqlens.dtype == torch.int32 and cu_seqlens.tolist() == [0, 3, 5, 5, 9]
    rows = [padded[b, t] for b in range(4) for t in range(4) if MASK[b, t]]
    assert torch.equal(values, torch.stack(rows))
    back = unpack(values, mask, fill=-7.0)
    keep = MASK.bool()
    assert torch.equal(back[keep], padded[keep]) and bool((back[~keep] == -7).all())


def test_gradients_go_through_both() -> None:
    hidden = torch.randn(4, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: unpack(pack(x, MASK).values.sin(), MASK), hidden)
    pack(hidden, MASK).values.sum().backward()
    assert hidden.grad is not None and torch.equal(hidden.grad[..., 0], MASK.double())


def test_integers_and_empty_batches() -> None:
    ids = torch.arange(16).view(4, 4)
    assert unpack(pack(ids, MASK).values, MASK, fill=-100).tolist()[1] == [-100, -100, 6, 7]
    values, cu_seqlens = pack(torch.zeros(0, 4), torch.zeros(0, 4))
    assert values.shape == (0,) and cu_seqlens.tolist() == [0] and unpack(values, torch.zeros(0, 4)).shape == (0, 4)


def test_a_padded_loss_is_the_sum_over_the_mask() -> None:
    """The loss that a padded trainer writes by hand: mean over the tokens that count."""
    hidden, weight = torch.randn(4, 4, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    targets, advantages = torch.randint(11, (4, 4)), torch.randn(4)
    logp = (hidden @ weight.T).log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    plain = -(advantages[:, None] * logp * MASK).sum() / MASK.sum()
    want = torch.autograd.grad(plain, [hidden, weight])
    packed, cu_seqlens = pack(hidden, MASK)
    result = linear_policy_loss(
        packed, weight, pack(targets, MASK).values, advantages, cu_seqlens, objective=PolicyObjective("reinforce")
    )
    result.loss.backward()
    torch.testing.assert_close(result.loss, plain)
    for got, expected in zip((hidden.grad, weight.grad), want, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(unpack(result.logprobs, MASK), logp.detach() * MASK)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: pack(torch.zeros(4, 3), MASK), ValueError, r"padded must be .* with .* = \[4, 4\] .*\[4, 3\]"),
        (lambda: pack(torch.zeros(4), MASK), ValueError, r"padded must be .*got \[4\]"),
        (lambda: pack([[1]], MASK), TypeError, r"padded must be a torch.Tensor \[B, L, ...\]; got list"),
        (lambda: pack(torch.zeros(4), torch.ones(4)), ValueError, r"mask must be \[B, L\]; got shape \[4\]"),
        (lambda: pack(torch.zeros(4, 4), torch.full((4, 4), 0.5)), ValueError, "mask must be bool, or 0 and 1"),
        (lambda: pack(torch.zeros(4, 4), None), TypeError, r"mask must be a torch.Tensor \[B, L\]; got NoneType"),
        (lambda: unpack(torch.zeros(8), MASK), ValueError, r"values must be \[N, ...\] with N = 9, .*got \[8\]"),
        (lambda: unpack(1.0, MASK), TypeError, r"values must be a torch.Tensor \[N, ...\]; got 1.0"),
    ],
)  # fmt: skip
def test_messages(call: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()
