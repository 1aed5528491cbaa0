"""A wider instruction set must pay: AVX2's vectors once went through memory, and it took 4 times as long as SSE2."""

from __future__ import annotations

import time

import pytest
import torch

from bandit_rft.ops import backends
from bandit_rft.ops.backend import Head

SETS = ("baseline", "avx2", "avx512")


@pytest.mark.skipif(backends.native is None, reason="needs the compiled core")
@pytest.mark.parametrize("rows", [4, 12, 32])
def test_a_wider_set_is_no_slower(rows: int) -> None:
    core, cpu = backends.native, backends.serving(torch.device("cpu"), torch.float32)
    of = Head(torch.randn(rows, 512), torch.randn(2048, 512), None)
    out, best, threads = torch.empty(rows, 2048), core.instruction_set(), torch.get_num_threads()
    seconds: dict[str, list[float]] = {}
    try:
        torch.set_num_threads(1)  # one that waits for another would be measured as well
        for _ in range(25):  # in turns, since other work on the machine comes and goes
            for name in SETS:
                try:
                    core.use_instruction_set(name)
                except ValueError:  # not on this machine
                    continue
                start = time.perf_counter()
                cpu.sampling_logits(of, out)
                seconds.setdefault(name, []).append(time.perf_counter() - start)
    finally:
        core.use_instruction_set(best)
        torch.set_num_threads(threads)
    if len(seconds) < 2:
        pytest.skip("this machine has one instruction set")
    slowest, *wider = (min(taken) for taken in seconds.values())
    assert max(wider) < 2 * slowest, seconds
