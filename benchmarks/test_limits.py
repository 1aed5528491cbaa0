"""What this machine can do at most: multiply-adds, PyTorch's products, and moving memory. Fractions are of these."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch


def test_multiply_adds(tmp_path: Path, benchmark: Any, keep: Callable[..., None]) -> None:
    """From registers alone, by a program compiled for this processor: no product is faster, whoever wrote it."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    source, program = Path(__file__).parent / "comparison" / "multiply_adds.cpp", tmp_path / "multiply_adds"
    subprocess.run([compiler, "-O3", "-march=native", "-pthread", "-o", program, source], check=True)
    command = [program, str(torch.get_num_threads())]
    done = benchmark.pedantic(lambda: subprocess.run(command, capture_output=True, text=True, check=True))
    rounds = [line.split() for line in done.stdout.splitlines()]
    seconds = [float(taken) for taken, _ in rounds]
    rate = 2 * float(rounds[0][1]) / statistics.median(seconds)
    keep_limit(keep, "float32 multiply-adds", seconds, {"GFLOP a second": rate / 1e9})


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


@pytest.mark.parametrize("where, mib", [("memory", 512), ("cache", 8)])
def test_reading(benchmark: Any, keep: Callable[..., None], where: str, mib: int) -> None:
    """Bytes read a second: a vector's product with itself. A matrix times a vector is PyTorch's slower way to read."""
    a = torch.randn(mib * 2**18)
    benchmark.pedantic(lambda: torch.dot(a, a), rounds=15, warmup_rounds=2)
    rate = a.nbytes / benchmark.stats.stats.median
    keep_limit(keep, f"reading from {where}", list(benchmark.stats.stats.data), {"GB a second": rate / 1e9})


def keep_limit(keep: Callable[..., None], name: str, seconds: list[float], figures: dict[str, float]) -> None:
    sides = {"torch": {"role": "limit", "seconds": seconds, "figures": figures}}
    keep(name, {"group": "limits", "sides": sides}, f"\n    {figures}")
