"""Time and memory as one size grows and the others stay; `python benchmarks/performance.py` draws the curves.

Each point is a few turns; the sides of a point alternate. Memory is of a fresh process.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from comparison import completions, fresh, peers
from comparison.batch import Batch
from comparison.peers import CCE, DRAWS, LOSS, PLAIN, TORCH
from comparison.record import OURS

from bandit_rft.ops import backends

pytestmark = [
    pytest.mark.skipif(backends.native is None, reason="measures the compiled core"),
    pytest.mark.timeout(900),
]
Keep = Callable[..., None]
K = 1024
#: curve -> (what grows, its values, the loss's shape and share of zeros at a value, threads)
LOSS_CURVES: dict[str, tuple[str, Sequence[float], Callable[[Any], tuple[tuple[int, int, int], float]]]] = {
    "tokens": ("N", (K, 4 * K, 16 * K, 64 * K), lambda n: ((n, 256, 8000), 0.0)),
    "vocabulary": ("V", (K, 8 * K, 32 * K, 128 * K, 256 * K), lambda v: ((K, 256, v), 0.0)),
    "zero rows": (
        "share of the sequences at advantage 0",
        (0.0, 0.25, 0.5, 0.75, 0.9),
        lambda z: ((2 * K, 512, 16000), z),
    ),
}
SAMPLER_HEAD, SAMPLER_ROWS = (896, 32000), (1, 4, 16, 64, 256, 1024)
DRAWING = OURS, PLAIN
DRAWN, LENGTHS = (16, 16), (16, 64, 256, 1024)  # sequences and tokens of a prompt; of a completion
THREADS_SHAPE = (K, 512, 16000)
COMPARED = (OURS, PLAIN, TORCH, CCE)
#: F.linear_cross_entropy takes 73 s at 128K: beyond, a curve of it is not worth the minutes.
MOST_ENTRIES = {TORCH: 128 * K}


def every_number_of_threads() -> range:
    return range(1, torch.multiprocessing.cpu_count() + 1)


def sides_for(shape: tuple[int, int, int]) -> list[str]:
    return [name for name in COMPARED if shape[2] <= MOST_ENTRIES.get(name, shape[2])]


def in_turns(works: dict[str, Callable[[], Any]], budget: float = 1.5) -> dict[str, list[float]]:
    """Three to nine turns, as many as the budget has time for; each work has run before."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    start = time.perf_counter()
    while len(seconds[OURS]) < 3 or (len(seconds[OURS]) < 9 and time.perf_counter() - start < budget):
        for name, work in works.items():
            begin = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def point(keep: Keep, curve: str, axis: str, x: float, seconds: dict[str, list[float]], missing: Any = None) -> None:
    sides = {name: {"role": peers.role(name), "seconds": found} for name, found in seconds.items()}
    line = "  ".join(f"{name} {statistics.median(found) * 1e3:.1f} ms" for name, found in seconds.items())
    case = {"group": "scaling", "curve": curve, "axis": axis, "x": x, "sides": sides, "missing": missing or {}}
    keep(f"scaling: {curve}, {axis} = {x}", case, f"\n    {line}")


@pytest.mark.parametrize("curve", LOSS_CURVES)
def test_loss(curve: str, benchmark: Any, keep: Keep) -> None:
    axis, values, shape_of = LOSS_CURVES[curve]
    for x in values:
        shape, zero = shape_of(x)
        batch = Batch(*shape, zero=zero)
        works, missing, _ = peers.working({name: LOSS[name] for name in sides_for(shape)}, batch)
        point(keep, curve, axis, x, in_turns(works), missing)
    benchmark.pedantic(lambda: None)


def test_sampler_batch(benchmark: Any, keep: Keep) -> None:
    for rows in SAMPLER_ROWS:
        works, missing, _ = peers.working({name: DRAWS[name] for name in DRAWING}, Batch(rows, *SAMPLER_HEAD))
        point(keep, "sampler batch", "rows drawn", rows, in_turns(works, 1.0), missing)
    benchmark.pedantic(lambda: None)


@pytest.mark.parametrize("curve", [*LOSS_CURVES, "sampler batch", "threads", "response length"])
def test_peak(curve: str, benchmark: Any, keep: Keep) -> None:
    for axis, x, measure in peaks_of(curve):
        sides = {}
        for name, found in measure.items():
            peak = found()
            if "missing" not in peak:
                sides[name] = {"role": peers.role(name), "peak_mib": peak["peak_mib"]}
        line = "  ".join(f"{name} {one['peak_mib']:.0f} MiB" for name, one in sides.items())
        case = {"group": "scaling", "curve": curve, "axis": axis, "x": x, "sides": sides}
        keep(f"scaling: {curve}, {axis} = {x}", case, f"\n    {line}")
    benchmark.pedantic(lambda: None)


def peaks_of(curve: str) -> Iterator[tuple[str, float, dict[str, Callable[[], Any]]]]:
    """(axis, x, what measures the peak of each side) of every point."""
    if curve in LOSS_CURVES:
        axis, values, shape_of = LOSS_CURVES[curve]
        for x in values:
            shape, zero = shape_of(x)
            yield axis, x, {n: partial(fresh.measure, "loss", n, shape, zero) for n in sides_for(shape)}
    elif curve == "threads":
        for threads in every_number_of_threads():
            of = {n: partial(fresh.measure, "loss", n, THREADS_SHAPE, threads=threads) for n in COMPARED}
            yield "threads", threads, of
    elif curve == "response length":
        for length in LENGTHS:
            names = (OURS, completions.FORWARD)
            of = {n: partial(fresh.measure, "completions", n, (*DRAWN, length)) for n in names}
            yield "tokens a completion", length, of
    else:
        for rows in SAMPLER_ROWS:
            yield "rows drawn", rows, {n: partial(fresh.measure, "draws", n, (rows, *SAMPLER_HEAD)) for n in DRAWING}


def test_response_length(tmp_path: Path, benchmark: Any, keep: Keep) -> None:
    """Decoding 16 sequences of the 1.1M model, beside the model's own forward."""
    for length in LENGTHS:
        works = completions.sides(tmp_path, *DRAWN, length)
        works[OURS]()
        point(keep, "response length", "tokens a completion", length, in_turns(works, 1.0))
    benchmark.pedantic(lambda: None)


def test_threads(benchmark: Any, keep: Keep) -> None:
    batch = Batch(*THREADS_SHAPE)
    try:
        for threads in every_number_of_threads():
            torch.set_num_threads(threads)
            works, missing, _ = peers.working({name: LOSS[name] for name in COMPARED}, batch)
            point(keep, "threads", "threads", threads, in_turns(works), missing)
    finally:
        torch.set_num_threads(2)
    benchmark.pedantic(lambda: None)
