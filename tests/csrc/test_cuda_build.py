"""The CUDA sources compile without a GPU, do not spill, and spend few instructions on a logit; skipped without nvcc.

One architecture is compiled here; `python tools/check_cuda.py` compiles all three, and what docs/building.md records of
them is compared where they are at hand (build/check-cuda remembers), or with BANDIT_RFT_ALL_ARCHITECTURES=1.
"""

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


ARCHITECTURE = 90


@pytest.fixture(scope="module")
def kernels(nvcc: Path) -> dict[str, Any]:
    check = tool("check_cuda")
    try:
        check.find_cuobjdump(nvcc)
    except SystemExit as message:
        pytest.skip(str(message))
    return {kernel.name: kernel for kernel in check.every_kernel(nvcc, (ARCHITECTURE,))}


def test_kernels_compile_without_spills(kernels: dict[str, Any]) -> None:
    types = ("F32", "Bf16", "F16")
    scalings = ("plain", "general")
    expected = {f"score<{t}, {s}>" for t in types for s in scalings}
    expected |= {f"sample<{t}, whole, {s}>" for t in types for s in scalings}
    expected |= {f"sample<{t}, filtered, general>" for t in types}
    pairs = (*zip(types, types, strict=True), types[:2], types[::2])
    expected |= {f"differentiate<{a}, {b}, {s}>" for a, b in pairs for s in scalings}
    assert set(kernels) == expected
    assert [kernel for kernel in kernels.values() if kernel.spilled] == []
    # Two blocks of 512 threads share a multiprocessor's 65,536 registers; the filters settle for one.
    assert all(k.registers <= (128 if "filtered" in k.name else 64) for k in kernels.values())


#: Instructions a logit in all passes, plain scaling: at most this.
BARS = {"score<F32, plain>": 12, "differentiate<F32, F32, plain>": 20, "differentiate<F32, Bf16, plain>": 20,
        "differentiate<F32, F16, plain>": 20, "sample<F32, whole, plain>": 40}  # fmt: skip


@pytest.mark.parametrize("name", BARS)
def test_instructions_of_a_logit(kernels: dict[str, Any], name: str) -> None:
    kernel = kernels[name]
    assert len(kernel.loops) == (2 if name.startswith("differentiate") else 1)
    assert all(loop.logits == 16 for loop in kernel.loops)
    assert 4 < kernel.instructions <= BARS[name]
    # 2^x of every logit in every pass, and little beside it.
    assert len(kernel.loops) <= kernel.mufu <= len(kernel.loops) + 0.25


def test_every_bulk_access_has_16_bytes(kernels: dict[str, Any]) -> None:
    for kernel in kernels.values():
        assert kernel.loops, kernel.name
        for loop in kernel.loops:
            wide = {what for what in loop.accesses if what.endswith(".128")}
            if "filtered" not in kernel.name:  # those look their histograms up
                assert set(loop.accesses) == wide, (kernel.name, loop.accesses)
            assert loop.accesses.get("LDG.128", 0) + loop.accesses.get("LDS.128", 0) == {"F32": 4}.get(
                kernel.types[0], 2
            )
        if kernel.name.startswith("differentiate"):
            stores = kernel.loops[-1].accesses["STG.128"]
            assert stores == {"F32": 4}.get(kernel.types[1], 2), kernel.name


def test_counting_takes_the_way_of_a_span_without_an_edge() -> None:
    check = tool("check_cuda")
    sass = """
        Function : loop
    .headerflags    @"EF_CUDA_SM90"
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/              @!P0 BRA 0x40 ;
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/                   BRA 0x50 ;
        /*0040*/                   LDG.E R4, desc[UR4][R2.64] ;
        /*0050*/                   MUFU.EX2 R4, R4 ;
        /*0060*/                   BRA.DIV UR4, 0xa0 ;
        /*0070*/                   STG.E.EF.128 desc[UR4][R2.64], R4 ;
        /*0080*/               @P1 BRA 0x10 ;
        /*0090*/                   EXIT ;
        /*00a0*/                   BRA 0x70 ;
"""
    code = check.functions(sass)["loop"]
    (way,) = check.row_ways(code)
    assert [i.address for i in way] == [0x10, 0x20, 0x30, 0x50, 0x60, 0x70, 0x80]
    assert [i.access for i in code if i.access] == ["LDG.128", "LDG.32", "STG.128"]
    (loop,) = check._loops("score<F32, plain>", code)
    assert (loop.logits, loop.instructions, loop.mufu) == (4, 7, 1)


def test_recorded_tables(nvcc: Path, kernels: dict[str, Any]) -> None:
    """docs/building.md shows what this compiler gives; another release may give other numbers."""
    check = tool("check_cuda")
    if f"nvcc {check.release(nvcc)}" not in check.BUILDING.read_text():
        pytest.skip(f"docs/building.md records another nvcc than {check.release(nvcc)}")
    recorded = check.recorded()
    for kernel in kernels.values():  # this architecture's column, in both tables
        first, second = (line.split("|") for line in recorded.splitlines() if line.startswith(f"| `{kernel.name}`"))
        column = 2 + check.ARCHITECTURES.index(ARCHITECTURE)
        assert first[column].strip() == f"{kernel.instructions:.1f} ({kernel.mufu:.1f})"
        assert second[column].strip() == f"{kernel.registers} / {kernel.spilled}"
    everywhere = all(check.remembered(nvcc, s, a).exists() for s in check.SOURCES for a in check.ARCHITECTURES)
    if everywhere or os.environ.get("BANDIT_RFT_ALL_ARCHITECTURES") == "1":
        assert check.tables(check.every_kernel(nvcc)) == recorded


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
