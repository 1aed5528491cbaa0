"""Ratios of two things measured in one run: `versus` times the baseline in each round's set-up, so they alternate."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

RESULTS: list[tuple[str, float, float, float]] = []


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
