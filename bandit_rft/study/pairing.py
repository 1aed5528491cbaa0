"""Levels paired with what they are compared with: differences of rewards by condition, seed and question, as blocks.

Runs of a level and of the other side are paired within a model, a task and a seed. What the conditions share (seeds,
questions) is read from the runs: blocks that share it get the same key (statistics.Block).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bandit_rft.study.cells import Cell, Outcome, Study
from bandit_rft.study.statistics import Array, Block

Row = dict[str, Any]
Level = tuple[str, str]
Condition = tuple[str, str]
Cells = Mapping[Condition, Mapping[int, Cell]]
Seeds = tuple[int, ...]
ALL = "all"
#: Gains over the baseline, each question with itself; `learned` is the gain over the model before training.
METRICS = {"final": "final", "best": "best", "auc": "auc", "learned": "final"}


@dataclass
class Difference:
    """A level minus the other side in one condition and split.

    Attributes:
        queries: [Q].
        values: [R, S, Q], paired.
        level: means [R, S].
        base: likewise of the other side.
        asked: of each seed, a checksum of its questions.
    """

    queries: NDArray[np.int64]
    values: Array
    level: Array
    base: Array
    asked: tuple[int, ...]


def scopes(conditions: Sequence[Condition]) -> list[tuple[str, str, list[Condition]]]:
    """(model, task, conditions) to report on: all together, by model, by task, and each; "all" where it is pooled."""
    models, tasks = dict.fromkeys(m for m, _ in conditions), dict.fromkeys(t for _, t in conditions)
    found = [(ALL, ALL, list(conditions))]
    if len(models) > 1 and len(tasks) > 1:
        found += [(model, ALL, [c for c in conditions if c[0] == model]) for model in models]
        found += [(ALL, task, [c for c in conditions if c[1] == task]) for task in tasks]
    return found + [(model, task, [(model, task)]) for model, task in conditions]


def share_seeds(study: Study) -> bool:
    """Whether runs of different conditions had the same seeds, so that their luck is one."""
    own: dict[int, set[Any]] = {}
    for cell in study.cells:
        own.setdefault(cell.seed, set()).add(cell.config.get("seed", cell.seed))
    return len(study.conditions) > 1 and all(len(seeds) == 1 for seeds in own.values())


def usable(pairs: Mapping[Condition, Seeds], conditions: Sequence[Condition], shared: bool) -> dict[Condition, Seeds]:
    """The seeds of each condition that a mean over the conditions can use.

    Conditions that have none are left out. With seeds in common, a seed counts where all conditions have it.
    """
    used = {c: pairs[c] for c in conditions if pairs[c]}
    if not shared:
        return used
    common = tuple(sorted(set.intersection(*(set(seeds) for seeds in used.values())))) if used else ()
    return dict.fromkeys(used, common) if common else {}


def difference(
    cells: Sequence[Mapping[int, Cell]], base: Mapping[int, Cell], seeds: Seeds, split: str, metrics: Sequence[str]
) -> Difference:
    """Of several levels in one condition, each against the same other cells."""
    of_levels = [[of_seed[s].outcomes[split] for s in seeds] for of_seed in cells]
    of_base = [base[s].outcomes[split] for s in seeds]
    queries = common_queries([outcome.queries for row in [*of_levels, of_base] for outcome in row])

    def rewards(outcomes: Sequence[Outcome], measure: str) -> Array:
        return np.array([_pick(o.rewards[measure], o.queries, queries) for o in outcomes], dtype=np.float64)

    baseline = {metric: rewards(of_base, METRICS[metric]) for metric in metrics if metric != "learned"}
    level = np.stack([rewards(row, METRICS[metric]) for row in of_levels for metric in metrics])
    # what was learned is measured against the level's own start
    against = np.stack(
        [rewards(row, "initial") if m == "learned" else baseline[m] for row in of_levels for m in metrics]
    )
    asked = tuple(outcome.asked for outcome in of_base)
    return Difference(queries, level - against, level.mean(-1), against.mean(-1), asked)


def combination(sides: Sequence[tuple[float, Sequence[Outcome]]], metrics: Sequence[str]) -> Difference:
    """A weighted sum of levels in one condition, with as many runs of each, paired by seed; R is the metrics."""
    queries = common_queries([outcome.queries for _, outcomes in sides for outcome in outcomes])
    values = sum(
        weight
        * np.array(
            [[_pick(o.rewards[METRICS[m]], o.queries, queries) for o in outcomes] for m in metrics], dtype=np.float64
        )
        for weight, outcomes in sides
    )
    values = np.asarray(values, dtype=np.float64)
    means = values.mean(-1)
    return Difference(queries, values, means, np.zeros_like(means), tuple(o.asked for o in sides[0][1]))


def common_queries(of_each: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """The questions that all have; one array is usually shared by all."""
    common = of_each[0]
    for queries in of_each[1:]:
        common = common if queries is common else np.intersect1d(common, queries, assume_unique=True)
    return common


def _pick(values: NDArray[Any], queries: NDArray[np.int64], wanted: NDArray[np.int64]) -> NDArray[Any]:
    """Columns of values [..., Q] that belong to the wanted questions, all of which are among `queries`."""
    return values if queries is wanted else values[..., np.searchsorted(queries, wanted)]


def blocks_of(
    differences: Mapping[Condition, Difference], split: str, shared: bool, weight: float = 1.0
) -> list[Block]:
    """The mean over conditions, each counting equally, as blocks.

    Conditions on the same questions answer them together, so that what is particular to a question counts once. Where
    every seed has questions of its own, these are the runs' luck; models that share seeds share that luck too.
    """
    alike: dict[Hashable, list[Condition]] = {}
    for c, found in differences.items():
        crossed = len(set(found.asked)) == 1
        key = (c[1], found.asked[:1] if crossed else found.asked)
        alike.setdefault(key if crossed or shared else (key, c), []).append(c)
    blocks = []
    for same, conditions in alike.items():
        parts = [differences[c] for c in conditions]
        queries = common_queries([d.queries for d in parts])
        crossed = len(set(parts[0].asked)) == 1
        values = [_pick(d.values, d.queries, queries) for d in parts]
        each = weight / len(differences)
        if shared:
            values, conditions, each = [np.mean(values, axis=0)], conditions[:1], each * len(parts)
        for c, of_condition in zip(conditions, values, strict=True):
            blocks.append(Block(each, of_condition, "all" if shared else c, (split, same) if crossed else None))
    return blocks
