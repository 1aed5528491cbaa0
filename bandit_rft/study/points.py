"""What stands behind a pooled gain: the gain of each seed, curves with paired bands, and intervals for all at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bandit_rft.study.analyse import Condition, Level, Row
from bandit_rft.study.cells import BASELINE, Cell, Study
from bandit_rft.study.statistics import CONFIDENCE, POWER, Array, contrast, t_interval, t_quantile


@dataclass
class Curve:
    """A level beside the baseline, at the evaluations that all their runs have; means over conditions and seeds.

    `low` and `high` are the baseline's curve plus the pointwise 95% t-interval over seeds of the paired difference:
    where the band leaves out the baseline's curve, the two differ at that round. NaN with one seed.
    """

    rounds: list[int]
    level: Array
    baseline: Array
    low: Array
    high: Array
    seeds: Array  # of the level: [seeds, rounds], means over conditions


class Pairs:
    """Paired runs of a study's levels and its baseline."""

    def __init__(self, study: Study):
        self.study = study
        self.index = study.index()

    def _seeds(self, level: Level, conditions: Sequence[Condition]) -> tuple[list[Condition], list[int]]:
        """The conditions that have a pair at all, and the seeds that all of those have (as the analysis pools)."""
        of_level, base = self.index.get(level, {}), self.index.get(BASELINE, {})
        pairs = {c: of_level.get(c, {}).keys() & base.get(c, {}).keys() for c in conditions}
        used = [c for c in conditions if pairs[c]]
        return used, sorted(set.intersection(*(set(pairs[c]) for c in used))) if used else []

    def gains(self, level: Level, split: str, conditions: Sequence[Condition]) -> tuple[float, ...]:
        """The gain in final Pass@1 of each seed, averaged over the conditions."""
        used, seeds = self._seeds(level, conditions)

        def gain(run: Cell, base: Cell) -> float:
            ours, theirs = run.outcomes[split], base.outcomes[split]
            common, a, b = np.intersect1d(ours.queries, theirs.queries, assume_unique=True, return_indices=True)
            if not len(common):
                return math.nan
            return float(np.mean(ours.rewards["final"][a].astype(float) - theirs.rewards["final"][b]))

        of_level, base = self.index.get(level, {}), self.index.get(BASELINE, {})
        return tuple(float(np.mean([gain(of_level[c][s], base[c][s]) for c in used])) for s in seeds)

    def curve(self, level: Level, split: str, conditions: Sequence[Condition]) -> Curve | None:
        """Learning curves of a level and the baseline; None where no evaluated round is common to all their runs."""
        used, seeds = self._seeds(level, conditions)
        if not seeds:
            return None
        key = f"eval/{split}/pass@1"
        sides = [
            [[dict(self.index[side][c][s].curves.get(key, ())) for s in seeds] for c in used]
            for side in (level, BASELINE)
        ]
        runs = [curve for side in sides for of_condition in side for curve in of_condition]
        rounds = sorted(set.intersection(*(set(curve) for curve in runs)))
        if not rounds:
            return None
        values = np.array([[[[run[r] for r in rounds] for run in part] for part in side] for side in sides])
        ours, base = values.mean(1)  # [seeds, rounds] each
        found = contrast([(1.0, (ours - base).T[..., None])])
        low, high = t_interval(found.gain, np.sqrt(found.variance), found.degrees)
        start = base.mean(0)
        return Curve(rounds, ours.mean(0), start, start + low, start + high, ours)


def simultaneous(row: Row) -> tuple[float, float]:
    """95% interval of a gain that holds for the whole family at once; the analysis' own where it gives one.

    Otherwise Bonferroni's: where it leaves out 0, Holm's correction rejects too.
    """
    if "simultaneous_low" in row:
        return row["simultaneous_low"], row["simultaneous_high"]
    half = float(t_quantile(row["degrees"], _level(row))) * row["error"]
    return row["gain"] - half, row["gain"] + half


def detectable(row: Row) -> float:
    """The true gain that is found with 80% power by the corrected test of this row's family (its strictest step)."""
    return float(t_quantile(row["degrees"], _level(row)) + t_quantile(row["degrees"], POWER)) * float(row["error"])


def _level(row: Row) -> float:
    return 1 - (1 - CONFIDENCE) / 2 / max(1, int(row["family"]))
