"""What this machine can do at most, with PyTorch alone: products, and moving memory. Fractions are of these."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch


def test_products(benchmark: Any, keep: Callable[..., None]) -> None:
    """A product large enough to be at the machine's rate, float32."""
    n = 2048
    a, b, out = torch.randn(n, n), torch.randn(n, n), torch.empty(n, n)
    benchmark.pedantic(lambda: torch.mm(a, b, out=out), rounds=11, warmup_rounds=2)
    seconds = list(benchmark.stats.stats.data)
    rate = 2 * n**3 / benchmark.stats.stats.median
    keep_limit(keep, "float32 products", seconds, {"GFLOP a second": rate / 1e9})


@pytest.mark.parametrize("where, mib", [("memory", 512), ("cache", 8)])
def test_copying(benchmark: Any, keep: Callable[..., None], where: str, mib: int) -> None:
    """Bytes read and written a second."""
    a = torch.randn(mib * 2**18)
    b = torch.empty_like(a)
    benchmark.pedantic(lambda: b.copy_(a), rounds=15, warmup_rounds=2)
    rate = 2 * a.nbytes / benchmark.stats.stats.median
    keep_limit(keep, f"copying in {where}", list(benchmark.stats.stats.data), {"GB a second": rate / 1e9})


def test_copying_into_new_memory(benchmark: Any, keep: Callable[..., None]) -> None:
    """Bytes read and written a second where the result is a new tensor: the system clears its pages first."""
    a = torch.randn(512, 32000)
    benchmark.pedantic(lambda: a.clone(), rounds=15, warmup_rounds=2)
    rate = 2 * a.nbytes / benchmark.stats.stats.median
    keep_limit(keep, "copying into new memory", list(benchmark.stats.stats.data), {"GB a second": rate / 1e9})


def test_reading(benchmark: Any, keep: Callable[..., None]) -> None:
    """Bytes read a second: a vector's product with itself. A matrix times a vector is PyTorch's slower way to read."""
    a = torch.randn(2**27)
    benchmark.pedantic(lambda: torch.dot(a, a), rounds=15, warmup_rounds=2)
    rate = a.nbytes / benchmark.stats.stats.median
    keep_limit(keep, "reading from memory", list(benchmark.stats.stats.data), {"GB a second": rate / 1e9})


def keep_limit(keep: Callable[..., None], name: str, seconds: list[float], figures: dict[str, float]) -> None:
    sides = {"torch": {"role": "limit", "seconds": seconds, "figures": figures}}
    keep(name, {"group": "limits", "sides": sides}, f"\n    {figures}")
