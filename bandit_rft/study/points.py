"""What stands behind a pooled gain: the gain of each seed, curves with paired bands, and intervals for all at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bandit_rft.study.cells import BASELINE, Cell, Study, heights
from bandit_rft.study.pairing import Condition, Level, Row
from bandit_rft.study.statistics import CONFIDENCE, Array, Spread, contrast, minimum_detectable, t_interval


@dataclass
class Curve:
    """A level beside the baseline, where all their runs' curves are known; means over conditions and seeds.

    `low` and `high` are the baseline's curve plus the pointwise 95% t-interval over seeds of the paired difference:
    where the band leaves out the baseline's curve, the two differ there. NaN with one seed.
    """

    marks: list[float]  # on the study's axis
    level: Array
    baseline: Array
    low: Array
    high: Array
    seeds: Array  # of the level: [seeds, marks], means over conditions


class Pairs:
    """Paired runs of a study's levels and its baseline."""

    def __init__(self, study: Study):
        self.study = study
        self.index = study.index()
        self._gains: dict[tuple[str, str, str], float] = {}

    def _units(self, level: Level, conditions: Sequence[Condition]) -> list[list[tuple[Cell, Cell]]]:
        """What one dot stands for: a seed's pairs of runs in all conditions that have any, as the analysis pools.

        Where the conditions share no seed, every pair of runs is a unit of its own.
        """
        of_level, base = self.index.get(level, {}), self.index.get(BASELINE, {})
        pairs = {c: sorted(of_level.get(c, {}).keys() & base.get(c, {}).keys()) for c in conditions}
        used = [c for c in conditions if pairs[c]]
        common = sorted(set.intersection(*(set(pairs[c]) for c in used))) if used else []
        groups = [[(c, s) for c in used] for s in common] or [[(c, s)] for c in used for s in pairs[c]]
        return [[(of_level[c][s], base[c][s]) for c, s in group] for group in groups]

    def gains(self, level: Level, split: str, conditions: Sequence[Condition]) -> tuple[float, ...]:
        """The gain in final Pass@1 of each seed, averaged over the conditions."""
        units = self._units(level, conditions)
        return tuple(float(np.mean([self._gain(run, base, split) for run, base in unit])) for unit in units)

    def _gain(self, run: Cell, base: Cell, split: str) -> float:
        """Of one pair of runs, over the questions that both answered."""
        if (run.id, base.id, split) not in self._gains:
            ours, theirs = run.outcomes[split], base.outcomes[split]
            a, b = ours.rewards["final"], theirs.rewards["final"]
            if ours.queries is not theirs.queries:
                _, i, j = np.intersect1d(ours.queries, theirs.queries, assume_unique=True, return_indices=True)
                a, b = a[i], b[j]
            self._gains[run.id, base.id, split] = float(np.mean(a.astype(float) - b)) if len(a) else math.nan
        return self._gains[run.id, base.id, split]

    def curve(self, level: Level, split: str, conditions: Sequence[Condition]) -> Curve | None:
        """Learning curves of a level and the baseline; None where no place is common to all their runs."""
        units = self._units(level, conditions)
        found = [[[run.curves.get(split, []) for run in pair] for pair in unit] for unit in units]
        marks = self.study.marks(curve for unit in found for pair in unit for curve in pair)
        if not marks:
            return None
        values = [np.mean([[heights(curve, marks) for curve in pair] for pair in unit], axis=0) for unit in found]
        ours, base = np.stack(values, 1)  # [seeds, marks] each
        difference = contrast([(1.0, (ours - base).T[..., None])])
        low, high = t_interval(difference.gain, Spread(np.sqrt(difference.variance), difference.degrees))
        start = base.mean(0)
        return Curve(marks, ours.mean(0), start, start + low, start + high, ours)


def simultaneous(row: Row) -> tuple[float, float]:
    """95% interval of a gain that holds for the whole family at once; the analysis' own where it gives one.

    Otherwise Bonferroni's: where it leaves out 0, Holm's correction rejects too.
    """
    if "simultaneous_low" in row:
        return row["simultaneous_low"], row["simultaneous_high"]
    if row["error"] == row["gain"] == 0:  # nothing differed: what the interval says of one, at a level of 0.05 / family
        bound = 1 - (1 - row["high"]) ** (math.log(2 * (1 - _level(row))) / math.log(1 - CONFIDENCE))
        return -bound, bound
    low, high = t_interval(row["gain"], Spread.of([row]), _level(row))
    return float(low[0]), float(high[0])


def detectable(row: Row) -> float:
    """The true gain that is found with 80% power by the corrected test of this row's family (its strictest step)."""
    return float(minimum_detectable(Spread.of([row]), _level(row))[0])


def _level(row: Row) -> float:
    return 1 - (1 - CONFIDENCE) / 2 / max(1, int(row["family"]))
