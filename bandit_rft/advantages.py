"""Rewards to advantages. Each function is a design choice: registered by name, chosen by the `advantage` key.

    @register("my_advantage")
    def my_advantage(rewards, groups, history): ...

A constant group is recognized by exact equality of its rewards, never by a floating standard deviation of about zero:
dividing rounding noise by 1e-6 is how a group in which nothing was learned gets advantages of order one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
#: query -> its earlier rewards, oldest first
History = Mapping[int, Sequence[float]]
#: (rewards [B], groups [B] query of each rollout, history or None) -> advantages [B]
AdvantageFunction = Callable[[Floats, NDArray[np.int64], "History | None"], Floats]

EPSILON = 1e-6  # added to a standard deviation, as in the GRPO implementations of verl and of the paper

ADVANTAGES: dict[str, AdvantageFunction] = {}
#: Advantages that compare the rollouts of one query, and so need at least two of them.
NEEDS_GROUPS: set[str] = set()


def register(name: str, *, needs_groups: bool = False) -> Callable[[AdvantageFunction], AdvantageFunction]:
    """Make an advantage function choosable by name; a name taken already is a ValueError."""

    def add(function: AdvantageFunction) -> AdvantageFunction:
        if name in ADVANTAGES:
            raise ValueError(f"an advantage named {name!r} is registered already")
        ADVANTAGES[name] = function
        if needs_groups:
            NEEDS_GROUPS.add(name)
        return function

    return add


def compute_advantages(
    name: str,
    rewards: Sequence[float] | Floats,
    groups: Sequence[int] | NDArray[np.int64],
    history: History | None = None,
) -> NDArray[np.float32]:
    """Advantages [B] float32 of B rollouts with finite rewards [B] and query ids `groups` [B].

    Raises ValueError for an unknown name, lengths that differ, and rewards that are not finite (naming the rollout).
    """
    if name not in ADVANTAGES:
        raise ValueError(f"advantage must be one of {', '.join(ADVANTAGES)}; got {name!r}")
    r, g = np.asarray(rewards, dtype=np.float64), np.asarray(groups, dtype=np.int64)
    if r.ndim != 1 or r.shape != g.shape:
        raise ValueError(f"rewards and groups must be two lists of one length; got {r.shape} and {g.shape}")
    if not np.isfinite(r).all():
        raise ValueError(f"rewards[{int(np.argmin(np.isfinite(r)))}] is not finite")
    return ADVANTAGES[name](r, g, history).astype(np.float32) if len(r) else np.zeros(0, dtype=np.float32)


@register("reward")
def reward(rewards: Floats, groups: NDArray[np.int64], history: History | None = None) -> Floats:
    """A = r: the bandit baseline, nothing subtracted (Williams 1992 without a baseline; arXiv 2601.22532)."""
    return rewards


@register("batch_mean")
def batch_mean(rewards: Floats, groups: NDArray[np.int64], history: History | None = None) -> Floats:
    """A = r - mean over the batch."""
    return _centered(rewards)


@register("batch_norm")
def batch_norm(rewards: Floats, groups: NDArray[np.int64], history: History | None = None) -> Floats:
    """A = (r - mean) / (std + 1e-6) over the batch, std unbiased (REINFORCE++, arXiv 2501.03262)."""
    return _standardized(rewards)


@register("group_mean", needs_groups=True)
def group_mean(rewards: Floats, groups: NDArray[np.int64], history: History | None = None) -> Floats:
    """A = r - mean over the rollouts of the query (Dr. GRPO, arXiv 2503.20783)."""
    return _by_group(rewards, groups, _centered)


@register("group_norm", needs_groups=True)
def group_norm(rewards: Floats, groups: NDArray[np.int64], history: History | None = None) -> Floats:
    """A = (r - mean) / (std + 1e-6) over the rollouts of the query, std unbiased (GRPO, arXiv 2402.03300)."""
    return _by_group(rewards, groups, _standardized)


def _centered(rewards: Floats) -> Floats:
    if (rewards == rewards[0]).all():  # exact zeros, which the update may then skip; one rollout compares to nothing
        return np.zeros_like(rewards)
    return rewards - float(rewards.mean())


def _standardized(rewards: Floats) -> Floats:
    if (rewards == rewards[0]).all():
        return np.zeros_like(rewards)
    return _centered(rewards) / (float(rewards.std(ddof=1)) + EPSILON)


def _by_group(rewards: Floats, groups: NDArray[np.int64], function: Callable[[Floats], Floats]) -> Floats:
    advantages: Floats = np.zeros_like(rewards)
    for group in np.unique(groups):
        rows = groups == group
        advantages[rows] = function(rewards[rows])
    return advantages
