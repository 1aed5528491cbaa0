"""Peak memory beyond inputs and gradients, each side in a fresh process; and the loss at the size of a real model.

Nothing here is timed in turns, so a busy machine does not matter: `pytest benchmarks/test_peak_memory.py`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
from comparison import fresh
from comparison.peers import LIMITS, LOGPROBS, LOSS, role
from comparison.record import OURS

from bandit_rft.ops import backends

pytestmark = [
    pytest.mark.skipif(backends.native is None, reason="measures the compiled core"),
    pytest.mark.timeout(900),
]


def dimensions(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


@pytest.mark.parametrize("operation", ["loss", "logprobs"])
def test_peaks(operation: str, each_shape: tuple[int, int, int], benchmark: Any, keep: Callable[..., None]) -> None:
    name, names = {
        "loss": ("linear_policy_loss, forward + backward", LOSS),
        "logprobs": ("linear_logprobs, forward", LOGPROBS),
    }[operation]
    sides: dict[str, Any] = {}
    missing: dict[str, str] = {}
    for side in names:
        if side in LIMITS:
            continue
        found = fresh.measure(operation, side, each_shape)
        if "missing" in found:
            missing[side] = found["missing"]
        else:
            sides[side] = {"role": role(side), "peak_mib": found["peak_mib"]}
    lines = "".join(f"\n    {side:<40} {one['peak_mib']:8.0f} MiB" for side, one in sides.items())
    case = {"group": operation, "sides": sides, "missing": missing, "shape": each_shape}
    keep(f"{name}, {dimensions(each_shape)}", case, lines)
    benchmark.pedantic(lambda: None)
    assert sides[OURS]["peak_mib"] <= 64


def test_a_real_vocabulary(benchmark: Any, keep: Callable[..., None]) -> None:
    """32,768 tokens of a 0.5B model's head: 19 GiB as logits. Once, in a fresh process, all of it counted."""
    shape = (32768, 896, 151936)
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    if available < 4:
        pytest.skip(f"needs 4 GiB of free memory; {available:.1f} are")
    found = fresh.measure("loss", OURS, shape, once=True)
    assert "missing" not in found, found
    figures = {"process GiB": found["process_mib"] / 1024, "logits GiB": 4 * shape[0] * shape[2] / 2**30}
    sides = {OURS: {"role": "ours", "seconds": [found["seconds"]], "peak_mib": found["peak_mib"], "figures": figures}}
    line = f"\n    {found['process_mib'] / 1024:.2f} GiB the whole process, {found['seconds']:.0f} s"
    keep(f"linear_policy_loss, once, {dimensions(shape)}", {"group": "large", "sides": sides, "shape": shape}, line)
    benchmark.pedantic(lambda: None)
    assert found["process_mib"] < 3 * 1024
