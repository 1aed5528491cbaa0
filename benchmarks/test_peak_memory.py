"""Peak memory beyond inputs and gradients, each side in a fresh process; and the loss at the size of a real model.

Nothing here is timed in turns, so a busy machine does not matter: `pytest benchmarks/test_peak_memory.py`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
from comparison import fresh
from comparison.logit_rows import FILTERS, ROWS
from comparison.peers import DRAWS, LIMITS, LOGPROBS, LOGPROBS_LEARNED, LOSS, role
from comparison.record import OURS

from bandit_rft.ops import backends

pytestmark = [
    pytest.mark.skipif(backends.native is None, reason="measures the compiled core"),
    pytest.mark.timeout(900),
]


def dimensions(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


ZERO = ", 70% of the sequences at advantage 0"
#: name of the case in test_operations.py -> (operation of fresh.py, its sides, share of zeros, group)
CASES: dict[str, tuple[str, dict[str, Any], float, str]] = {
    "linear_policy_loss, forward + backward": ("loss", LOSS, 0.0, "loss"),
    f"linear_policy_loss, forward + backward{ZERO}": ("loss", LOSS, 0.7, "loss"),
    "linear_logprobs, forward": ("logprobs", LOGPROBS, 0.0, "logprobs"),
}


@pytest.mark.parametrize("name", CASES)
def test_peaks(name: str, each_shape: tuple[int, int, int], benchmark: Any, keep: Callable[..., None]) -> None:
    peaks(f"{name}, {dimensions(each_shape)}", each_shape, CASES[name], benchmark, keep)


def test_peaks_of_a_backward(shape: tuple[int, int, int], benchmark: Any, keep: Callable[..., None]) -> None:
    case = ("learned", LOGPROBS_LEARNED, 0.0, "logprobs")
    peaks(f"linear_logprobs, forward + backward, {dimensions(shape)}", shape, case, benchmark, keep)


@pytest.mark.parametrize("rows", [1, 8, 32, 64])
def test_peaks_of_a_draw(rows: int, shape: tuple[int, int, int], benchmark: Any, keep: Callable[..., None]) -> None:
    title = f"linear_sample, {rows} rows, {dimensions(shape[1:])}"
    peaks(title, (rows, *shape[1:]), ("draws", DRAWS, 0.0, "sampling"), benchmark, keep)


@pytest.mark.parametrize("name", ROWS)
def test_peaks_of_rows(name: str, shape: tuple[int, int, int], benchmark: Any, keep: Callable[..., None]) -> None:
    of_rows = (512, shape[2])
    peaks(f"{name}, {of_rows[0]} rows of {of_rows[1]}", of_rows, (name, ROWS[name].sides, 0.0, "rows"), benchmark, keep)


@pytest.mark.parametrize("name", [name for name in FILTERS if name.endswith("normal")])
def test_peaks_of_filters(name: str, benchmark: Any, keep: Callable[..., None]) -> None:
    peaks(name, (8, 151936), (name, FILTERS[name].sides, 0.0, "filters"), benchmark, keep)


def peaks(
    name: str, shape: tuple[int, ...], case_of: tuple[str, dict[str, Any], float, str], benchmark: Any,
    keep: Callable[..., None],
) -> None:  # fmt: skip
    """Of every side; ours is held."""
    operation, names, zero, group = case_of
    sides: dict[str, Any] = {}
    missing: dict[str, str] = {}
    for side in names:
        if side in LIMITS:
            continue
        found = fresh.measure(operation, side, shape, zero)
        if "missing" in found:
            missing[side] = found["missing"]
        else:
            sides[side] = {"role": role(side), "peak_mib": found["peak_mib"]}
    lines = "".join(f"\n    {side:<40} {one['peak_mib']:8.0f} MiB" for side, one in sides.items())
    keep(name, {"group": group, "sides": sides, "missing": missing, "shape": shape}, lines)
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
