"""Every argument of every operation as a view: what the tests of strides hold each backend to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from ops_cases import OBJECTIVES
from torch import Tensor

from bandit_rft import (
    linear_logprobs,
    linear_policy_loss,
    linear_sample,
    logprobs_from_logits,
    policy_loss_from_logits,
    sample_from_logits,
)

N, H, V, B = 6, 8, 70, 2
LOSS = {"objective": OBJECTIVES["ppo-kl3-entropy"]}
TOKENS = ("targets", "advantages", "cu_seqlens", "behavior_logprobs", "reference_logprobs", "temperature")
STREAM = ("seed", "sequence_ids", "positions")
OPERATIONS: dict[str, tuple[Any, dict[str, Any], tuple[str, ...]]] = {
    "linear_logprobs": (linear_logprobs, {"return_entropy": True}, ("hidden", "weight", "bias", *TOKENS[::5])),
    "logprobs_from_logits": (logprobs_from_logits, {"return_entropy": True}, ("logits", *TOKENS[::5])),
    "linear_sample": (linear_sample, {}, ("hidden", "weight", "bias", *STREAM, "temperature")),
    "linear_sample, filtered": (linear_sample, {"top_k": 9, "top_p": 0.9}, ("hidden", "weight", *STREAM)),
    "sample_from_logits": (sample_from_logits, {}, ("logits", *STREAM, "temperature")),
    "linear_policy_loss": (
        linear_policy_loss, LOSS, ("hidden", "weight", "bias", *TOKENS, "normalizer", "weight_grad"),
    ),
    "linear_policy_loss, gspo": (
        linear_policy_loss, {"objective": OBJECTIVES["gspo-entropy"]}, ("hidden", "weight", *TOKENS[:4]),
    ),
    "policy_loss_from_logits": (policy_loss_from_logits, LOSS, ("logits", *TOKENS, "normalizer")),
}  # fmt: skip


def values(device: str = "cpu") -> dict[str, Tensor]:
    """Every argument, contiguous."""
    g = torch.Generator().manual_seed(1)
    made = {
        "hidden": torch.randn(N, H, generator=g), "weight": torch.randn(V, H, generator=g),
        "bias": torch.randn(V, generator=g), "logits": torch.randn(N, V, generator=g),
        "temperature": torch.rand(N, generator=g) + 0.5, "advantages": torch.randn(B, generator=g),
        "behavior_logprobs": -torch.rand(N, generator=g) - 3, "reference_logprobs": -torch.rand(N, generator=g) - 3,
    }  # fmt: skip
    made |= {
        "targets": torch.randint(V, (N,), generator=g), "seed": torch.tensor(5), "sequence_ids": torch.arange(N) + 3,
        "positions": torch.arange(N) * 2, "cu_seqlens": torch.tensor([0, 2, N], dtype=torch.int32),
        "normalizer": torch.tensor(4.0), "weight_grad": torch.ones(V, H),
    }  # fmt: skip
    return {name: tensor.to(device) for name, tensor in made.items()}


def views_of(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The same values behind other strides and offsets; what lies between them is -7, which no argument may be."""
    flat = torch.full((tensor.numel() + 5,), -7, dtype=tensor.dtype, device=tensor.device)
    yield "offset", flat[3 : 3 + tensor.numel()].view(tensor.shape).copy_(tensor)
    if tensor.dim():
        between = torch.full((*tensor.shape, 2), -7, dtype=tensor.dtype, device=tensor.device)
        between[..., 1] = tensor
        yield "strided", between[..., 1]
    if tensor.dim() == 2:
        yield "transposed", tensor.T.contiguous().T
        padded = torch.full((tensor.shape[0], tensor.shape[1] + 3), -7, dtype=tensor.dtype, device=tensor.device)
        padded[:, 1:-2] = tensor
        yield "padded", padded[:, 1:-2]


def run(operation: str, arguments: dict[str, Tensor]) -> list[Tensor]:
    """Results, and the gradients of what can have one."""
    function, options, _ = OPERATIONS[operation]
    learned = [k for k in ("hidden", "weight", "bias", "logits") if k in arguments and "sample" not in operation]
    given = {k: t.detach().requires_grad_(k in learned) for k, t in arguments.items()}
    results = function(**given, **options)
    if "loss" in operation:
        results.loss.backward()
        found = [results.loss, results.logprobs, *results.stats.values()]
    else:
        found = list(results)
        if learned:
            (found[0].sum() + (found[1] * found[1]).sum()).backward()
    found += [arguments["weight_grad"]] if "weight_grad" in arguments else []
    return [*found, *(given[k].grad for k in learned if given[k].grad is not None)]


def check_any_strides(operation: str, device: str = "cpu") -> None:
    """The same results and gradients whatever the strides and offset of each argument, on the backend in force."""
    names = OPERATIONS[operation][2]
    for name in names:
        original = values(device)
        for how, view in views_of(name, original[name]):
            assert torch.equal(view, original[name])
            want = run(operation, {k: values(device)[k] for k in names})
            got = run(operation, {k: view if k == name else values(device)[k] for k in names})
            for w, g in zip(want, got, strict=True):
                torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-6, msg=lambda m, h=how, n=name: f"{n}, {h}: {m}")


def check_expanded(operation: str, device: str = "cpu") -> None:
    """One row (or one number) that stands for all of them; a weight_grad, which is written to, is refused."""
    names = OPERATIONS[operation][2]
    for name in names:
        one = values(device)[name]
        if one.dim() == 0 or name in ("cu_seqlens", "weight_grad"):
            continue
        expanded = one[:1].expand(one.shape)
        want = run(operation, {k: expanded.clone() if k == name else values(device)[k] for k in names})
        got = run(operation, {k: expanded if k == name else values(device)[k] for k in names})
        for w, g in zip(want, got, strict=True):
            # Equal rows cancel in a gradient; a product may sum in another order where rows lie elsewhere.
            torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
