"""The few statistics the report shows, in plain Python."""

import math
from typing import NamedTuple

from bandit_rft.intervals import Z95, Interval, mean_interval, wilson

__all__ = ["Z95", "Bucket", "Interval", "difference_interval", "downsample", "mean_interval", "smooth", "wilson"]


def difference_interval(before: float, old: Interval, after: float, new: Interval) -> Interval:
    """Interval of after - before from the two intervals by squaring and adding (Newcombe 1998, method 10).

    It takes the two samples as independent, which is cautious when both are answers to the same questions.
    """
    low = math.hypot(after - new.low, old.high - before)
    high = math.hypot(new.high - after, before - old.low)
    return Interval(after - before - low, after - before + high)


class Bucket(NamedTuple):
    """Consecutive points drawn as one: the middle x, and mean, lowest and highest y."""

    x: float
    mean: float
    low: float
    high: float


def downsample(points: list[tuple[int, float]], limit: int) -> tuple[list[Bucket], int]:
    """At most `limit` buckets of equally many consecutive points, and how many points a bucket holds."""
    size = max(1, math.ceil(len(points) / limit))
    buckets = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        ys = [y for _, y in part]
        mean = min(max(math.fsum(y / len(ys) for y in ys), min(ys)), max(ys))
        buckets.append(Bucket((part[0][0] + part[-1][0]) / 2, mean, min(ys), max(ys)))
    return buckets, size


def smooth(values: list[float], window: int) -> list[float]:
    """Centred moving average over `window` values (odd); at the ends over those of the window that exist."""
    half = window // 2
    result = []
    for i in range(len(values)):
        part = values[max(0, i - half) : i + half + 1]
        result.append(math.fsum(v / len(part) for v in part))
    return result
