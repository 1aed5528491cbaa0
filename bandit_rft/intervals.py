"""Mean rewards over questions and their 95% intervals, in plain Python."""

import math
from collections.abc import Sequence
from typing import NamedTuple

Z95 = 1.959963984540054


class Interval(NamedTuple):
    """A two-sided 95% confidence interval."""

    low: float
    high: float


def wilson(mean: float, count: int) -> Interval:
    """Wilson score interval of a proportion `mean` observed in `count` trials (Wilson 1927)."""
    z2 = Z95**2 / count
    centre = (mean + z2 / 2) / (1 + z2)
    half = math.sqrt(max(0.0, mean * (1 - mean)) * z2 + z2**2 / 4) / (1 + z2)
    return Interval(max(0.0, centre - half), min(1.0, centre + half))


def mean_interval(mean: float, deviation: float, count: int) -> Interval:
    """Normal interval of a mean, for rewards that are not 0/1."""
    half = Z95 * deviation / math.sqrt(count)
    return Interval(mean - half, mean + half)


def earned(rewards: Sequence[float | None]) -> list[float]:
    """Rewards with a number for what could not be scored: 0, or the lowest of the others where that is less.

    Leaving it out would flatter the policy, and so would a 0 where others are punished.
    """
    lowest = min((reward for reward in rewards if reward is not None), default=0.0)
    return [min(0.0, lowest) if reward is None else reward for reward in rewards]


def first_earned(samples: Sequence[int], rewards: Sequence[float | None], greedy: bool = False) -> list[float]:
    """What each question's first sample `earned`, or its greedy answer, which is sample -1, of stored completions."""
    drawn = [(sample, reward) for sample, reward in zip(samples, rewards, strict=True) if (sample < 0) == greedy]
    numbers = earned([reward for _, reward in drawn])
    return [number for (sample, _), number in zip(drawn, numbers, strict=True) if sample <= 0]


def reward_interval(rewards: Sequence[float]) -> Interval | None:
    """Interval of the mean reward of independent questions: Wilson's where all earned 0 or 1; None for none."""
    count = len(rewards)
    if not count:
        return None
    mean = math.fsum(rewards) / count
    if all(reward in (0.0, 1.0) for reward in rewards):
        return wilson(mean, count)
    deviation = math.sqrt(math.fsum((reward - mean) ** 2 for reward in rewards) / max(1, count - 1))
    return mean_interval(mean, deviation, count)
