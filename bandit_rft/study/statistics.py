"""How sure a marginal gain is: intervals, p-values, planning numbers; differences are paired over seeds and questions.

A block is an array D [..., S, Q]: what a level earned minus what the baseline earned, with seed s on question q. The
same seeds and questions stand on both sides. The model is two crossed random effects,

    D[s, q] = gain + a[s] + b[q] + c[s, q],    Var(mean of D) = var_a / S + var_b / Q + var_c / (S Q),

so that the interval speaks about new seeds and new questions, not only about those that were run. Leading dimensions
are independent problems, computed together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
CONFIDENCE = 0.95
POWER = 0.8
RESAMPLES = 1000
MAX_SEEDS = 10_000


@dataclass(frozen=True)
class Contrast:
    """A weighted sum of block means and the three parts of its variance; every field has the leading dimensions.

    Each part estimates more than its own component: seeds [...] and questions [...] hold the residual too, which is why
    the variance of the sum is seeds + questions - residual.
    """

    gain: Array
    seeds: Array
    questions: Array
    residual: Array
    degrees: Array  # of freedom of the variance (Satterthwaite)
    seed_count: int

    @property
    def variance(self) -> Array:
        """seeds + questions - residual; a negative estimate of the questions' own part counts as 0."""
        return self.seeds + np.maximum(self.questions - self.residual, 0)

    @property
    def error(self) -> Array:
        """Standard error of the gain; NaN where it cannot be known (one seed, or no variation but a gain)."""
        error = np.sqrt(self.variance)
        unknown = (error == 0) & (self.gain != 0)
        return np.where(unknown | (self.seed_count < 2), np.nan, error)


def contrast(blocks: Sequence[tuple[float, Array]]) -> Contrast:
    """Sum of weight * mean(D) over blocks [(weight, D [..., S, Q_block])] and its variance.

    Blocks share their seeds, not their questions: tasks to be averaged, or train (+1) and test (-1). Variance parts are
    the mean squares of the two-way layout without replication, degrees of freedom are Satterthwaite's (1946).
    """
    first = np.asarray(blocks[0][1], dtype=np.float64)
    count = first.shape[-2]
    by_seed = np.zeros(first.shape[:-1])
    questions, residual, spread = (np.zeros(first.shape[:-2]) for _ in range(3))
    for weight, block in blocks:
        block = np.asarray(block, dtype=np.float64)
        if block.shape[-2] != count:
            raise ValueError(f"blocks must share their seeds; got {count} and {block.shape[-2]}")
        n = block.shape[-1]
        rows, columns = block.mean(-1), block.mean(-2)
        mean = rows.mean(-1)
        by_seed += weight * rows
        if n < 2:
            continue
        of_questions = weight**2 * columns.var(-1, ddof=1) / n
        questions += of_questions
        spread += of_questions**2 / (n - 1)
        if count > 1:
            # sum of squares about both margins = total - rows - columns, without an [S, Q] temporary
            total = ((block - mean[..., None, None]) ** 2).sum((-2, -1))
            rest = total - n * count * (rows.var(-1) + columns.var(-1))
            freedom = (count - 1) * (n - 1)
            of_residual = weight**2 * np.maximum(rest, 0) / freedom / (count * n)
            residual += of_residual
            spread += of_residual**2 / freedom
    seeds = by_seed.var(-1, ddof=1) / count if count > 1 else np.full(first.shape[:-2], np.nan)
    variance = seeds + np.maximum(questions - residual, 0)
    spread = spread + (seeds**2 / (count - 1) if count > 1 else np.nan)
    with np.errstate(invalid="ignore", divide="ignore"):
        degrees = np.where(spread > 0, variance**2 / spread, max(count - 1, 1))
    degrees = np.maximum(degrees, max(count - 1, 1))
    return Contrast(by_seed.mean(-1), seeds, questions, residual, degrees, count)


def t_quantile(degrees: Any, level: float) -> Array:
    """Quantile of Student's t, elementwise."""
    from scipy.special import stdtrit

    return np.asarray(stdtrit(degrees, level), dtype=np.float64)


def t_interval(gain: Array, error: Array, degrees: Array) -> tuple[Array, Array]:
    """Two-sided 95% interval gain -+ t * error."""
    half = t_quantile(degrees, (1 + CONFIDENCE) / 2) * error
    return gain - half, gain + half


def p_value(gain: Array, error: Array, degrees: Array) -> Array:
    """Two-sided p-value of "the gain is 0"; 1 where there is no difference at all, NaN where the error is unknown."""
    from scipy.special import stdtr

    with np.errstate(invalid="ignore", divide="ignore"):
        p = 2 * stdtr(degrees, -np.abs(gain) / error)
    return np.where((gain == 0) & (error == 0), 1.0, p)


def holm(p: Array) -> Array:
    """Holm's (1979) step-down adjusted p-values of one family; NaN stays NaN but counts as a test."""
    filled = np.where(np.isnan(p), 1.0, p)
    order = np.argsort(filled, kind="stable")
    steps = filled[order] * np.arange(len(p), 0, -1)
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return np.where(np.isnan(p), np.nan, adjusted)


def minimum_detectable(error: Array, degrees: Array) -> Array:
    """The true gain that a study like this one finds significant with probability 80%: (t_0.975 + t_0.8) * error."""
    return (t_quantile(degrees, (1 + CONFIDENCE) / 2) + t_quantile(degrees, POWER)) * error


def seeds_needed(seeds: Array, questions: Array, residual: Array, count: Array, gain: float = 0.01) -> Array:
    """Seeds at which `minimum_detectable` falls to `gain` with the same questions; inf where MAX_SEEDS are too few.

    From the variance parts [R] of contrasts over count [R] seeds. More seeds shrink var_a and var_c, never var_b / Q:
    where that alone is too much, only more questions help.
    """
    of_seeds = count * seeds  # var_a + var_c / Q
    fixed = np.maximum(questions - residual, 0)  # var_b / Q

    def enough(tried: Array) -> NDArray[np.bool_]:
        variance = of_seeds / tried + fixed
        with np.errstate(invalid="ignore", divide="ignore"):
            share = np.where(variance > 0, of_seeds / tried / variance, 1.0)
            degrees = (tried - 1) / np.maximum(share, 1e-3) ** 2
        return np.asarray(minimum_detectable(np.sqrt(variance), degrees) <= gain)

    low, high = np.full(len(seeds), 1.0), np.full(len(seeds), float(MAX_SEEDS))  # low is too few, high may do
    reachable = enough(high)
    while (high - low > 1).any():
        middle = np.floor((low + high) / 2).clip(2)
        found = enough(middle)
        low, high = np.where(found, low, middle), np.where(found, middle, high)
    return np.where(np.isnan(of_seeds), np.nan, np.where(reachable, high, np.inf))


# ---- the bootstrap beside it -----------------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def _weights(count: int, stream: int) -> NDArray[np.float32]:
    """How often each of `count` units is drawn in each resample, divided by count: [count, RESAMPLES]."""
    draws = np.random.default_rng([stream, count]).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    weights = np.ascontiguousarray(draws.T / count, dtype=np.float32)
    weights.flags.writeable = False
    return weights


def bca(blocks: Sequence[tuple[float, Array]]) -> tuple[Array, Array]:
    """BCa interval (Efron 1987) of the same sum of blocks [M, S, Q], seeds and questions both drawn with replacement.

    A drawn seed is drawn in every block and on both sides, a drawn question with every seed (Owen 2007, the pigeonhole
    bootstrap). The acceleration is that of several samples (Efron & Tibshirani 1993, section 14.3).
    """
    from scipy.special import ndtr, ndtri

    problems, count = blocks[0][1].shape[:2]
    of_seeds = _weights(count, 0)
    resampled, by_seed = np.zeros((problems, RESAMPLES)), np.zeros((problems, count))
    cubes, squares = np.zeros(problems), np.zeros(problems)
    for stream, (weight, block) in enumerate(blocks, start=1):
        questions = block.shape[-1]
        resampled += weight * (of_seeds * (block.astype(np.float32) @ _weights(questions, stream))).sum(1)
        rows = block.mean(-1)
        by_seed += weight * rows
        influence = weight * (block.mean(-2) - rows.mean(-1, keepdims=True)) / questions
        cubes, squares = cubes + (influence**3).sum(-1), squares + (influence**2).sum(-1)
    observed = by_seed.mean(-1)
    influence = (by_seed - observed[:, None]) / count
    cubes, squares = cubes + (influence**3).sum(-1), squares + (influence**2).sum(-1)
    resampled.sort(-1)
    below = (resampled < observed[:, None]).mean(-1) + 0.5 * (resampled == observed[:, None]).mean(-1)
    bias = ndtri(below.clip(1 / RESAMPLES, 1 - 1 / RESAMPLES))
    acceleration = np.divide(cubes, 6 * squares**1.5, out=np.zeros(problems), where=squares > 0)
    ends = []
    for level in ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2):
        z = bias + ndtri(level)
        position = ndtr(bias + z / (1 - acceleration * z)) * (RESAMPLES - 1)
        whole = np.floor(position).astype(int).clip(0, RESAMPLES - 2)
        pair = np.take_along_axis(resampled, np.stack([whole, whole + 1], -1), -1)
        ends.append(pair[:, 0] + (position - whole) * (pair[:, 1] - pair[:, 0]))
    unknown = ((squares == 0) & (observed != 0)) | (count < 2)
    return np.where(unknown, np.nan, ends[0]), np.where(unknown, np.nan, ends[1])


# ---- summaries over seeds --------------------------------------------------------------------------------------------


def interquartile_mean(values: Array) -> Array:
    """Mean of the middle half along the last axis (arXiv 2108.13264): a quarter, rounded down, is cut at each end."""
    cut = values.shape[-1] // 4
    return np.asarray(np.sort(values, axis=-1)[..., cut : values.shape[-1] - cut].mean(-1))


def probability_of_improvement(level: Array, baseline: Array) -> Array:
    """How often a run of the level beats a run of the baseline, ties one half (arXiv 2108.13264).

    Args:
        level: [R, ..., S], runs of S seeds.
        baseline: likewise.

    Returns:
        [R], means over all axes but the first.
    """
    sign = np.sign(level[..., :, None] - baseline[..., None, :])
    return np.asarray((sign / 2 + 0.5).reshape(len(level), -1).mean(-1))
