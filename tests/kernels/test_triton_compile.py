"""Every Triton kernel compiled ahead of time without a GPU: for sm_90, a minute of one core.

With BANDIT_RFT_ALL_ARCHITECTURES=1 for sm_80 and sm_100 as well, as tests/csrc does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec

import pytest
from packaging.version import Version
from paths import SUPPORT

pytestmark = pytest.mark.slow  # compilers

MATRIX = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
#: Bytes a multiprocessor has for one block.
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}


#: How the warps lie over (vocabulary, rows): the same whatever the number of rows, or sums would change their order.
WARPS = {80: ["[4, 1]"], 90: ["[8, 1]"], 100: []}


ARCHITECTURES = [80, 90, 100] if os.environ.get("BANDIT_RFT_ALL_ARCHITECTURES") == "1" else [90]


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.timeout(900)
def test_every_kernel_compiles_without_spills(architecture: int) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(SUPPORT / "triton_compile.py"), str(architecture)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    kernels = json.loads(done.stdout)
    assert len(kernels) == (9 if architecture == 80 else 11)
    older = Version(version("triton")) < Version("3.6")  # what torch 2.8 and 2.9 bring spills a few registers
    for name, used in kernels.items():
        head = name.startswith("linear")
        assert used["local"] == 0 and (older or used["stack"] == 0), f"{name} spills: {used}"
        assert used["shared"] <= SHARED[architecture], f"{name}: {used}"
        assert used["matrix"] == ([MATRIX[architecture]] if head else []), f"{name}: {used}"
        bulk = head and architecture >= 90 and "pointers" not in name
        assert (used["bulk"] > 0) == bulk, f"{name}: {used['bulk']} bulk copies of a tensor"
        assert not head or used["warps"] == WARPS[architecture], f"{name}: {used}"
    if architecture == 90:  # padding draws no noise: the batch is N, as small as the instruction takes
        eight = Version(version("triton")) >= Version("3.9")
        assert kernels["linear_sample, 8 rows"]["shapes"] == (["m64n8k16"] if eight else ["m64n16k16"])
        assert kernels["linear_sample, 64 rows"]["shapes"] == ["m64n64k16"]
        assert kernels["linear_logprobs, 8192 rows"]["shapes"] == ["m64n256k16"]


def test_sums_have_one_order_whatever_the_number_of_rows() -> None:
    """BLOCK_V and the warps decide the order; scoring thousands of rows must have those of drawing one."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("triton")
    from bandit_rft.kernels.head_tile import EIGHT_WIDE, configuration

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for capability in (80, 86, 89, 90, 100, 120):
            tiles = [
                configuration(rows, dtype, capability, draws)
                for rows in (0, 1, 7, 8, 9, 33, 64, 65, 200, 8192)
                for draws in (False, True)
            ]
            assert len({(tile.BLOCK_V, tile.BLOCK_H, tile.num_warps, tile.enable_fp_fusion) for tile in tiles}) == 1
            padded = [configuration(rows, dtype, capability, True).BLOCK_N for rows in (1, 9, 17, 33)]
            if dtype != torch.float32 and capability == 90:
                assert padded == [8 if EIGHT_WIDE else 16, 16, 32, 64]
