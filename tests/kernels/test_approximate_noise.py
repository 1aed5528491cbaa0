"""The margin of `nearly_perturbed`: the formula, with the special function unit at its worst, against float64."""

from __future__ import annotations

import numpy as np
import pytest

MARGIN = 2.0**-14
LN2 = np.float32(np.log(2))


def words() -> np.ndarray:
    """Random words, the edges of the uniform, and those around the formula's switch at u = 1/128."""
    generator = np.random.default_rng(0)
    edges = np.concatenate([np.arange(4096), 2**32 - 1 - np.arange(4096), 2**25 + np.arange(-4096, 4096)])
    scales = (2.0 ** generator.uniform(0, 32, 400_000)).astype(np.uint64)
    return np.concatenate([edges.astype(np.uint64), scales, generator.integers(0, 2**32, 600_000, dtype=np.uint64)])


def uniform(word: np.ndarray) -> np.ndarray:
    u = word.astype(np.float32) * np.float32(2.0**-32) + np.float32(2.0**-33)
    return np.minimum(u, np.float32(1 - 2.0**-24))


def fast_log2(x: np.ndarray, sign: float) -> np.ndarray:
    """lg2.approx.f32 at its documented worst: 2^-22 absolute in [0.5, 2], 2^-22 relative elsewhere."""
    exact = np.log2(x.astype(np.float64))
    off = np.where((x >= 0.5) & (x <= 2), 2.0**-22, 2.0**-22 * np.abs(exact))
    return (exact + sign * off).astype(np.float32)


def approximate(u: np.ndarray, inner: float, outer: float) -> np.ndarray:
    """The noise less log log 2, in steps that round (the kernel's fused ones round less)."""
    one = np.float32(1)
    series = u * (np.float32(1.442695) + u * np.float32(0.7213475))
    return -fast_log2(np.where(u < np.float32(0.0078125), series, -fast_log2(one - u, inner)), outer) * LN2


@pytest.mark.parametrize("inner", [-1.0, 1.0])
@pytest.mark.parametrize("outer", [-1.0, 1.0])
def test_the_approximation_stays_within_two_thirds_of_the_margin(inner: float, outer: float) -> None:
    """The last third is for the error of the exact noise itself, 4 units in the last place of up to 22.9."""
    u = uniform(words())
    truth = -np.log(-np.log1p(-u.astype(np.float64)))
    assert np.abs(truth).max() > 22 and truth.min() < -2.8
    truth += np.log(np.log(2))
    error = np.abs(approximate(u, inner, outer).astype(np.float64) - truth).max()
    assert error < 2 / 3 * MARGIN, error
    of_exact_noise = 4 * 2.0**-19  # units in the last place of 22.9
    assert of_exact_noise < MARGIN / 3


def test_without_the_series_the_margin_would_not_hold() -> None:
    u = uniform(words())
    truth = -np.log(-np.log1p(-u.astype(np.float64)))
    truth += np.log(np.log(2))
    log_only = -fast_log2(np.maximum(-fast_log2(np.float32(1) - u, 1.0), np.float32(1e-38)), 1.0) * LN2
    assert np.abs(log_only - truth).max() > MARGIN
