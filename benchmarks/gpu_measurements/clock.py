"""Times callables alternately, by device events, with the host kept ahead of the device.

Between two events a GPU also waits for the host's launches (60-100 us an operation). So a sleep kernel runs before the
first event, long enough for the host to enqueue all of the work meanwhile: what the events see is the device alone. A
work that itself waits for the device is counted with its waiting. What the host took is reported beside it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

Work = Callable[[], Any]
LONGEST_SLEEP_MS = 30.0


class Time(NamedTuple):
    """Medians in milliseconds: of the device, and of the host until it had enqueued the work."""

    device: float
    host: float


class Clock:
    """Medians of at least `least` samples each, for about `seconds`; a GPU's cache is overwritten before every one."""

    def __init__(self, device: torch.device, seconds: float, least: int = 5):
        self.device, self.seconds, self.least = device, seconds, least
        self.cache: torch.Tensor | None = None
        if device.type == "cuda":
            self.cache = torch.empty(256 << 20, dtype=torch.uint8, device=device)
            self.cycles_a_ms = self._cycles()

    def _cycles(self) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(1_000_000)
        begin.record()
        torch.cuda._sleep(20_000_000)
        end.record()
        end.synchronize()
        return 20_000_000 / begin.elapsed_time(end)

    def once(self, work: Work, host_ms: float) -> Time:
        if self.cache is None:
            start = time.perf_counter()
            work()
            elapsed = (time.perf_counter() - start) * 1e3
            return Time(elapsed, elapsed)
        self.cache.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int(self.cycles_a_ms * min(LONGEST_SLEEP_MS, 0.3 + 1.5 * host_ms)))
        begin.record()
        start = time.perf_counter()
        work()
        host = (time.perf_counter() - start) * 1e3
        end.record()
        end.synchronize()
        return Time(begin.elapsed_time(end), host)

    def alternately(self, works: dict[str, Work]) -> dict[str, Time]:
        host: dict[str, float] = {}
        for name, work in works.items():
            work()
            if self.cache is not None:
                torch.cuda.synchronize(self.device)
            start = time.perf_counter()
            work()  # the second time: the first compiles and allocates
            host[name] = (time.perf_counter() - start) * 1e3
        samples: dict[str, list[Time]] = {name: [] for name in works}
        first = next(iter(works))
        deadline = time.perf_counter() + self.seconds
        while len(samples[first]) < self.least or (time.perf_counter() < deadline and len(samples[first]) < 50):
            for name, work in works.items():
                samples[name].append(self.once(work, host[name]))
        return {name: Time(*map(statistics.median, zip(*seen, strict=True))) for name, seen in samples.items()}
