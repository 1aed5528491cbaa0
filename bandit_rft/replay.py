"""Trajectory replay: old rollouts kept to be trained on again, with what their sampler thought of them.

(The paper's replay replays rewards, not rollouts: that is `history_norm`, see history.py.) Each kept rollout has the
log-probabilities it was sampled with, so an importance weight against today's policy can be formed. Numpy only.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bandit_rft.history import Arrays

#: Upper ends of the staleness histogram's classes, in rounds; the last class is open.
STALENESS_CLASSES = (1, 3, 7, 15)


@dataclass(frozen=True)
class Trajectory:
    """One rollout as it was drawn and judged."""

    round: int  # in which it was drawn
    query: int
    rollout: int
    prompt: NDArray[np.int32]  # token ids
    tokens: NDArray[np.int32]  # [L], the completion's, stop token included
    logprobs: NDArray[np.float32]  # [L], of the policy that drew it
    reward: float
    advantage: float  # as computed in its round
    truncated: bool


def _recent(kept: Sequence[Trajectory], count: int, rng: np.random.Generator) -> list[int]:
    return list(range(len(kept) - count, len(kept)))


def _uniform(kept: Sequence[Trajectory], count: int, rng: np.random.Generator) -> list[int]:
    return [int(i) for i in rng.permutation(len(kept))[:count]]


def _positive(kept: Sequence[Trajectory], count: int, rng: np.random.Generator) -> list[int]:
    positive = np.array([i for i, t in enumerate(kept) if t.advantage > 0], dtype=np.int64)
    return [int(i) for i in rng.permutation(positive)[:count]]


def _prioritized(kept: Sequence[Trajectory], count: int, rng: np.random.Generator) -> list[int]:
    # The `count` largest of log(u) / w are a draw without replacement with chances proportional to w (Efraimidis and
    # Spirakis 2006); advantage 0 is never drawn.
    weights = np.abs([t.advantage for t in kept])
    with np.errstate(divide="ignore"):
        keys = np.log(rng.random(len(kept))) / weights
    keys[weights == 0] = -np.inf
    return [int(i) for i in np.argsort(-keys, kind="stable")[: min(count, int((weights > 0).sum()))]]


#: How replayed rollouts are chosen among those kept (oldest first): (kept, count, generator) -> positions.
SELECTIONS: dict[str, Callable[[Sequence[Trajectory], int, np.random.Generator], list[int]]] = {
    "uniform": _uniform,
    "recent": _recent,
    "positive": _positive,
    "prioritized": _prioritized,
}


class TrajectoryReplay:
    """The newest `capacity` trajectories, first in, first out."""

    def __init__(self, capacity: int):
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1 rollout; got {capacity}")
        self._kept: deque[Trajectory] = deque(maxlen=capacity)

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, trajectories: Iterable[Trajectory]) -> None:
        """Keep trajectories of the current round, in order; the oldest ones make room."""
        self._kept.extend(trajectories)

    def draw(
        self, count: int, *, sampling: str, now: int, max_staleness: int | None, seed: int
    ) -> tuple[list[Trajectory], float]:
        """Up to `count` trajectories, without repeats, and the share of those kept that was young enough to be drawn.

        Depends on the seed and the round `now` alone. Trajectories drawn more than max_staleness rounds ago stay out.
        """
        young = [t for t in self._kept if max_staleness is None or now - t.round <= max_staleness]
        rng = np.random.Generator(np.random.PCG64([seed, now, 0x5E91A7]))
        chosen = SELECTIONS[sampling](young, min(count, len(young)), rng)
        return [young[i] for i in chosen], len(young) / len(self._kept) if self._kept else 1.0

    def arrays(self) -> Arrays:
        """Everything kept, for a checkpoint."""
        return pack_trajectories(self._kept)

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Take up what `arrays` gave."""
        self._kept = deque(unpack_trajectories(arrays), maxlen=self._kept.maxlen)


class LastAnswers:
    """The latest trajectory of every query: what SPO measures the policy's movement on."""

    def __init__(self) -> None:
        self._last: dict[int, Trajectory] = {}

    def add(self, trajectories: Iterable[Trajectory]) -> None:
        """Replace the queries' earlier trajectories."""
        self._last.update((t.query, t) for t in trajectories)

    def of(self, queries: Iterable[int]) -> list[Trajectory]:
        """The latest trajectories of those of the queries (each once) that have one."""
        return [self._last[query] for query in dict.fromkeys(queries) if query in self._last]

    def arrays(self) -> Arrays:
        """Everything kept, for a checkpoint."""
        return pack_trajectories(self._last.values())

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Take up what `arrays` gave."""
        self._last = {t.query: t for t in unpack_trajectories(arrays)}


def pack_trajectories(trajectories: Iterable[Trajectory]) -> Arrays:
    """Trajectories as flat arrays: per-rollout columns, and tokens one after another."""
    ts = list(trajectories)

    def flat(name: str, dtype: Any) -> NDArray[Any]:
        parts = [getattr(t, name) for t in ts]
        return np.concatenate(parts).astype(dtype) if parts else np.zeros(0, dtype)

    columns = (
        ("round", np.int64), ("query", np.int64), ("rollout", np.int64), ("reward", np.float64),
        ("advantage", np.float64), ("truncated", np.uint8),
    )  # fmt: skip
    return {
        **{name: np.array([getattr(t, name) for t in ts], dtype=dtype) for name, dtype in columns},
        "prompt_lengths": np.array([len(t.prompt) for t in ts], dtype=np.int64),
        "lengths": np.array([len(t.tokens) for t in ts], dtype=np.int64),
        "prompts": flat("prompt", np.int32),
        "tokens": flat("tokens", np.int32),
        "logprobs": flat("logprobs", np.float32),
    }


def unpack_trajectories(arrays: Mapping[str, NDArray[Any]]) -> list[Trajectory]:
    """The inverse of `pack_trajectories`."""
    prompt_ends, ends = np.cumsum(arrays["prompt_lengths"]), np.cumsum(arrays["lengths"])
    prompts = np.split(arrays["prompts"], prompt_ends[:-1])
    tokens, logprobs = (np.split(arrays[name], ends[:-1]) for name in ("tokens", "logprobs"))
    return [
        Trajectory(
            round=int(arrays["round"][i]), query=int(arrays["query"][i]), rollout=int(arrays["rollout"][i]),
            prompt=prompts[i], tokens=tokens[i], logprobs=logprobs[i], reward=float(arrays["reward"][i]),
            advantage=float(arrays["advantage"][i]), truncated=bool(arrays["truncated"][i]),
        )
        for i in range(len(arrays["round"]))
    ]  # fmt: skip


def staleness_metrics(drawn: Sequence[Trajectory], now: int) -> dict[str, float | int | None]:
    """How old the replayed rollouts are: mean, largest, and a histogram, in rounds since they were drawn."""
    ages = np.array([now - t.round for t in drawn], dtype=np.int64)
    metrics: dict[str, float | int | None] = {
        "replay/staleness/mean": float(ages.mean()) if len(ages) else None,
        "replay/staleness/max": int(ages.max()) if len(ages) else None,
    }
    low = 1
    for high in STALENESS_CLASSES:
        name = f"{low}" if low == high else f"{low}-{high}"
        metrics[f"replay/staleness/{name}"] = int(((ages >= low) & (ages <= high)).sum())
        low = high + 1
    metrics[f"replay/staleness/{low}+"] = int((ages >= low).sum())
    return metrics
