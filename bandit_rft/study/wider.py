"""What a pooled gain leaves open: new models and tasks, differences between conditions, runs that failed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from bandit_rft.study.cells import BASELINE, SPLITS, Study
from bandit_rft.study.pairing import ALL, Condition, Level, Row
from bandit_rft.study.statistics import Array, Spread, holm, t_interval

#: Metrics whose values lie between 0 and 1, so that a failed run's could have been anything between them.
BOUNDED = ("final", "best", "auc")


def add_wider(study: Study, rows: Sequence[Row]) -> None:
    """Give the rows that pool all conditions further columns, in place.

    `models_low`, `models_high`: a 95% t-interval over the models' mean gains, for models that were not run;
    `conditions_low`, `conditions_high`: over all conditions. `p_interaction`: of "the gain is the same in every
    condition" (Welch's test), `p_interaction_holm` over the levels. `competence_slope` with its interval: how much the
    gain changes with a condition's Pass@1 before training, within tasks. `worst_low`, `worst_high`, of train and test:
    the interval if each pair of which a run failed had differed by -1, or by 1.
    """
    of_condition: dict[tuple[Level, str, str], dict[Condition, Row]] = {}
    for row in rows:
        if ALL not in (row["model"], row["task"]):
            key = ((row["factor"], row["level"]), row["metric"], row["split"])
            of_condition.setdefault(key, {})[row["model"], row["task"]] = row
    families: dict[tuple[str, str], dict[Level, Row]] = {}
    failed = _failed(study)
    for row in rows:
        if row["model"] != ALL or row["task"] != ALL:
            continue
        level = (row["factor"], row["level"])
        own = of_condition.get((level, row["metric"], row["split"]), {})
        row |= _over_models(own) | {"p_interaction": welch(own), "p_interaction_holm": math.nan}
        start = {c: r["baseline"] for c, r in of_condition.get((BASELINE, "learned", row["split"]), {}).items()}
        row |= competence(own, start)
        if row["metric"] in BOUNDED and row["split"] in SPLITS:
            row |= _worst(row, failed.get(level, {}), own)
        families.setdefault((row["metric"], row["split"]), {}).setdefault(study.same_as.get(level, level), row)
    for family in families.values():
        adjusted = holm(np.array([row["p_interaction"] for row in family.values()], dtype=float))
        for row, value in zip(family.values(), adjusted, strict=True):
            row["p_interaction_holm"] = float(value)
    for row in rows:  # other names of the same cells
        level = (row["factor"], row["level"])
        first = families.get((row["metric"], row["split"]), {}).get(study.same_as.get(level, level))
        if row["model"] == row["task"] == ALL and first is not None:
            row["p_interaction_holm"] = first["p_interaction_holm"]


def _over_models(own: Mapping[Condition, Row]) -> Row:
    models: dict[str, list[float]] = {}
    for (model, _), row in own.items():
        models.setdefault(model, []).append(row["gain"])
    found: Row = {}
    for name, values in (
        ("models", [float(np.mean(gains)) for gains in models.values()]),
        ("conditions", [gain for gains in models.values() for gain in gains]),
    ):
        low, high = _t_over(np.array(values)) if len(values) > 2 else (math.nan, math.nan)
        found |= {f"{name}_low": low, f"{name}_high": high}
    return found


def _t_over(values: Array) -> tuple[float, float]:
    error = values.std(ddof=1) / math.sqrt(len(values))
    low, high = t_interval(values.mean(), Spread(error, np.asarray(float(len(values) - 1))))
    return float(low), float(high)


def welch(own: Mapping[Condition, Row]) -> float:
    """p-value of "the gain is the same in every condition" (Welch 1951): means with errors of their own, few runs."""
    from scipy.special import fdtrc

    gain, error, degrees = (np.array([row[key] for row in own.values()]) for key in ("gain", "error", "degrees"))
    count = len(gain)
    if count < 2 or not (error > 0).all():
        return math.nan
    weight = error**-2
    mean = (weight * gain).sum() / weight.sum()
    spread = ((1 - weight / weight.sum()) ** 2 / degrees).sum()
    between = (weight * (gain - mean) ** 2).sum() / (count - 1)
    statistic = between / (1 + 2 * (count - 2) / (count**2 - 1) * spread)
    return float(fdtrc(count - 1, (count**2 - 1) / (3 * spread), statistic))


def competence(own: Mapping[Condition, Row], start: Mapping[Condition, float]) -> Row:
    """The slope of the conditions' gains over their Pass@1 before training, each task with a mean of its own.

    Ordinary least squares; the interval is Student's, over conditions. Unknown with fewer than three conditions more
    than tasks.
    """
    conditions = [c for c in own if c in start]
    tasks = dict.fromkeys(task for _, task in conditions)
    x, y = (np.array([of[c] for c in conditions]) for of in (start, {c: own[c]["gain"] for c in conditions}))
    for task in tasks:
        members = np.array([c[1] == task for c in conditions])
        x[members], y[members] = x[members] - x[members].mean(), y[members] - y[members].mean()
    degrees, spread = len(conditions) - len(tasks) - 1, float((x**2).sum()) if len(x) else 0.0
    names = ("competence_slope", "competence_low", "competence_high")
    if degrees < 2 or spread < 1e-12:
        return dict.fromkeys(names, math.nan)
    slope = float((x * y).sum() / spread)
    error = math.sqrt(float(((y - slope * x) ** 2).sum()) / degrees / spread)
    low, high = t_interval(np.asarray(slope), Spread(np.asarray(error), np.asarray(float(degrees))))
    return dict(zip(names, (slope, float(low), float(high)), strict=True))


def _failed(study: Study) -> dict[Level, dict[Condition, int]]:
    """How many runs of a level failed in each condition; the baseline's count for every level, as its pairs lack."""
    found: dict[Level, dict[Condition, set[int]]] = {}
    base: dict[Condition, set[int]] = {}
    for cell in study.cells:
        if cell.status == "failed":
            for place in cell.places:
                found.setdefault(place, {}).setdefault(cell.condition, set()).add(cell.seed)
            if cell.baseline:
                base.setdefault(cell.condition, set()).add(cell.seed)
    levels = [BASELINE, *study.levels]
    return {
        level: {
            c: len(found.get(level, {}).get(c, set()) | base.get(c, set())) for c in study.conditions
        }
        for level in levels
    }  # fmt: skip


def _worst(row: Row, failed: Mapping[Condition, int], own: Mapping[Condition, Row]) -> Row:
    """The interval with failed pairs at the worst and at the best, a difference of -1 and of 1.

    Their share is the mean over conditions, those where every pair failed included.
    """
    pairs = {c: own[c]["seeds"] if c in own else 0 for c in failed}
    share = float(np.mean([n / (n + pairs[c]) if n else 0.0 for c, n in failed.items()])) if failed else 0.0
    return {"worst_low": (1 - share) * row["low"] - share, "worst_high": (1 - share) * row["high"] + share}
