"""The products around the rows: every way that a torch may have, and float16 gradients that do not underflow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ops_cases import OBJECTIVES, Case

from bandit_rft import PolicyObjective, linear_logprobs, linear_policy_loss
from bandit_rft.ops import head, reference

WAYS = {
    "mm and addmm": {"mm", "addmm"},
    "mm alone, as in torch 2.8 and 2.9": {"mm"},
    "neither": set(),
}


@pytest.fixture(params=WAYS)
def way(request: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """A torch that multiplies 16 bits into float32 by these functions; they are emulated, since no CPU has them."""
    usable = WAYS[request.param]
    mm, addmm = torch.mm, torch.addmm

    def wide_mm(a: Any, b: Any, *, out_dtype: Any = None, out: Any = None) -> Any:
        if out_dtype is None:
            return mm(a, b, out=out)
        if "mm" not in usable:
            raise RuntimeError("out_dtype is not supported")
        return mm(a.to(out_dtype), b.to(out_dtype), out=out)

    def wide_addmm(c: Any, a: Any, b: Any, *, out_dtype: Any = None, out: Any = None) -> Any:
        if "addmm" not in usable:
            raise RuntimeError("self and mat2 must have the same dtype")
        return addmm(c, a.to(out_dtype), b.to(out_dtype), out=out)

    monkeypatch.setattr(torch, "mm", wide_mm)
    monkeypatch.setattr(torch, "addmm", wide_addmm)
    monkeypatch.setattr(head, "widens", lambda tensor: False)
    monkeypatch.setattr(head, "_TILE_BYTES", 4 * 40 * 7)  # several tiles, the last one smaller
    head.takes_out_dtype.cache_clear()
    yield request.param
    head.takes_out_dtype.cache_clear()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_products_accumulate_in_float32(way: str, dtype: torch.dtype) -> None:
    n, h, v = 40, 24, 33
    hidden, weight = torch.randn(n, h).to(dtype), torch.randn(v, h).to(dtype)
    dz = torch.randn(n, v).to(dtype).float()
    z = head.logits(hidden, weight, None, torch.empty(n, v))
    torch.testing.assert_close(z.double(), hidden.double() @ weight.double().T, rtol=1e-5, atol=1e-5)
    out = torch.full((v, h), 100.0)
    exact = dz.double().T @ hidden.double()
    head.add_weight_gradient(dz, hidden, out, accumulate=True)
    torch.testing.assert_close(out.double(), 100 + exact, rtol=1e-6, atol=1e-5)
    head.add_weight_gradient(dz, hidden, out, accumulate=False)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_a_cpu_computes_logits_in_tiles_of_columns(dtype: torch.dtype) -> None:
    """The last tile is narrower, of one column here; what lies in the workspace before does not matter, NaN least."""
    n, h = 600, 8
    v = 2 * head.columns_a_tile(n) + 1
    hidden, weight = torch.randn(2 * n, h)[::2].to(dtype), torch.randn(v, h + 3)[:, :h].to(dtype)
    out = torch.full((n + 1, v), torch.nan, dtype=reference.computing_dtype(hidden))
    z = head.logits(hidden, weight, None, out)
    assert z.shape == (n, v) and z.data_ptr() == out.data_ptr() and out[n].isnan().all()
    torch.testing.assert_close(z.double(), hidden.double() @ weight.double().T, rtol=1e-5, atol=1e-5)


def gradients(case: Case, scale: float, objective: PolicyObjective, weight_grad: bool = False) -> list[torch.Tensor]:
    """Of a loss that is scaled before its backward, as a GradScaler does."""
    hidden, weight = case.leaves()
    buffer = torch.ones(weight.shape) if weight_grad else None
    result = linear_policy_loss(
        hidden, weight, case.targets, case.advantages, case.cu_seqlens, objective=objective,
        behavior_logprobs=case.behavior, reference_logprobs=case.reference, normalizer=1e7, weight_grad=buffer,
    )  # fmt: skip
    (result.loss * scale).backward()
    return [hidden.grad, weight.grad if buffer is None else buffer]


def exact_gradients(case: Case, scale: float, objective: PolicyObjective) -> list[torch.Tensor]:
    leaves = case.leaves(torch.float64)
    logp, entropy = reference.linear_logprobs(*leaves, case.targets)
    loss, _ = reference.policy_loss(
        logp, entropy, case.advantages, case.cu_seqlens, objective=objective, behavior_logprobs=case.behavior.double(),
        reference_logprobs=case.reference.double(), normalizer=1e7,
    )  # fmt: skip
    return list(torch.autograd.grad(loss * scale, leaves))


def assert_near(got: torch.Tensor, want: torch.Tensor, share: float) -> None:
    error = (got.double() - want).norm() / want.norm()
    assert error <= share, f"relative error {error:.3g}"


@pytest.mark.parametrize("name", ["reinforce", "ppo-kl3-entropy", "gspo-entropy"])
def test_float16_gradients_of_a_scaled_loss(name: str) -> None:
    """1 / 1e7 times a probability is below float16's smallest number: rounding before the scale left mostly zeros."""
    case = Case.make(30, 16, 200, dtype=torch.float16)
    want = exact_gradients(case, 2.0**20, OBJECTIVES[name])
    for g, w in zip(gradients(case, 2.0**20, OBJECTIVES[name]), want, strict=True):
        assert g.dtype == torch.float16
        assert_near(g, w, 1e-3)


@pytest.mark.parametrize("name", ["reinforce", "ppo-kl3-entropy", "gspo-entropy"])
def test_float16_products_of_small_gradients(name: str, way: str) -> None:
    """Where products take dL/dlogits in float16 (a GPU), it is magnified for them: exactly, by a power of two."""
    case = Case.make(30, 16, 200, dtype=torch.float16)
    want = exact_gradients(case, 2.0**20, OBJECTIVES[name])
    for g, w in zip(gradients(case, 2.0**20, OBJECTIVES[name]), want, strict=True):
        assert_near(g, w, 4e-3)
    _, buffer = gradients(case, 1.0, OBJECTIVES[name], weight_grad=True)
    want_buffer = exact_gradients(case, 1.0, OBJECTIVES[name])[1]
    assert torch.isfinite(buffer).all() and (buffer.double() - 1 - want_buffer).abs().max() <= 2e-7


def test_float16_backward_of_logprobs(way: str) -> None:
    case = Case.make(30, 16, 200, dtype=torch.float16)
    pull = torch.randn(2, 30) * 1e-6
    hidden, weight = case.leaves()
    logp, entropy = linear_logprobs(hidden, weight, case.targets, return_entropy=True)
    scaled = (2.0**10 * (pull[0] * logp + pull[1] * entropy)).sum()
    scaled.backward()
    exact = case.leaves(torch.float64)
    t_logp, t_entropy = reference.linear_logprobs(*exact, case.targets)
    (2.0**10 * (pull[0] * t_logp + pull[1] * t_entropy)).sum().backward()
    for g, w in zip((hidden.grad, weight.grad), (exact[0].grad, exact[1].grad), strict=True):
        assert_near(g, w, 1e-2)
