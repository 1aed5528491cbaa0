"""Which rollouts are worth training on: the most varied of a group, groups that are not constant, which to replay.

Numpy only, so that a configuration is checked without loading torch.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Queries = NDArray[np.int64]


def constant_groups(rewards: Floats, queries: Queries) -> set[int]:
    """Queries whose rollouts all earned exactly the same: a group advantage learns nothing from them.

    Args:
        rewards: [B], NaN where a rollout was not scored; a query without any scored rollout is constant.
        queries: [B].
    """
    scored, constant = ~np.isnan(rewards), set()
    for query in np.unique(queries).tolist():
        of_query = rewards[(queries == query) & scored]
        if not len(of_query) or (of_query == of_query[0]).all():
            constant.add(query)
    return constant


def most_varied(rewards: Floats, groups: Queries, keep: int) -> NDArray[np.bool_]:
    """Which of each group's rollouts make the `keep` of greatest reward variance (PODS, arXiv 2504.13818), bool [B].

    Such a subset is always the i lowest and the keep - i highest rewards, for some i; ties go to the earlier rollout.
    """
    kept = np.zeros(len(rewards), dtype=bool)
    for group in np.unique(groups):
        rows = np.flatnonzero(groups == group)
        rows = rows[np.argsort(rewards[rows], kind="stable")]
        if len(rows) > keep:
            ends = [np.r_[rows[:i], rows[len(rows) - keep + i :]] for i in range(keep + 1)]
            rows = max(ends, key=lambda chosen: float(rewards[chosen].var()))
        kept[rows] = True
    return kept


def weighted_order(weights: Floats, rng: np.random.Generator) -> NDArray[np.int64]:
    """Places of positive weight, one drawn after another: with chances in proportion to the weights that are left.

    Sorting by log(u) / w, u uniform, gives just that order (Efraimidis and Spirakis 2006).

    Args:
        weights: [K], at least 0; a weight of 0 is never drawn.
        rng: gives the K uniform numbers.
    """
    with np.errstate(divide="ignore"):
        keys = np.log(rng.random(len(weights))) / weights
    keys[weights == 0] = -np.inf
    order: NDArray[np.int64] = np.argsort(-keys, kind="stable")[: int((weights > 0).sum())]
    return order


# --- replay: which of the rollouts kept, oldest first, given their advantages [K] ------------------------------------


def _recent(advantages: Floats, count: int, rng: np.random.Generator) -> list[int]:
    return list(range(len(advantages) - count, len(advantages)))


def _uniform(advantages: Floats, count: int, rng: np.random.Generator) -> list[int]:
    return [int(i) for i in rng.permutation(len(advantages))[:count]]


def _positive(advantages: Floats, count: int, rng: np.random.Generator) -> list[int]:
    return [int(i) for i in rng.permutation(np.flatnonzero(advantages > 0))[:count]]


def _prioritized(advantages: Floats, count: int, rng: np.random.Generator) -> list[int]:
    return [int(i) for i in weighted_order(np.abs(advantages), rng)[:count]]


#: How replayed rollouts are chosen: (advantages of those kept, count, generator) -> positions, without repeats.
SELECTIONS: dict[str, Callable[[Floats, int, np.random.Generator], list[int]]] = {
    "uniform": _uniform,
    "recent": _recent,
    "positive": _positive,
    "prioritized": _prioritized,
}
