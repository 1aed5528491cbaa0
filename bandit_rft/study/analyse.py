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

from bandit_rft.study.cells import BASELINE, SPLITS, Study, load_study
from bandit_rft.study.contrasts import contrast_rows
from bandit_rft.study.packed import Packer
from bandit_rft.study.pairing import (
    ALL,
    METRICS,
    Cells,
    Condition,
    Difference,
    Level,
    Row,
    Seeds,
    blocks_of,
    difference,
    scopes,
    share_seeds,
    usable,
)
from bandit_rft.study.spending import ONE_POINT, cost_rows, curve_rows
from bandit_rft.study.statistics import (
    Array,
    Block,
    Spread,
    bca,
    contrast,
    equivalence,
    holm,
    interquartile_mean,
    minimum_detectable,
    nothing_differed,
    p_value,
    probability_of_improvement,
    seeds_needed,
    t_interval,
)
from bandit_rft.study.tuning import tuning_rows
from bandit_rft.study.wider import add_wider

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
        contrasts: the comparisons that the study file names.
        tuning: each level's tries of the tuned key, and which was chosen.
    """

    study: Study
    results: list[Row]
    curves: list[Row]
    costs: list[Row]
    timings: list[Row]
    cells: list[Row]
    contrasts: list[Row] = field(default_factory=list)
    tuning: list[Row] = field(default_factory=list)
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
    add_wider(study, results)
    costs, timings = cost_rows(study, index, results)
    cells = [
        {
            "id": cell.id, "levels": "; ".join("=".join(place) for place in cell.places), "model": cell.model,
            "task": cell.task, "seed": cell.seed, "baseline": cell.baseline, "status": cell.status,
            "used": not cell.problem, "problem": cell.problem,
        }
        for cell in study.cells
    ]  # fmt: skip
    return Analysis(
        study, results, curve_rows(study, index), costs, timings, cells, contrast_rows(study), tuning_rows(study)
    )


# ---- marginal gains --------------------------------------------------------------------------------------------------


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
    known: dict[tuple[str, Condition, Seeds], Difference] = {}
    shared = share_seeds(study)
    for model, task, conditions in scopes(study.conditions):
        used = usable(pairs, conditions, shared)
        if not used:
            continue
        head = {
            "factor": "", "level": "", "model": model, "task": task, "conditions": len(used),
            "planned_conditions": len(conditions), "seeds": min(map(len, used.values())),
            "planned_seeds": len(study.seeds),
        }  # fmt: skip
        for split in SPLITS:
            for c, seeds in used.items():
                if (split, c, seeds) not in known:
                    known[split, c, seeds] = difference([index[v][c] for v in levels], base[c], seeds, split, metrics)
        differences = {split: {c: known[split, c, seeds] for c, seeds in used.items()} for split in SPLITS}
        blocks = {split: blocks_of(differences[split], split, shared) for split in SPLITS}
        blocks["gap"] = blocks["train"] + blocks_of(differences["test"], "test", shared, -1.0)
        sides = {
            split: [[getattr(d, side) for d in differences[split].values()] for side in ("level", "base")]
            for split in SPLITS
        }  # lists over conditions of [R, S]
        sides["gap"] = [
            [a - b for a, b in zip(train, test, strict=True)]
            for train, test in zip(sides["train"], sides["test"], strict=True)
        ]
        for split in SIDES:
            if all(block.values.shape[-1] for block in blocks[split]):
                rows += [head | row for row in _rows(names, split, blocks[split], *sides[split])]
        rows += [head | row for row in _logged([v for v in levels if v != BASELINE], index, base, used, shared)]
    return rows


def _rows(
    names: Sequence[tuple[Level, str]], split: str, blocks: list[Block], level: list[Array], base: list[Array]
) -> list[Row]:
    """What can be said of each (level, metric) alone: blocks [R, S, Q]; level and base [R, S] of each condition."""
    found = contrast(blocks)
    spread = found.spread
    own = split in SPLITS and blocks[0].values.shape[-1] > 1
    low, high = bca(blocks) if own else np.full((2, len(names)), np.nan)
    means, base_means = (np.mean([runs.mean(-1) for runs in side], axis=0) for side in (level, base))
    iqm = interquartile_mean(np.concatenate([a - b for a, b in zip(level, base, strict=True)], axis=-1))
    # a difference of train and test is no performance that one run could beat another in
    improvement = (
        np.full(len(names), np.nan)
        if split == "gap"
        else np.mean([probability_of_improvement(a, b) for a, b in zip(level, base, strict=True)], axis=0)
    )
    return [
        {
            "factor": factor, "level": name, "metric": metric, "split": split,
            "questions": question_count(blocks), "pairs": sum(block.values[0].size for block in blocks),
            "value": means[i], "baseline": base_means[i], "gain": found.gain[i], "low": math.nan, "high": math.nan,
            "p": math.nan, "p_holm": math.nan, "family": 0, "p_equivalent": math.nan,
            **{name: values[i] for name, values in spread._asdict().items()},
            "bca_low": low[i], "bca_high": high[i], "iqm": iqm[i],
            "probability_of_improvement": improvement[i], "minimum_detectable": math.nan,
            "seeds_for_one_point": math.nan, "variance_seeds": found.seeds[i],
            "variance_questions": found.questions[i], "variance_residual": found.residual[i],
        }
        for i, ((factor, name), metric) in enumerate(names)
    ]  # fmt: skip


def question_count(blocks: Sequence[Block]) -> int:
    """Different questions that were asked: those of runs that had their own, and shared ones once."""
    shared = {block.questions: block.values.shape[-1] for block in blocks if block.questions is not None}
    own = [block.values.shape[-1] * block.values.shape[-2] for block in blocks if block.questions is None]
    return int(sum(shared.values()) + sum(own))


def _logged(
    levels: Sequence[Level], index: Mapping[Level, Cells], base: Cells, used: Mapping[Condition, Seeds], shared: bool
) -> list[Row]:
    """Gains in what metrics.jsonl holds of the last evaluation (Pass@k, entropy, ...): paired over seeds alone."""
    runs_of = [{c: [index[level][c][s].final for s in seeds] for c, seeds in used.items()} for level in levels]
    of_base = {c: [base[c][s].final for s in seeds] for c, seeds in used.items()}
    every = [run for runs in [*runs_of, of_base] for of_condition in runs.values() for run in of_condition]
    rows: list[Row] = []
    for split in SPLITS if levels else ():
        first = next(iter(of_base.values()))[0]
        keys = [key for key in first if key.startswith(f"eval/{split}/") and not key.endswith(NOT_COMPARED)]
        keys = [key for key in keys if all(key in run for run in every)]
        if not keys:
            continue
        level = [np.array([[run[key] for run in runs[c]] for runs in runs_of for key in keys]) for c in used]
        baseline = [
            np.tile(np.array([[run[key] for run in of_base[c]] for key in keys]), (len(levels), 1)) for c in used
        ]
        names = [(name, f"final {key.split('/', 2)[2]}") for name in levels for key in keys]
        blocks = [
            Block(1 / len(used), (a - b)[..., None], "all" if shared else c, None)
            for c, a, b in zip(used, level, baseline, strict=True)
        ]
        found = _rows(names, split, blocks, level, baseline)
        rows += [row | {"questions": None, "pairs": None} for row in found]  # one number a seed: no questions
    return rows


def _finish(study: Study, rows: list[Row]) -> None:
    """Intervals, p-values, Holm's correction and the smallest effect that could have been seen, in place.

    A family is what a reader looks through at once: all levels of a metric and split, in all scopes of the same kind.
    Levels that are one and the same cells are one hypothesis, whatever they are called.
    """
    names = ("gain", "variance_seeds", "variance_questions", "variance_residual", "seeds")
    shared = share_seeds(study)
    gain, *parts = (np.array([row[name] for row in rows], dtype=float) for name in names)
    spread = Spread.of(rows)
    low, high = t_interval(gain, spread)
    p, smallest, equivalent = p_value(gain, spread), minimum_detectable(spread), equivalence(gain, spread)
    needed = seeds_needed(parts[0], parts[1], parts[2], parts[3], ONE_POINT)
    families: dict[tuple[Any, ...], dict[tuple[Any, ...], list[int]]] = {}
    for i, row in enumerate(rows):
        row |= {"low": low[i], "high": high[i], "p": p[i], "minimum_detectable": smallest[i]}
        row["p_equivalent"] = equivalent[i]
        if (
            gain[i] == spread.error[i] == 0 and row["pairs"] and row["seeds"] > 1
        ):  # nothing differed, of finitely many runs
            runs = row["seeds"] * (1 if shared else row["conditions"])
            bound, chance = nothing_differed(runs, 2.0 if row["split"] == "gap" else 1.0)
            row |= {"low": -bound, "high": bound, "p_equivalent": chance}
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


def compare_levels(study: Study, level: Level, other: Level) -> list[Row]:
    """Rows of `level` against another level instead of against the baseline; Holm's family is left to the caller."""
    index = study.index()
    rows = _gain_rows(study, [level], index, index.get(other, {}))
    _finish(study, rows)
    return rows
