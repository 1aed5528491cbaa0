"""The CUDA sources compile for sm_80, 90 and 100 without a GPU, and no row kernel spills; skipped where nvcc is not."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from paths import ROOT

from bandit_rft.ops import backends

pytestmark = pytest.mark.slow  # nvcc


def tool(name: str) -> ModuleType:
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.pop(0)


@pytest.fixture(scope="module")
def nvcc() -> Path:
    try:
        found: Path = tool("build_wheels").find_nvcc()
    except SystemExit as message:
        pytest.skip(str(message))
    return found


def test_kernels_compile_without_spills(nvcc: Path) -> None:
    check = tool("check_cuda")
    kernels = check.every_kernel(nvcc)
    names = {kernel.name for kernel in kernels}
    types = ("F32", "Bf16", "F16")
    expected = {f"score<{t}>" for t in types} | {f"sample<{t}, {how}>" for t in types for how in ("whole", "filtered")}
    expected |= {f"differentiate<{a}, {b}>" for a, b in (*zip(types, types, strict=True), types[:2], types[::2])}
    assert names == expected
    assert len(kernels) == len(expected) * len(check.ARCHITECTURES)
    spilling = [kernel for kernel in kernels if kernel.spilled]
    assert spilling == []
    # Two blocks of 512 threads share a multiprocessor's 65,536 registers; the filters settle for one.
    assert all(k.registers <= (128 if "filtered" in k.name else 64) for k in kernels)


def test_recorded_registers(nvcc: Path) -> None:
    """docs/building.md shows what this compiler gives; another release may give other numbers."""
    check = tool("check_cuda")
    text = (ROOT / "docs" / "building.md").read_text()
    if f"nvcc {check.release(nvcc)}" not in text:
        pytest.skip(f"docs/building.md records another nvcc than {check.release(nvcc)}")
    assert check.table(check.every_kernel(nvcc)) in text


def test_local_version(monkeypatch: pytest.MonkeyPatch) -> None:
    version = tool("local_version").dynamic_metadata
    monkeypatch.delenv("BANDIT_RFT_LOCAL_VERSION", raising=False)
    assert version("version", {"base": "1.2.3"}) == "1.2.3"
    monkeypatch.setenv("BANDIT_RFT_LOCAL_VERSION", "cu130")
    assert version("version", {"base": "1.2.3"}) == "1.2.3+cu130"
    monkeypatch.setenv("BANDIT_RFT_LOCAL_VERSION", "CU 13")
    with pytest.raises(ValueError, match="BANDIT_RFT_LOCAL_VERSION must be"):
        version("version", {"base": "1.2.3"})


class FakeCuda:
    version, architectures = "13.0", "80, 90, 100"

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def refusal(self, device: int) -> str:
        return self.reason


class FakeNative:
    version = "0.1.0+cu130"

    def __init__(self, cuda: FakeCuda | None) -> None:
        if cuda is not None:
            self.cuda = cuda


@pytest.mark.parametrize(
    "native, said",
    [
        (FakeNative(None), "was built without CUDA"),
        (FakeNative(FakeCuda("these kernels need a driver for CUDA 13.0")), "need a driver for CUDA 13.0"),
        (None, "is not installed"),
    ],
    ids=["cpu-wheel", "old-driver", "no-module"],
)
def test_mismatch_is_told_once_and_goes_on(native: Any, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "native", native)
    monkeypatch.setattr(backends, "_told", False)
    monkeypatch.delenv("BANDIT_RFT_BACKEND", raising=False)
    monkeypatch.setattr(backends.kernels, "refusal", lambda *call: "Triton is not installed")
    backends._cuda_module_refusal.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match=said) as caught:
            for _ in range(2):
                assert backends.select(torch.device("cuda", 0), torch.float32) == "torch"
        assert len(caught) == 1
        with pytest.raises(ValueError, match=said), backends.use_backend("cuda"):
            backends.select(torch.device("cuda", 0), torch.float32)
    finally:
        backends._cuda_module_refusal.cache_clear()


def test_cuda_serves_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "native", FakeNative(FakeCuda("")))
    monkeypatch.delenv("BANDIT_RFT_BACKEND", raising=False)
    monkeypatch.setattr(backends.kernels, "refusal", lambda *call: "Triton is not installed")
    backends._cuda_module_refusal.cache_clear()
    try:
        for dtype, name in ((torch.float32, "cuda"), (torch.bfloat16, "cuda"), (torch.float64, "torch")):
            assert backends.select(torch.device("cuda", 0), dtype) == name
    finally:
        backends._cuda_module_refusal.cache_clear()


def test_module_built_with_cuda_refuses_politely() -> None:
    """In a process of its own: where the module has CUDA kernels but the machine no driver, it says what is needed."""
    if not hasattr(backends.native, "cuda"):
        pytest.skip("bandit_rft._C was built without CUDA (BANDIT_RFT_CUDA=ON builds it)")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    code = "from bandit_rft import _C; print(_C.cuda.refusal(0))"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert "driver" in said.stdout and "sm_80, 90, 100" in said.stdout
