"""Ratios of two things measured in one run: `versus` times the baseline in each round's set-up, so they alternate."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from bandit_rft.ops import backends

RESULTS: list[tuple[str, float, float, float]] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--shape", type=_shape, default=(1024, 896, 32000), metavar="N,H,V",
        help="tokens, hidden size and vocabulary of test_operations.py [1024,896,32000]; bars are for the default",
    )  # fmt: skip


def _shape(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"must be three positive numbers, as in 1024,896,32000; got {text!r}")
    return tuple(map(int, parts))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Whatever is measured through a backend is measured through every registered one as well."""
    if "backend" in metafunc.fixturenames:
        own = backends.registered(backends.Call("cpu", torch.float32))
        metafunc.parametrize("backend", [None, *own], ids=lambda name: name or "chosen")


@pytest.fixture
def shape(request: pytest.FixtureRequest) -> tuple[int, int, int]:
    return request.config.getoption("--shape")  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def _forced(request: pytest.FixtureRequest) -> Iterator[None]:
    name = request.getfixturevalue("backend") if "backend" in request.fixturenames else None
    with backends.use_backend(name) if name else nullcontext():
        yield


@pytest.fixture
def versus(benchmark: Any) -> Callable[..., float]:
    def measure(label: str, ours: Callable[[], Any], baseline: Callable[[], Any], bar: float, rounds: int = 7) -> float:
        """The ratio of medians ours / baseline; the bar is printed beside it, never enforced."""
        seconds: list[float] = []

        def time_baseline() -> None:
            start = time.perf_counter()
            baseline()
            seconds.append(time.perf_counter() - start)

        ours(), baseline()
        benchmark.pedantic(ours, setup=time_baseline, rounds=rounds, warmup_rounds=0)
        reference = statistics.median(seconds)
        ratio = float(benchmark.stats.stats.median / reference)
        benchmark.extra_info.update(baseline_seconds=reference, ratio=ratio, bar=bar)
        RESULTS.append((label, ratio, bar, reference))
        return ratio

    return measure


@pytest.fixture(autouse=True)
def _two_threads() -> None:
    torch.set_num_threads(2)
    torch.manual_seed(0)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if RESULTS:
        terminalreporter.section("ratios, medians of alternating runs")
        for label, ratio, bar, reference in RESULTS:
            verdict = "met" if ratio <= bar else "MISSED"
            terminalreporter.line(
                f"{label:<74} {ratio:6.3f}  bar {bar:.2f} {verdict:<7} baseline {reference * 1e3:8.1f} ms"
            )
