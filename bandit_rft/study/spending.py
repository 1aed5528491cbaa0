"""Learning curves, and what a run and a point of gain cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from bandit_rft.study.cells import BASELINE, SPLITS, Cell, Study, heights
from bandit_rft.study.pairing import ALL, Cells, Condition, Level, Row, scopes
from bandit_rft.study.statistics import Spread, contrast, t_interval

ONE_POINT = 0.01


def curve_rows(study: Study, index: Mapping[Level, Cells]) -> list[Row]:
    """Pass@1 where every seed's is known (`Study.marks`), with a pointwise 95% t-interval over seeds."""
    rows: list[Row] = []
    for level in [BASELINE, *study.levels]:
        cells = index.get(level, {})
        groups = [(ALL, ALL, [c for c in study.conditions if cells.get(c)])] if len(study.conditions) > 1 else []
        groups += [(m, t, [(m, t)]) for m, t in study.conditions if cells.get((m, t))]
        for model, task, conditions in groups:
            if not conditions:
                continue
            seeds = sorted(set.intersection(*(set(cells[c]) for c in conditions)))
            for split in SPLITS:
                curves = [[cells[c][s].curves.get(split, []) for s in seeds] for c in conditions]
                marks = study.marks(curve for part in curves for curve in part)
                if not marks:
                    continue
                values = np.mean([[heights(curve, marks) for curve in part] for part in curves], axis=0)  # [S, marks]
                for mark, by_seed in zip(marks, values.T, strict=True):
                    found = contrast([(1.0, by_seed[:, None])])
                    low, high = t_interval(found.gain, Spread(np.sqrt(found.variance), found.degrees))
                    rows.append({
                        "factor": level[0], "level": level[1], "model": model, "task": task, "split": split,
                        study.axis: int(mark) if mark == int(mark) else mark,
                        "seeds": len(seeds), "conditions": len(conditions),
                        "value": float(found.gain), "low": float(low), "high": float(high),
                    })  # fmt: skip
    return rows


def cost_rows(study: Study, index: Mapping[Level, Cells], results: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Means a run, and the cost of one point (0.01) of final test Pass@1.

    For what was learned from the start that is all that was spent; for what was gained over the baseline, what was
    spent beyond it.

    Only where the interval lies above 0: dividing by a gain that may be nothing gives a number that means nothing.
    """
    gains = {
        (r["metric"], r["factor"], r["level"], r["model"], r["task"]): r
        for r in results
        if r["split"] == "test" and r["metric"] in ("learned", "final")
    }

    def points(metric: str, level: Level, model: str, task: str) -> float:
        row = gains.get((metric, *level, model, task))
        return row["gain"] / ONE_POINT if row is not None and row["low"] > 0 else math.nan

    costs: list[Row] = []
    timings: list[Row] = []
    spent_by_baseline: dict[Condition, dict[str, float]] = {}
    for level in [BASELINE, *study.levels]:
        cells = index.get(level, {})
        for model, task, conditions in scopes(study.conditions):
            runs = [cell for c in conditions for cell in cells.get(c, {}).values()]
            if not runs:
                continue
            spent = {key: math.fsum(_spent(run)[key] for run in runs) / len(runs) for key in _spent(runs[0])}
            before = spent_by_baseline.setdefault((model, task), spent)
            learned, gained = (points(metric, level, model, task) for metric in ("learned", "final"))
            head = {"factor": level[0], "level": level[1], "model": model, "task": task, "runs": len(runs)}
            for table, keys in (
                (costs, ("rounds", "tokens_generated", "tokens_trained")), (timings, ("seconds", "gpu_hours"))
            ):  # fmt: skip
                row = head | {key: spent[key] for key in keys}
                for key in keys[-2:]:
                    row[f"{key}_per_point"] = spent[key] / learned
                    row[f"extra_{key}_per_point"] = (spent[key] - before[key]) / gained
                table.append(row)
            timings[-1]["seconds_evaluating"] = spent["seconds_evaluating"]
    return costs, timings


def _spent(cell: Cell) -> dict[str, float]:
    """What a run used up; training and evaluation apart. GPUs: cell.json's `gpus`, else 1 where the device is CUDA."""
    evaluating = cell.totals.get("seconds/evaluate", 0.0)
    seconds = cell.totals.get("seconds/round", 0.0) - evaluating
    gpus = cell.record.get("gpus", 1 if str(cell.config.get("device", "")).startswith("cuda") else math.nan)
    return {
        "rounds": cell.totals["rounds"], "tokens_generated": cell.totals.get("tokens/generated", 0.0),
        "tokens_trained": cell.totals.get("tokens/trained", 0.0), "seconds": seconds, "seconds_evaluating": evaluating,
        "gpu_hours": float(gpus) * seconds / 3600 if isinstance(gpus, int | float) else math.nan,
    }  # fmt: skip
