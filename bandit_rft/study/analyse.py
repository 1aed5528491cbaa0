"""What every design choice adds to the baseline: marginal gains with intervals, learning curves, cost.

All tables are lists of flat rows in a fixed order, so that equal inputs give equal bytes. What a clock measured is in a
table of its own (`timings`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bandit_rft.study.cells import BASELINE, SPLITS, Cell, Outcome, Study, load_study
from bandit_rft.study.packed import Packer
from bandit_rft.study.statistics import (
    Array,
    bca,
    contrast,
    holm,
    interquartile_mean,
    minimum_detectable,
    p_value,
    probability_of_improvement,
    seeds_needed,
    t_interval,
)

Row = dict[str, Any]
Level = tuple[str, str]
Condition = tuple[str, str]
Cells = Mapping[Condition, Mapping[int, Cell]]
Seeds = tuple[int, ...]
ALL = "all"
ONE_POINT = 0.01
#: Gains over the baseline, each question with itself; `learned` is the gain over the model before training.
METRICS = {"final": "final", "best": "best", "auc": "auc", "learned": "final"}
#: Metrics of an evaluation that are not compared from the log: Pass@1 is known question by question.
NOT_COMPARED = ("/pass@1", "/unscored")
LEVELS_AT_ONCE = 16
SIDES = (*SPLITS, "gap")  # gap: the gain on train minus the gain on test


@dataclass
class Analysis:
    """The study's tables, whose columns docs/study.md lists.

    Attributes:
        study: the folder in memory.
        results: gains over the baseline, one row a level, metric, split, model and task.
        curves: Pass@1 by round.
        costs: tokens a run and a point of gain cost.
        timings: likewise in seconds, which no other machine will repeat.
        cells: every cell and whether it is used.
    """

    study: Study
    results: list[Row]
    curves: list[Row]
    costs: list[Row]
    timings: list[Row]
    cells: list[Row]
    _index: dict[tuple[Any, ...], Row] = field(default_factory=dict)

    def row(
        self, level: Level, metric: str = "final", split: str = "test", model: str = ALL, task: str = ALL
    ) -> Row | None:
        """The row of results with this key, or None where there are no usable pairs."""
        if not self._index:
            self._index = {
                (r["factor"], r["level"], r["metric"], r["split"], r["model"], r["task"]): r for r in self.results
            }
        return self._index.get((*level, metric, split, model, task))


def analyse_study(folder: Path | str, packer: Packer | None = None) -> Analysis:
    """Analyse the finished cells of a study folder, or of one that was packed into cells.npz.

    Args:
        folder: as `load_study` takes it.
        packer: is given every cell as it is read.

    Raises:
        FileNotFoundError: neither a study nor a packed one is there.
        ValueError: naming what is wrong in it.
    """
    study = load_study(folder, packer)
    index = study.index()
    results: list[Row] = []
    levels = [BASELINE, *study.levels]
    different = [level for level in levels if level not in study.same_as]
    rows: dict[Level, list[Row]] = {level: [] for level in different}
    for row in _gain_rows(study, different, index, index.get(BASELINE, {})):
        rows[row["factor"], row["level"]].append(row)
    for level in levels:
        same = rows[study.same_as.get(level, level)]
        results += [row | {"factor": level[0], "level": level[1]} for row in same]
    _finish(study, results)
    costs, timings = _costs(study, index, results)
    cells = [
        {
            "id": cell.id, "levels": "; ".join("=".join(place) for place in cell.places), "model": cell.model,
            "task": cell.task, "seed": cell.seed, "baseline": cell.baseline, "status": cell.status,
            "used": not cell.problem, "problem": cell.problem,
        }
        for cell in study.cells
    ]  # fmt: skip
    return Analysis(study, results, _curves(study, index), costs, timings, cells)


# ---- marginal gains --------------------------------------------------------------------------------------------------


@dataclass
class _Difference:
    """Level minus baseline in one condition and split, paired: values [R, S, Q], and both sides' means [R, S]."""

    queries: NDArray[np.int64]
    values: Array
    level: Array
    base: Array


def scopes(conditions: Sequence[Condition]) -> list[tuple[str, str, list[Condition]]]:
    """(model, task, conditions) to report on: all together, by model, by task, and each; "all" where it is pooled."""
    models, tasks = dict.fromkeys(m for m, _ in conditions), dict.fromkeys(t for _, t in conditions)
    found = [(ALL, ALL, list(conditions))]
    if len(models) > 1 and len(tasks) > 1:
        found += [(model, ALL, [c for c in conditions if c[0] == model]) for model in models]
        found += [(ALL, task, [c for c in conditions if c[1] == task]) for task in tasks]
    return found + [(model, task, [(model, task)]) for model, task in conditions]


def _gain_rows(study: Study, levels: Sequence[Level], index: Mapping[Level, Cells], base: Cells) -> list[Row]:
    """All rows of the levels, in their order: every scope, metric and split that has at least one pair of cells."""
    alike: dict[Any, list[Level]] = {}
    for level in levels:
        cells = index.get(level, {})
        pairs = {c: tuple(sorted(cells.get(c, {}).keys() & base.get(c, {}).keys())) for c in study.conditions}
        logged = tuple(frozenset(key for s in seeds for key in cells[c][s].final) for c, seeds in pairs.items())
        alike.setdefault((tuple(pairs.items()), logged, level == BASELINE), []).append(level)
    rows: dict[Level, list[Row]] = {level: [] for level in levels}
    for (pairs, *_), group in alike.items():
        for start in range(0, len(group), LEVELS_AT_ONCE):
            for row in _chunk_rows(study, group[start : start + LEVELS_AT_ONCE], index, base, dict(pairs)):
                rows[row["factor"], row["level"]].append(row)
    return [row for level in levels for row in rows[level]]


def _chunk_rows(
    study: Study, levels: Sequence[Level], index: Mapping[Level, Cells], base: Cells, pairs: Mapping[Condition, Seeds]
) -> list[Row]:
    """Rows of levels that have the same pairs of cells, computed together: the leading axis R is level x metric."""
    rows: list[Row] = []
    names = [(level, metric) for level in levels for metric in METRICS if level != BASELINE or metric == "learned"]
    metrics = list(dict.fromkeys(metric for _, metric in names))
    known: dict[tuple[str, Condition, Seeds], _Difference] = {}
    for model, task, conditions in scopes(study.conditions):
        used = [c for c in conditions if pairs[c]]
        seeds = tuple(sorted(set.intersection(*(set(pairs[c]) for c in used)))) if used else ()
        if not seeds:
            continue
        head = {
            "factor": "", "level": "", "model": model, "task": task, "conditions": len(used),
            "planned_conditions": len(conditions), "seeds": len(seeds), "planned_seeds": len(study.seeds),
        }  # fmt: skip
        for split in SPLITS:
            for c in used:
                if (split, c, seeds) not in known:
                    known[split, c, seeds] = _difference([index[v][c] for v in levels], base[c], seeds, split, metrics)
        differences = {split: {c: known[split, c, seeds] for c in used} for split in SPLITS}
        blocks = {split: _blocks(differences[split]) for split in SPLITS}
        sides = {
            split: [np.stack([getattr(d, side) for d in differences[split].values()], 1) for side in ("level", "base")]
            for split in SPLITS
        }  # [R, conditions, S] each
        blocks["gap"] = blocks["train"] + [(-weight, block) for weight, block in blocks["test"]]
        sides["gap"] = [train - test for train, test in zip(sides["train"], sides["test"], strict=True)]
        for split in SIDES:
            if all(block.shape[-1] for _, block in blocks[split]):
                rows += [head | row for row in _rows(names, split, blocks[split], *sides[split])]
        rows += [head | row for row in _logged([v for v in levels if v != BASELINE], index, base, used, seeds)]
    return rows


def _difference(
    cells: Sequence[Mapping[int, Cell]], base: Mapping[int, Cell], seeds: Seeds, split: str, metrics: Sequence[str]
) -> _Difference:
    """Of several levels in one condition, each against the same baseline cells."""
    of_levels = [[of_seed[s].outcomes[split] for s in seeds] for of_seed in cells]
    of_base = [base[s].outcomes[split] for s in seeds]
    queries = _common([outcome.queries for row in [*of_levels, of_base] for outcome in row])

    def rewards(outcomes: Sequence[Outcome], measure: str) -> Array:
        return np.array([_pick(o.rewards[measure], o.queries, queries) for o in outcomes], dtype=np.float64)

    baseline = {metric: rewards(of_base, METRICS[metric]) for metric in metrics if metric != "learned"}
    level = np.stack([rewards(row, METRICS[metric]) for row in of_levels for metric in metrics])
    # what was learned is measured against the level's own start
    against = np.stack(
        [rewards(row, "initial") if m == "learned" else baseline[m] for row in of_levels for m in metrics]
    )
    return _Difference(queries, level - against, level.mean(-1), against.mean(-1))


def _common(of_each: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """The questions that all have; one array is usually shared by all."""
    common = of_each[0]
    for queries in of_each[1:]:
        common = common if queries is common else np.intersect1d(common, queries, assume_unique=True)
    return common


def _pick(values: NDArray[Any], queries: NDArray[np.int64], wanted: NDArray[np.int64]) -> NDArray[Any]:
    """Columns of values [..., Q] that belong to the wanted questions, all of which are among `queries`."""
    return values if queries is wanted else values[..., np.searchsorted(queries, wanted)]


def _blocks(differences: Mapping[Condition, _Difference]) -> list[tuple[float, Array]]:
    """One block a task: models answer the same questions, so they are averaged before anything is called noise."""
    blocks = []
    for task in dict.fromkeys(task for _, task in differences):
        parts = [d for (_, t), d in differences.items() if t == task]
        queries = _common([d.queries for d in parts])
        mean = np.mean([_pick(d.values, d.queries, queries) for d in parts], axis=0)
        blocks.append((len(parts) / len(differences), mean))
    return blocks


def _rows(
    names: Sequence[tuple[Level, str]], split: str, blocks: list[tuple[float, Array]], level: Array, base: Array
) -> list[Row]:
    """What can be said of each (level, metric) alone: blocks [R, S, Q], level and base [R, conditions, S]."""
    found = contrast(blocks)
    error = found.error
    low, high = bca(blocks) if split in SPLITS and blocks[0][1].shape[-1] > 1 else np.full((2, len(names)), np.nan)
    means, base_means = level.mean((1, 2)), base.mean((1, 2))
    iqm = interquartile_mean((level - base).reshape(len(names), -1))
    # a difference of train and test is no performance that one run could beat another in
    improvement = np.full(len(names), np.nan) if split == "gap" else probability_of_improvement(level, base)
    return [
        {
            "factor": factor, "level": name, "metric": metric, "split": split,
            "questions": sum(block.shape[-1] for _, block in blocks),
            "value": means[i], "baseline": base_means[i], "gain": found.gain[i], "low": math.nan, "high": math.nan,
            "p": math.nan, "p_holm": math.nan, "family": 0, "error": error[i], "degrees": found.degrees[i],
            "bca_low": low[i], "bca_high": high[i], "iqm": iqm[i], "probability_of_improvement": improvement[i],
            "minimum_detectable": math.nan, "seeds_for_one_point": math.nan, "variance_seeds": found.seeds[i],
            "variance_questions": found.questions[i], "variance_residual": found.residual[i],
        }
        for i, ((factor, name), metric) in enumerate(names)
    ]  # fmt: skip


def _logged(
    levels: Sequence[Level], index: Mapping[Level, Cells], base: Cells, used: Sequence[Condition], seeds: Seeds
) -> list[Row]:
    """Gains in what metrics.jsonl holds of the last evaluation (Pass@k, entropy, ...): paired over seeds alone."""
    of_levels = [[index[level][c][s].final for c in used for s in seeds] for level in levels]
    of_base = [base[c][s].final for c in used for s in seeds]
    rows: list[Row] = []
    for split in SPLITS if levels else ():
        keys = [key for key in of_base[0] if key.startswith(f"eval/{split}/") and not key.endswith(NOT_COMPARED)]
        keys = [key for key in keys if all(key in run for runs in [*of_levels, of_base] for run in runs)]
        if not keys:
            continue
        shape = (len(keys), len(used), len(seeds))
        baseline = np.array([[run[key] for run in of_base] for key in keys]).reshape(shape)
        level = np.array([[[run[key] for run in runs] for key in keys] for runs in of_levels]).reshape(-1, *shape[1:])
        baseline = np.tile(baseline, (len(levels), 1, 1))
        names = [(level, f"final {key.split('/', 2)[2]}") for level in levels for key in keys]
        found = _rows(names, split, [(1.0, (level - baseline).mean(1)[..., None])], level, baseline)
        rows += [row | {"questions": None} for row in found]  # one number a seed: questions have no say
    return rows


def _finish(study: Study, rows: list[Row]) -> None:
    """Intervals, p-values, Holm's correction and the smallest effect that could have been seen, in place.

    A family is what a reader looks through at once: all levels of a metric and split, in all scopes of the same kind.
    Levels that are one and the same cells are one hypothesis, whatever they are called.
    """
    names = ("error", "degrees", "gain", "variance_seeds", "variance_questions", "variance_residual", "seeds")
    error, degrees, gain, *parts = (np.array([row[name] for row in rows], dtype=float) for name in names)
    low, high = t_interval(gain, error, degrees)
    p, smallest = p_value(gain, error, degrees), minimum_detectable(error, degrees)
    needed = seeds_needed(parts[0], parts[1], parts[2], parts[3], ONE_POINT)
    families: dict[tuple[Any, ...], dict[tuple[Any, ...], list[int]]] = {}
    for i, row in enumerate(rows):
        row |= {"low": low[i], "high": high[i], "p": p[i], "minimum_detectable": smallest[i]}
        if row["questions"] is not None:
            row["seeds_for_one_point"] = needed[i]
        family = families.setdefault((row["metric"], row["split"], row["model"] == ALL, row["task"] == ALL), {})
        level = (row["factor"], row["level"])
        family.setdefault((study.same_as.get(level, level), row["model"], row["task"]), []).append(i)
    for family in families.values():
        adjusted = holm(np.array([p[members[0]] for members in family.values()]))
        for value, members in zip(adjusted, family.values(), strict=True):
            for i in members:
                rows[i] |= {"p_holm": value, "family": len(family)}
    for row in rows:  # plain numbers, so that every writer writes them alike
        row |= {key: float(value) for key, value in row.items() if isinstance(value, np.floating)}


# ---- curves and cost -------------------------------------------------------------------------------------------------


def _curves(study: Study, index: Mapping[Level, Cells]) -> list[Row]:
    """Pass@1 at the evaluations that every seed has, with a pointwise 95% t-interval over seeds."""
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
                curves = [[dict(cells[c][s].curves.get(f"eval/{split}/pass@1", ())) for s in seeds] for c in conditions]
                if not seeds:
                    continue
                for round_ in sorted(set.intersection(*(set(curve) for part in curves for curve in part))):
                    by_seed = np.mean([[curve[round_] for curve in part] for part in curves], axis=0)  # [S]
                    found = contrast([(1.0, by_seed[:, None])])
                    low, high = t_interval(found.gain, np.sqrt(found.variance), found.degrees)
                    rows.append({
                        "factor": level[0], "level": level[1], "model": model, "task": task, "split": split,
                        "round": round_, "seeds": len(seeds), "conditions": len(conditions),
                        "value": float(found.gain), "low": float(low), "high": float(high),
                    })  # fmt: skip
    return rows


def _costs(study: Study, index: Mapping[Level, Cells], results: Sequence[Row]) -> tuple[list[Row], list[Row]]:
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


def compare_levels(study: Study, level: Level, other: Level) -> list[Row]:
    """Rows of `level` against another level instead of against the baseline; Holm's family is left to the caller."""
    index = study.index()
    rows = _gain_rows(study, [level], index, index.get(other, {}))
    _finish(study, rows)
    return rows
