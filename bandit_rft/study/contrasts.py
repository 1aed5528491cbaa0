"""The comparisons that a study file names under `contrasts`: weighted sums of levels, paired over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from bandit_rft.study.cells import BASELINE, SPLITS, Study
from bandit_rft.study.pairing import ALL, Level, Row, blocks_of, combination, scopes, share_seeds, usable
from bandit_rft.study.plan import StudyError, read_contrasts
from bandit_rft.study.statistics import contrast, equivalence, holm, nothing_differed, p_value, t_interval

METRICS = ("final", "auc")


def contrast_rows(study: Study) -> list[Row]:
    """Each comparison, for final Pass@1 and the area under the curve, train and test, pooled and by task.

    `family` and `name` are the study file's, `gain` is the weighted sum. Holm's families are the file's, for each
    metric, split and scope.
    """
    known = {level for cell in study.cells for level in cell.places} | {BASELINE}
    try:
        wanted = read_contrasts(study.settings, known)
    except StudyError:
        return []  # a level that this folder's plan does not have
    rows = [row for key, weights in wanted.items() for row in _rows(study, key, weights)]
    families: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        families.setdefault((row["family"], row["metric"], row["split"], row["model"], row["task"]), []).append(row)
    for family in families.values():
        for row, value in zip(family, holm(np.array([row["p"] for row in family])), strict=True):
            row |= {"p_holm": float(value), "comparisons": len(family)}
    return rows


def _rows(study: Study, key: tuple[str, str], weights: Mapping[Level, float]) -> list[Row]:
    index, shared = study.index(), share_seeds(study)
    sides = {level: index.get(level, {}) for level in weights}
    pairs = {
        c: tuple(sorted(set.intersection(*(set(cells.get(c, {})) for cells in sides.values()))))
        for c in study.conditions
    }
    rows = []
    for model, task, conditions in scopes(study.conditions):
        used = usable(pairs, conditions, shared)
        if not used or model != ALL:
            continue
        for split in SPLITS:
            parts = {
                c: combination(
                    [(weights[v], [cells[c][s].outcomes[split] for s in seeds]) for v, cells in sides.items()], METRICS
                )
                for c, seeds in used.items()
            }
            found = contrast(blocks_of(parts, split, shared))
            low, high = t_interval(found.gain, found.spread)
            p, equivalent = p_value(found.gain, found.spread), equivalence(found.gain, found.spread)
            runs = min(map(len, used.values())) * (1 if shared else len(used))
            if runs > 1 and (same := (found.gain == 0) & (found.error == 0)).any():  # of finitely many runs
                bound, chance = nothing_differed(runs, sum(map(abs, weights.values())) / 2)
                low, high = np.where(same, -bound, low), np.where(same, bound, high)
                equivalent = np.where(same, chance, equivalent)
            for i, metric in enumerate(METRICS):
                rows.append({
                    "family": key[0], "name": key[1], "metric": metric, "split": split, "model": model, "task": task,
                    "seeds": min(map(len, used.values())), "conditions": len(used), "gain": float(found.gain[i]),
                    "low": float(low[i]), "high": float(high[i]), "p": float(p[i]), "p_holm": math.nan,
                    "p_equivalent": float(equivalent[i]),
                    **{name: float(values[i]) for name, values in found.spread._asdict().items()},
                })  # fmt: skip
    return rows
