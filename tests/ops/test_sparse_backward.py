"""gradient_threshold: blocks of the vocabulary without much gradient are left out of the products, at what error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ops_cases import BACKENDS

from bandit_rft import PolicyObjective, linear_policy_loss
from bandit_rft.ops import head, use_backend

N, H, V = 60, 64, 1000


def peaked() -> dict[str, Any]:
    """A head that gives all probability to 90 tokens, which lie in three of its eight blocks."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(V, H, generator=generator)
    likely = torch.cat([torch.arange(40), torch.arange(300, 340), torch.arange(990, 1000)])
    targets = likely[torch.randint(len(likely), (N,), generator=generator)]
    weight[:, 0] = -1
    weight[likely, 0] = 1
    hidden = weight[targets] * 0.1
    hidden[:, 0] = 6
    return {"hidden": hidden, "weight": weight, "targets": targets}


def gradients(
    dtype: torch.dtype = torch.float32, into: bool = False, size: float = 1.0, **options: Any
) -> tuple[torch.Tensor, ...]:
    case = peaked()
    hidden, weight = (case[k].to(dtype).requires_grad_() for k in ("hidden", "weight"))
    bounds = torch.tensor([0, 20, 45, N], dtype=torch.int32)
    buffer = torch.ones(V, H) if into else None
    result = linear_policy_loss(
        hidden, weight, case["targets"], torch.tensor([1.0, 0.0, -0.5]) * size, bounds, objective=PolicyObjective(),
        weight_grad=buffer, **options,
    )  # fmt: skip
    result.loss.backward()
    of_weight = weight.grad if buffer is None else buffer - 1
    assert hidden.grad is not None and of_weight is not None
    return result.loss.detach(), hidden.grad, of_weight


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("into", [False, True], ids=["own", "weight_grad"])
def test_error_is_below_the_threshold(backend: str, into: bool) -> None:
    threshold, largest = 2.0**-10, 1.0 / N  # of |advantage x weight|: 1 / N with token-mean
    with use_backend(backend):
        exact = gradients(into=into)
        sparse = gradients(into=into, gradient_threshold=threshold)
    assert torch.equal(exact[0], sparse[0]), "the loss is exact"
    case = peaked()
    left_out = (sparse[2] == 0).all(1)
    assert 0.5 <= left_out.float().mean() < 1, "most of this vocabulary is left out"
    # Each entry that is left out is below threshold * largest; it would have been multiplied by hidden or weight.
    bound = threshold * largest * case["hidden"].abs().sum(0)
    assert ((exact[2] - sparse[2]).abs() <= bound + 1e-7).all()
    bound = threshold * largest * case["weight"][left_out].abs().sum(0)
    assert ((exact[1] - sparse[1]).abs() <= bound + 1e-7).all()
    assert into or not torch.equal(exact[2], sparse[2])  # beside a buffer of ones, what is left out is rounded away


def test_off_by_default_and_without_effect_where_every_block_counts() -> None:
    exact = gradients()
    for threshold in (0.0, 1e-30):
        assert all(torch.equal(a, b) for a, b in zip(exact, gradients(gradient_threshold=threshold), strict=True))


def test_bfloat16() -> None:
    exact, sparse = gradients(torch.bfloat16), gradients(torch.bfloat16, gradient_threshold=2.0**-10)
    for a, b in zip(exact, sparse, strict=True):
        assert (a - b).float().norm() <= 0.01 * a.float().norm()


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_float16_products_leave_out_the_same_blocks(size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """dL/dlogits comes multiplied by a power of two for them, and so must the threshold."""
    taken, choose = list[list[int]](), head.columns_that_count

    def chosen(dz: torch.Tensor, floor: float) -> torch.Tensor | None:
        columns = choose(dz, floor)
        taken.append([] if columns is None else columns.tolist())
        return columns

    monkeypatch.setattr(head, "columns_that_count", chosen)
    gradients(size=size, gradient_threshold=2.0**-10)
    monkeypatch.setattr(head, "widens", lambda tensor: False)
    head.takes_out_dtype.cache_clear()
    exact, sparse = (gradients(torch.float16, size=size, gradient_threshold=of) for of in (0.0, 2.0**-10))
    head.takes_out_dtype.cache_clear()
    in_float32, in_float16 = taken
    assert in_float32 == in_float16 and 0 < len(in_float32) <= V / 2
    for a, b in zip(exact[1:], sparse[1:], strict=True):
        assert (a - b).float().norm() <= 0.01 * a.float().norm()


def test_nan_is_not_left_out() -> None:
    dz = torch.zeros(3, 1000)
    dz[1, 700] = float("nan")
    columns = head.columns_that_count(dz, 1e-3)
    assert columns is not None and columns.tolist() == list(range(640, 768))


def test_blocks() -> None:
    dz = torch.zeros(2, 300)
    dz[0, 299], dz[1, 5] = -0.5, 0.5
    columns = head.columns_that_count(dz, 0.5)
    assert columns is None, "two blocks of three: the whole product is cheaper"
    dz[1, 5] = 0.4
    columns = head.columns_that_count(dz, 0.5)
    assert columns is not None and columns.tolist() == list(range(256, 300))


@pytest.mark.parametrize("value", [-0.1, 1.0, "0", None])
def test_impossible_thresholds(value: Any) -> None:
    with pytest.raises(ValueError, match="gradient_threshold must be a number >= 0 and < 1"):
        gradients(gradient_threshold=value)
