"""How sure a marginal gain is: intervals, p-values, planning numbers; differences are paired over seeds and questions.

A block is an array D [..., S, Q]: what a level earned minus what the baseline earned, with seed s on question q. The
same seeds and questions stand on both sides. The model is two crossed random effects,

    D[s, q] = gain + a[s] + b[q] + c[s, q],    Var(mean of D) = var_a / S + var_b / Q + var_c / (S Q),

so that the interval speaks about new seeds and new questions, not only about those that were run. Where every run had
questions of its own there is no b: questions belong to the run's luck a. Leading dimensions are independent problems,
computed together.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
CONFIDENCE = 0.95
POWER = 0.8
#: A gain within -+ this counts as little: a tenth of what the baseline of the tiny study learned.
MARGIN = 0.02
RESAMPLES = 1000
MAX_SEEDS = 10_000


class Block(NamedTuple):
    """A term of a contrast: weight * mean(values), values [..., S, Q].

    Blocks of one `seeds` key were run with the same seeds, those of one `questions` key answered the same questions.
    `questions` None: every run had questions of its own, which then belong to the run's luck.
    """

    weight: float
    values: Array
    seeds: Hashable = 0
    questions: Hashable | None = ()  # (): of this block alone, the same for all its seeds


class Part(NamedTuple):
    """An estimated part of a variance [...] and its degrees of freedom."""

    value: Array
    degrees: float


class Spread(NamedTuple):
    """A gain's standard error and degrees of freedom, estimated twice [...]; what says less counts.

    `error` has the floor under the seeds' part (Contrast.variance), and with it the residual's many degrees of freedom
    just where the seeds' part came out small by accident, which is where few seeds give their smallest p-values.
    `runs_error` has no floor, and the degrees of freedom of the seeds. None: there is only the first.
    """

    error: Array
    degrees: Array
    runs_error: Array | None = None
    runs_degrees: Array | None = None

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]]) -> Spread:
        """As the rows of results.csv have it, [R]."""
        return cls(*(np.array([row[name] for row in rows], dtype=np.float64) for name in cls._fields))

    def least(self, says: Callable[[Array, Array], Array]) -> Array:
        """The larger of a function of error and degrees, of both estimates."""
        first = says(self.error, self.degrees)
        if self.runs_error is None or self.runs_degrees is None:
            return first
        return np.asarray(np.fmax(first, says(self.runs_error, self.runs_degrees)))


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
    degrees: Array  # of freedom of the variance
    runs_degrees: Array  # and of that without its floor
    seed_count: int  # of the group of blocks with the fewest

    @property
    def variance(self) -> Array:
        """max(seeds, residual) + max(0, questions - residual).

        The seeds' part holds the residual, so it can only be smaller by accident; the questions' own part is not
        negative.
        """
        return np.fmax(self.seeds, self.residual) + np.maximum(self.questions - self.residual, 0)

    @property
    def error(self) -> Array:
        """Standard error of the gain; NaN where it cannot be known (one seed, or no variation but a gain)."""
        error = np.sqrt(self.variance)
        unknown = (error == 0) & (self.gain != 0)
        return np.where(unknown | (self.seed_count < 2), np.nan, error)

    @property
    def spread(self) -> Spread:
        """What intervals and p-values are made of."""
        alone = np.sqrt(self.seeds + np.maximum(self.questions - self.residual, 0))
        return Spread(self.error, self.degrees, np.where(np.isnan(self.error), np.nan, alone), self.runs_degrees)


def contrast(blocks: Sequence[Block | tuple[float, Array]]) -> Contrast:
    """Sum of weight * mean(D) over blocks and its variance.

    Blocks may share seeds (one seed list for all tasks; train +1 and test -1) and questions (models on one task). Parts
    of the variance are the mean squares of the two-way layout without replication, where what shares seeds, questions,
    or both is added up first.

    Raises:
        ValueError: blocks of one key have different numbers of seeds or of questions.
    """
    by_seed: dict[Hashable, Array] = {}
    by_question: dict[Hashable, Array] = {}
    crossed, within = list[Part](), list[Part]()
    for weight, values, seeds_key, questions_key in merged(blocks):
        count, n = values.shape[-2:]
        rows, columns = values.mean(-1), values.mean(-2)
        _add(by_seed, seeds_key, weight * rows, "seeds")
        if n < 2:
            continue
        if questions_key is None:
            square = ((values - rows[..., None]) ** 2).sum((-2, -1)) / (count * (n - 1))
            within.append(Part(weight**2 * square / (count * n), count * (n - 1)))
            continue
        _add(by_question, questions_key, weight * columns, "questions")
        if count > 1:
            # sum of squares about both margins = total - rows - columns, without an [S, Q] temporary
            total = ((values - rows.mean(-1)[..., None, None]) ** 2).sum((-2, -1))
            rest = total - n * count * (rows.var(-1) + columns.var(-1))
            freedom = (count - 1) * (n - 1)
            crossed.append(Part(weight**2 * np.maximum(rest, 0) / freedom / (count * n), freedom))
    gain = np.sum([rows.mean(-1) for rows in by_seed.values()], axis=0)
    seeds, questions = ([_margin(values) for values in margin.values()] for margin in (by_seed, by_question))
    return combine(gain, seeds, questions, crossed, within, min(rows.shape[-1] for rows in by_seed.values()))


def merged(blocks: Sequence[Block | tuple[float, Array]]) -> list[Block]:
    """Blocks with seeds and questions in common added up, so that each pair of keys stands once; float64."""
    found: dict[tuple[Hashable, Hashable], Block] = {}
    for i, given in enumerate(blocks):
        block = Block(*given)
        values = np.asarray(block.values, dtype=np.float64)
        questions = (i,) if block.questions == () else block.questions
        key = (block.seeds, questions if questions is not None else ("own", i))
        if key in found:
            before = found[key]
            if before.values.shape != values.shape:
                raise ValueError(
                    f"blocks must share their seeds and questions; got {before.values.shape} and {values.shape}"
                )
            values, weight = before.weight * before.values + block.weight * values, 1.0
        else:
            weight = block.weight
        found[key] = Block(weight, values, block.seeds, questions)
    return list(found.values())


def _add(sums: dict[Hashable, Array], key: Hashable, values: Array, what: str) -> None:
    if key in sums and sums[key].shape != values.shape:
        raise ValueError(f"blocks must share their {what}; got {sums[key].shape[-1]} and {values.shape[-1]}")
    sums[key] = sums[key] + values if key in sums else values


def _margin(values: Array) -> Part:
    """The variance of a mean over the last axis; unknown where that has one entry."""
    count = values.shape[-1]
    return Part(values.var(-1, ddof=1) / count if count > 1 else np.full(values.shape[:-1], np.nan), max(count - 1, 1))


def combine(
    gain: Array,
    seeds: Sequence[Part],
    questions: Sequence[Part],
    crossed: Sequence[Part],
    within: Sequence[Part],
    seed_count: int,
) -> Contrast:
    """The contrast whose variance has these parts, and its degrees of freedom.

    Args:
        gain: [...].
        seeds: one a group of blocks with the same seeds.
        questions: likewise.
        crossed: residuals of seeds against questions; seeds and questions hold them too.
        within: of runs that had questions of their own; seeds hold them too.
        seed_count: of the group with the fewest.
    """
    zero = np.zeros(np.shape(gain))
    of_seeds, of_questions, rest, own = (
        np.sum([zero, *(part.value for part in parts)], axis=0) for parts in (seeds, questions, crossed, within)
    )
    of_seeds_spread, of_questions_spread, rest_spread, own_spread = (
        np.sum([zero, *(part.value**2 / part.degrees for part in parts)], axis=0)
        for parts in (seeds, questions, crossed, within)
    )
    found = Contrast(gain, of_seeds, of_questions + own, rest + own, zero, zero, seed_count)
    spread = of_seeds_spread + of_questions_spread + rest_spread
    floored = spread + np.where(of_seeds < rest + own, rest_spread + own_spread, 0)
    least = max(seed_count - 1, 1)

    def freedom(error: Array, spread: Array) -> Array:
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.maximum(np.where(spread > 0, error**4 / spread, least), least)

    runs_error = found.spread.runs_error
    assert runs_error is not None
    return replace(found, degrees=freedom(np.sqrt(found.variance), floored), runs_degrees=freedom(runs_error, spread))


def t_quantile(degrees: Any, level: float) -> Array:
    """Quantile of Student's t, elementwise."""
    from scipy.special import stdtrit

    return np.asarray(stdtrit(degrees, level), dtype=np.float64)


def t_interval(gain: Array, spread: Spread, level: float = (1 + CONFIDENCE) / 2) -> tuple[Array, Array]:
    """Two-sided interval gain -+ t_level * error; 95% unless `level` says otherwise."""
    half = spread.least(lambda error, degrees: t_quantile(degrees, level) * error)
    return gain - half, gain + half


def p_value(gain: Array, spread: Spread) -> Array:
    """Two-sided p-value of "the gain is 0"; 1 where there is no difference at all, NaN where the error is unknown."""
    from scipy.special import stdtr

    with np.errstate(invalid="ignore", divide="ignore"):
        p = spread.least(lambda error, degrees: 2 * stdtr(degrees, -np.abs(gain) / error))
    return np.where((gain == 0) & (spread.error == 0), 1.0, p)


def equivalence(gain: Array, spread: Spread, margin: float = MARGIN) -> Array:
    """p-value of two one-sided tests (Schuirmann 1987): small where the gain is shown to lie within -+ margin."""
    from scipy.special import stdtr

    with np.errstate(invalid="ignore", divide="ignore"):
        p = spread.least(lambda error, degrees: stdtr(degrees, (np.abs(gain) - margin) / error))
    return np.where(np.isnan(spread.error), np.nan, p)


def nothing_differed(runs: int, span: float = 1.0) -> tuple[float, float]:
    """What can be said where no reward of so many paired runs differed: (bound of |gain|, p-value of equivalence).

    Were a pair of runs to differ at all with probability x, none of `runs` would with probability (1 - x)^runs, and the
    gain is at most span * x. The bound has the x for which that is 5%, about 3 / runs; the p-value is that probability
    for the x at the margin. Questions of one run are no independent draws of it and do not count.

    Args:
        runs: independent paired runs.
        span: the largest difference of one pair; 1 of two rewards between 0 and 1.
    """
    return span * float(1 - (1 - CONFIDENCE) ** (1 / runs)), float((1 - MARGIN / span) ** runs)


def holm(p: Array) -> Array:
    """Holm's (1979) step-down adjusted p-values of one family; NaN stays NaN but counts as a test."""
    filled = np.where(np.isnan(p), 1.0, p)
    order = np.argsort(filled, kind="stable")
    steps = filled[order] * np.arange(len(p), 0, -1)
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return np.where(np.isnan(p), np.nan, adjusted)


def minimum_detectable(spread: Spread, level: float = (1 + CONFIDENCE) / 2) -> Array:
    """The true gain that a study like this one finds significant with probability 80%.

    The test rejects beyond t_level, and its statistic is noncentral t: the next study estimates its error anew. With
    few degrees of freedom that takes more than the (t_level + t_0.8) * error of an error that is known.

    Args:
        spread: true standard error of the gain, and the degrees of freedom of its estimate.
        level: 1 - half of the two-sided level of the test.
    """
    from scipy.special import nctdtrinc

    return np.asarray(
        spread.least(lambda error, degrees: nctdtrinc(degrees, 1 - POWER, t_quantile(degrees, level)) * error),
        dtype=np.float64,
    )


def seeds_needed(seeds: Array, questions: Array, residual: Array, count: Array, gain: float = 0.01) -> Array:
    """Seeds at which `minimum_detectable` falls to `gain` with the same questions; inf where MAX_SEEDS are too few.

    From the variance parts [R] of contrasts over count [R] seeds (a condition, where conditions have seeds of their
    own). More seeds shrink var_a and var_c, never var_b / Q: where that alone is too much, only more questions help.
    """
    of_seeds = count * np.fmax(seeds, residual)  # var_a + var_c / Q
    fixed = np.maximum(questions - residual, 0)  # var_b / Q

    def enough(tried: Array) -> NDArray[np.bool_]:
        variance = of_seeds / tried + fixed
        with np.errstate(invalid="ignore", divide="ignore"):
            share = np.where(variance > 0, of_seeds / tried / variance, 1.0)
            degrees = (tried - 1) / np.maximum(share, 1e-3) ** 2
        return np.asarray(minimum_detectable(Spread(np.sqrt(variance), degrees)) <= gain)

    low, high = np.full(len(seeds), 1.0), np.full(len(seeds), float(MAX_SEEDS))  # low is too few, high may do
    reachable = enough(high)
    while (high - low > 1).any():
        middle = np.floor((low + high) / 2).clip(2)
        found = enough(middle)
        low, high = np.where(found, low, middle), np.where(found, middle, high)
    return np.where(np.isnan(seeds), np.nan, np.where(reachable, high, np.inf))


# ---- the bootstrap beside it -----------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def _weights(count: int, stream: int) -> NDArray[np.float32]:
    """How often each of `count` units is drawn in each resample, divided by count: [count, RESAMPLES]."""
    draws = np.random.default_rng([stream, count]).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    weights = np.ascontiguousarray(draws.T / count, dtype=np.float32)
    weights.flags.writeable = False
    return weights


def bca(blocks: Sequence[Block | tuple[float, Array]]) -> tuple[Array, Array]:
    """BCa interval (Efron 1987) of the same sum of blocks [M, S, Q], seeds and questions both drawn with replacement.

    A drawn seed is drawn in every block of its seeds and on both sides, a drawn question with every seed (Owen 2007,
    the pigeonhole bootstrap); questions that belong to a run are drawn with it. The acceleration is that of several
    samples (Efron & Tibshirani 1993, section 14.3).
    """
    from scipy.special import ndtr, ndtri

    terms = merged(blocks)
    problems = terms[0].values.shape[0]
    streams = {key: i for i, key in enumerate(dict.fromkeys(block.seeds for block in terms))}
    streams |= {("q", key): len(streams) + i for i, key in enumerate(dict.fromkeys(b.questions for b in terms))}
    resampled, observed = np.zeros((problems, RESAMPLES)), np.zeros(problems)
    influence: dict[Hashable, Array] = {}  # of each seed or question, by group
    for weight, values, seeds, questions in terms:
        count, n = values.shape[-2:]
        rows, mean = values.mean(-1), values.mean((-2, -1))
        of_seeds = _weights(count, 2 * streams[seeds])
        influence[seeds] = influence.get(seeds, 0) + weight * (rows - mean[:, None]) / count
        observed = observed + weight * mean
        if questions is None or n < 2:
            resampled += weight * (rows.astype(np.float32) @ of_seeds)
            continue
        drawn = values.astype(np.float32) @ _weights(n, 2 * streams["q", questions] + 1)
        resampled += weight * (of_seeds * drawn).sum(1)
        key = ("q", questions)
        influence[key] = influence.get(key, 0) + weight * (values.mean(-2) - mean[:, None]) / n
    cubes = np.sum([(values**3).sum(-1) for values in influence.values()], axis=0)
    squares = np.sum([(values**2).sum(-1) for values in influence.values()], axis=0)
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
    few = min(block.values.shape[-2] for block in terms) < 2
    unknown = ((squares == 0) & (observed != 0)) | few
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
