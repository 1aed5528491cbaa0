"""How csrc/cuda/launch.h lays rows over blocks and warps, asked of the kernels compiled for a CPU."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # compiles the emulation

SM_80 = (8, 166912, 167936)  # major, shared memory bytes a block and a multiprocessor
SM_90 = (9, 232448, 233472)


@pytest.fixture(scope="module")
def kernels(emulated_cuda: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(emulated_cuda))


def planned(
    kernels: ctypes.CDLL, device: tuple[int, int, int], vocabulary: int, *, width: int = 4,
    kernel: str = "differentiate", alone: bool = False,
) -> list[int]:  # fmt: skip
    kernels.use_device(*device, 512, ctypes.c_bool(False))
    out = (ctypes.c_int * 5)()
    kernels.plan_of(ctypes.c_int64(vocabulary), width, kernel.encode(), ctypes.c_bool(alone), out)
    return list(out)


def test_plans(kernels: ctypes.CDLL) -> None:
    """Vocabularies of today's models fit a cluster's shared memory, two blocks a multiprocessor or more."""
    expected = ((1, 1, 1), (1024, 1, 3), (32000, 2, 8), (128256, 8, 8), (151936, 8, 13), (202048, 8, 13))
    for vocabulary, blocks, warps in expected:
        got, threads, cached, share, shared = planned(kernels, SM_90, vocabulary)
        assert (got, threads) == (blocks, warps * 32), vocabulary
        assert cached >= share and got * share * 512 >= vocabulary  # counted in spans of 512 logits
        assert 2 * (shared + 1024) <= SM_90[2]
    blocks, _, cached, share, shared = planned(kernels, SM_80, 151936)
    assert blocks == 1 and cached < share and shared <= SM_80[1]
    # A row that no cluster holds belongs to one block where others could write over what it still has to read.
    assert planned(kernels, SM_90, 600_000)[0] == 8 and planned(kernels, SM_90, 600_000, alone=True)[0] == 1


@pytest.mark.parametrize("device", [SM_80, SM_90], ids=["sm_80", "sm_90"])
@pytest.mark.parametrize("kernel", ["score", "differentiate", "sample", "filtered"])
def test_warps_share_evenly_and_blocks_have_registers(
    kernels: ctypes.CDLL, kernel: str, device: tuple[int, int, int]
) -> None:
    registers, blocks = (128, 1) if kernel == "filtered" else (64, 4)
    for vocabulary in [*range(1, 40_000, 509), *range(40_000, 700_000, 3001)]:
        for width in (2, 4):
            _, threads, cached, share, shared = planned(kernels, device, vocabulary, width=width, kernel=kernel)
            warps, rest = divmod(threads, 32)
            assert rest == 0 and 1 <= warps <= 16
            if kernel == "filtered":
                assert warps == min(16, share)
            else:
                assert share / (warps * -(-share // warps)) > 8 / 9, (vocabulary, warps, share)
            if cached:  # registers keep out no block that fits
                fit = min(blocks, device[2] // (shared + 1024))
                assert 1 <= fit <= 65_536 // (registers * threads), (vocabulary, threads, shared)
