"""Every Triton kernel compiled ahead of time without a GPU, its machine code counted: tools/check_triton.py, for sm_90.

With BANDIT_RFT_ALL_ARCHITECTURES=1 for sm_80 and sm_100 as well, as tests/csrc does.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import pytest
from packaging.version import Version
from paths import ROOT

pytestmark = [
    pytest.mark.slow,  # compilers
    pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton"),
    pytest.mark.timeout(900),
]

MATRIX = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
#: Fewer rows than a warpgroup's product has.
NARROW = ("linear_sample, 16 rows", "linear_sample, 32 rows")
#: Bytes a multiprocessor has for one block.
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
ARCHITECTURES = [80, 90, 100] if os.environ.get("BANDIT_RFT_ALL_ARCHITECTURES") == "1" else [90]


@cache
def tool() -> ModuleType:
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        spec = importlib.util.spec_from_file_location("check_triton", ROOT / "tools" / "check_triton.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.pop(0)


@cache
def kernels(architecture: int) -> dict[str, dict[str, Any]]:
    """In a process of its own: this one may have Triton's interpreter switched on."""
    found: dict[str, dict[str, Any]] = tool().by_version(version("triton"), architecture)
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_compiles_and_next_to_nothing_spills(architecture: int) -> None:
    found = kernels(architecture)
    heads = {80: 2, 90: 6, 100: 3}[architecture]
    assert len(found) == heads + 7
    for name, used in found.items():
        head = name.startswith("linear")
        assert used["spilled"] <= 16, f"{name} spills: {used}"  # four registers: none at all costs more elsewhere
        assert used["shared"] <= SHARED[architecture], f"{name}: {used}"
        matrix = "mma.sync" if name in NARROW else MATRIX[architecture]
        assert used["matrix"] == ([matrix] if head else []), f"{name}: {used}"
        bulk = head and architecture >= 90 and "pointers" not in name
        assert (used["bulk"] > 0) == bulk, f"{name}: {used['bulk']} bulk copies of a tensor"
    if architecture == 90:
        assert found["linear_sample, 64 rows"]["shapes"] == ["m64n128k16"]
        assert found["linear_logprobs, 8192 rows"]["shapes"] == ["m64n256k16"]
        # Programs of a small tile share a multiprocessor: registers and shared memory of all.
        for name, programs in (
            ("linear_logprobs, 64 rows", 2),
            ("linear_sample, 64 rows", 2),
            *((n, 3) for n in NARROW),
        ):
            small = found[name]
            assert programs * 32 * small["warps"] * small["registers"] <= 65536
            assert programs * (small["shared"] + 1024) <= 228 << 10


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_other_calls_launch_compiles(architecture: int) -> None:
    """float16, biases, softcaps, temperatures, hidden sizes of no multiple, every objective, each filter alone."""
    found = tool().by_version(version("triton"), architecture, "--variants")
    assert len(found) == {80: 2, 90: 5, 100: 3}[architecture] + 4 + 6 + 3
    for name, used in found.items():
        assert used["spilled"] <= 64 and used["shared"] <= SHARED[architecture], f"{name}: {used}"


#: Instructions a logit on sm_90: at most this.
BARS = {
    "linear_logprobs, 64 rows": 15, "linear_logprobs, 8192 rows": 13, "linear_sample, 64 rows": 50,
    "linear_sample, 32 rows": 60, "linear_sample, 16 rows": 70,
}  # fmt: skip


@pytest.mark.parametrize("name", BARS)
def test_instructions_of_a_logit_beside_its_product(name: str) -> None:
    used = kernels(90)[name]
    if Version(version("triton")) < Version("3.6"):
        pytest.skip("an older compiler's counts are recorded, not bounded")
    assert 8 < used["instructions"] <= BARS[name]


def test_recorded_table() -> None:
    """docs/building.md shows what this Triton gives; another release may give other numbers."""
    recorded = tool().recorded()
    if f"By Triton {version('triton')}:" not in recorded:
        pytest.skip("docs/building.md records another Triton")
    rows = {line.split("|")[1].strip(): line.split("|") for line in recorded.splitlines() if line.startswith("| ")}
    for name, used in kernels(90).items():
        assert rows[name][3].strip() == tool().cell(used), name


def test_the_count_leaves_out_what_is_rare_and_the_turns_of_the_product() -> None:
    """A loop over tiles around one over the hidden size, a branch that few tiles take, a wait outside the loop."""
    sass = """
        Function : head
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0020*/               @P3 BRA 0xd0 ;
        /*0030*/               @P0 BRA 0x10 ;
        /*0040*/                   MUFU.EX2 R4, R4 ;
        /*0050*/                   STG.E desc[UR4][R2.64], R4 ;
        /*0060*/              @!P1 BRA 0x90 ;
        /*0070*/                   MUFU.LG2 R5, R5 ;
        /*0080*/                   STG.E desc[UR4][R2.64], R5 ;
        /*0090*/                   FADD R4, R4, R5 ;
        /*00a0*/                   STG.E desc[UR4][R2.64], R4 ;
        /*00b0*/               @P2 BRA 0x10 ;
        /*00c0*/                   EXIT ;
        /*00d0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P3, [UR13+0x32000], R179 ;
        /*00e0*/                   BRA 0x30 ;
"""
    check = tool()
    (code,) = check.functions(sass).values()
    # 10 to 60 and 90 to b0 are nine instructions, of which 10 to 30 are a turn of the product.
    assert check.tile_instructions(code) == 9 - 3


def test_the_tile_of_few_rows_and_of_many_has_the_same_states() -> None:
    """One width of a state for every tile of a dtype: scoring thousands of rows sums as drawing one does."""
    torch = pytest.importorskip("torch")
    from bandit_rft.kernels.head_tile import configuration, state_width

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for capability in (80, 86, 89, 90, 100, 120):
            for rows in (0, 1, 7, 8, 9, 33, 64, 65, 200, 8192):
                draw, score = (configuration(rows, dtype, capability, draws) for draws in (True, False))
                assert state_width(dtype) == draw.BLOCK_V and score.BLOCK_V % draw.BLOCK_V == 0
                assert not draw.enable_fp_fusion and not score.enable_fp_fusion
                if dtype == torch.float32:
                    assert draw.BLOCK_H == score.BLOCK_H
                else:  # matrix instructions take 16 of the hidden size at a time, ascending, whatever is loaded at once
                    assert draw.BLOCK_H % 16 == score.BLOCK_H % 16 == 0
