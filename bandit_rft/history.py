"""What is remembered of each query across rounds and epochs: its last rewards, or an estimate of its value.

An advantage that compares with the past owns one of these (advantages.py). All are part of a checkpoint, as plain
arrays. Nothing here imports torch before a batch is given, so that a configuration is checked without it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

if TYPE_CHECKING:
    from torch import Tensor

    from bandit_rft.rollout_batch import RolloutBatch

Arrays = dict[str, NDArray[Any]]


class Memory:
    """What an advantage remembers across rounds. The trainer calls `observe`, the advantage, then `remember`."""

    def observe(self, batch: RolloutBatch, score: Callable[[RolloutBatch], Tensor]) -> None:
        """Look at the rollouts about to be compared, before their advantages are known.

        Args:
            batch: the round's rollouts that are compared.
            score: gives a batch's log-probabilities [N] under today's policy; costs a forward pass over it.
        """

    def remember(self, batch: RolloutBatch) -> None:
        """Keep what is needed of the rollouts that were compared, advantages included."""

    def arrays(self) -> Arrays:
        """Everything remembered, for a checkpoint."""
        return {}

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Take up what `arrays` gave."""


class RewardHistory(Memory):
    """The last `window` rewards of every query, first in, first out (the paper's reward replay, arXiv 2601.22532)."""

    def __init__(self, window: Annotated[int, Field(ge=1)] = 8):
        if window < 1:
            raise ValueError(f"window must be at least 1 reward; got {window}")
        self.window = window
        self._rewards: dict[int, deque[float]] = {}

    def append(self, queries: NDArray[np.int64], rewards: NDArray[np.float64]) -> None:
        """Remember rewards [B] of queries [B], in this order; a query may occur more than once."""
        for query, reward in zip(queries.tolist(), rewards.tolist(), strict=True):
            self._rewards.setdefault(query, deque(maxlen=self.window)).append(reward)

    def of(self, query: int) -> NDArray[np.float64]:
        """The remembered rewards of one query, oldest first; empty for a query never seen."""
        return np.array(self._rewards.get(query, ()), dtype=np.float64)

    def arrays(self) -> Arrays:
        """Everything remembered, for a checkpoint."""
        return {
            "queries": np.array(list(self._rewards), dtype=np.int64),
            "lengths": np.array([len(r) for r in self._rewards.values()], dtype=np.int64),
            "rewards": np.array([x for r in self._rewards.values() for x in r], dtype=np.float64),
        }

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Take up what `arrays` gave."""
        ends = np.cumsum(arrays["lengths"])
        self._rewards = {
            int(query): deque(arrays["rewards"][end - n : end].tolist(), maxlen=self.window)
            for query, n, end in zip(arrays["queries"], arrays["lengths"], ends, strict=True)
        }


class ValueTracker(Memory):
    """A Beta(a, b) of every query's chance of success, forgetting as the policy moves (SPO, arXiv 2509.13232).

    value = a / (a + b). A reward r in [0, 1] makes a <- rho a + r and b <- rho b + 1 - r, where
    rho = 2 ** (-movement / half_life), kept within [decay_min, decay_max]; `movement` is the KL (nats a token) between
    the policy that last answered the query and today's, the k3 estimate on that answer. A new query starts at value
    1/2, with the weight that the fastest forgetting settles at: 1 / (1 - decay_min).
    """

    def __init__(
        self,
        half_life: Annotated[float, Field(gt=0)] = 0.06,
        decay_min: Annotated[float, Field(ge=0, lt=1)] = 0.875,
        decay_max: Annotated[float, Field(ge=0, lt=1)] = 0.96,
    ):
        if half_life <= 0 or not 0 <= decay_min <= decay_max < 1:
            raise ValueError(
                "half_life must be > 0 and 0 <= decay_min <= decay_max < 1; got "
                f"half_life={half_life}, decay_min={decay_min}, decay_max={decay_max}"
            )
        self.half_life, self.decay_min, self.decay_max = half_life, decay_min, decay_max
        self.movement: dict[int, float] = {}  # of the queries of the round about to be appended
        self._beta: dict[int, tuple[float, float]] = {}
        self._answers: RolloutBatch | None = None  # the latest first attempt at every query

    def observe(self, batch: RolloutBatch, score: Callable[[RolloutBatch], Tensor]) -> None:
        """Measure how far the policy moved since it last answered each query."""
        if self._answers is None:
            return
        place = {query: row for row, query in enumerate(self._answers.query.tolist())}
        asked = [query for query in dict.fromkeys(batch.query.tolist()) if query in place]
        if not asked:
            return
        from bandit_rft.ops.objective import kl_estimate

        last = self._answers.select([place[query] for query in asked])
        kl = kl_estimate("k3", last.logprobs, score(last))
        self.movement |= {q: float(part.mean()) for q, part in zip(asked, last.split(kl), strict=True)}

    def remember(self, batch: RolloutBatch) -> None:
        """Keep each query's first attempt, in place of an earlier one."""
        from bandit_rft.rollout_batch import RolloutBatch

        first = batch.select(batch.attempt == 0)
        parts = [first] if self._answers is None else [self._answers, first]
        every = RolloutBatch.cat(parts)
        latest = {query: row for row, query in enumerate(every.query.tolist())}
        self._answers = every.select(list(latest.values()))

    def value(self, query: int) -> float:
        """The estimate for one query before today's reward."""
        a, b = self._parameters(query)
        return a / (a + b)

    def append(self, queries: NDArray[np.int64], rewards: NDArray[np.float64]) -> None:
        """Update with rewards [B] in [0, 1] of queries [B]; the rollouts of one query decay its past once."""
        for query in np.unique(queries).tolist():
            a, b = self._parameters(query)
            rho = 2.0 ** (-self.movement.get(query, 0.0) / self.half_life)
            rho = min(max(rho, self.decay_min), self.decay_max)
            new = rewards[queries == query]
            self._beta[query] = (rho * a + float(new.sum()), rho * b + float((1 - new).sum()))
        self.movement = {}

    def _parameters(self, query: int) -> tuple[float, float]:
        weight = 1 / (1 - self.decay_min)
        return self._beta.get(query, (weight / 2, weight / 2))

    def arrays(self) -> Arrays:
        """Everything remembered, for a checkpoint."""
        answers = {} if self._answers is None else self._answers.arrays()
        return {
            "queries": np.array(list(self._beta), dtype=np.int64),
            "beta": np.array(list(self._beta.values()), dtype=np.float64).reshape(-1, 2),
            **{f"answers|{name}": column for name, column in answers.items()},
        }

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Take up what `arrays` gave."""
        from bandit_rft.rollout_batch import RolloutBatch

        pairs = zip(arrays["queries"].tolist(), arrays["beta"].tolist(), strict=True)
        self._beta = {query: (a, b) for query, (a, b) in pairs}
        answers = {name.removeprefix("answers|"): x for name, x in arrays.items() if name.startswith("answers|")}
        self._answers = RolloutBatch.from_arrays(answers) if answers else None
