"""Which queries a round asks: those of shuffled epochs, or those of which most is to be learned, by their past rewards.

What a round asks depends on the seed, the round and what the round before left, so that every rank finds
the same queries by itself, and a run that is taken up again asks what it would have asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bandit_rft.history import Arrays
from bandit_rft.selection import Floats, Queries, weighted_order

if TYPE_CHECKING:
    from bandit_rft.metrics import Metrics

#: What a weighted sum of rewards that are 1 may differ from 1 by.
ROUNDING = 1e-9


class Epochs:
    """Queries in the order of shuffled epochs (`query_order`); the place in it is all that has to be remembered.

    Args:
        batch_size: queries of a round; the last partial batch of an epoch is dropped.
        seed: of the shuffles.
    """

    def __init__(self, batch_size: int, seed: int):
        self.batch_size, self.seed = batch_size, seed

    def next(
        self, indices: Sequence[int], first: int, count: int, taken: set[int], number: int
    ) -> tuple[list[int], int]:
        """The queries that a round asks next; fewer than asked for where none is left.

        Args:
            indices: [Q] of the training prompts, their rows in the split.
            first: how many queries were asked before, those passed over included.
            count: how many are wanted.
            taken: places (0 to Q - 1) that the round has already; those found are added.
            number: of the round.

        Returns:
            Places in `indices`, and the next `first`.
        """
        size, found = len(indices), list[int]()
        while len(found) < count and len(taken) < size // self.batch_size * self.batch_size:
            (place,) = query_order(size, self.batch_size, self.seed, first, 1)
            first += 1
            if place not in taken:
                taken.add(place)
                found.append(place)
        return found, first

    def record(self, indices: Sequence[int], queries: Queries, rewards: Floats, number: int) -> Metrics:
        """Take note of a round's rewards; what there is to say of the queries after it."""
        return {}

    def arrays(self) -> Arrays:
        """What is remembered, for a checkpoint."""
        return {}

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Take up what `arrays` gave."""


class Learnable(Epochs):
    """Queries drawn by chance, more often those whose next reward is less certain: a curriculum.

    Of each query two sums are kept, of r and of 1 - r over its rewards r in [0, 1], where a reward counts half after
    `half_life` passes. With 1/2 added to both (Jeffreys' prior) they are a Beta; p is its mean, and the score is

        p (1 - p) + floor

    p (1 - p) is the variance of the next reward, if that is 0 or 1: the learnability of Foster et al. (2502.12272),
    from an estimate that forgets, as in SPO (2509.13232). It is largest for a query that is solved half of the time and
    for one of which nothing is known, never asked or not for long. So none is given up; the floor bounds how seldom one
    is asked.

    A round's queries are drawn one after another from those that are left, with chances in proportion to their scores
    before the round. These are no weights of the loss: the step follows the mean over the queries that were drawn.

    Args:
        batch_size: queries of a round; with the number of queries it says how many rounds a pass has.
        seed: of the draws.
        floor: added to every query's p (1 - p).
        half_life: in passes, rounds times batch_size over the number of queries.
    """

    def __init__(self, batch_size: int, seed: int, *, floor: float, half_life: float):
        super().__init__(batch_size, seed)
        if floor <= 0 or half_life <= 0:
            raise ValueError(f"floor and half_life must be > 0; got {floor} and {half_life}")
        self.floor, self.half_life = floor, half_life
        self._sums: Floats = np.zeros((0, 2))  # of r and 1 - r, by row of the split, worth what they were at ...
        self._asked: Queries = np.zeros(0, dtype=np.int64)  # ... the round of the query's latest reward; 0: never

    def next(
        self, indices: Sequence[int], first: int, count: int, taken: set[int], number: int
    ) -> tuple[list[int], int]:
        """As Epochs; `first` counts the queries that were asked, whichever they were."""
        rng = np.random.Generator(np.random.PCG64([self.seed, number, 0x1EA24]))
        order = weighted_order(self.scores(indices, number), rng).tolist()
        found = list(islice((place for place in order if place not in taken), count))
        taken.update(found)
        return found, first + len(found)

    def scores(self, indices: Sequence[int], number: int) -> Floats:
        """p (1 - p) + floor [Q] of the queries in these rows of the split, as round `number` finds them."""
        rows = self._room_for(indices)
        a, b = (self._worth(rows, number, len(rows)) + 0.5).T
        scores: Floats = a * b / (a + b) ** 2 + self.floor
        return scores

    def record(self, indices: Sequence[int], queries: Queries, rewards: Floats, number: int) -> Metrics:
        """Take note of the rewards [B] of round `number`, NaN where not scored, and of their queries' rows [B].

        Returns:
            queries/seen, the share of the queries that ever had a reward, and queries/effective, how many equally
            likely queries the scores of the next round are worth: (sum s)^2 / (sum s^2), at most Q.

        Raises:
            ValueError: for a reward outside [0, 1].
        """
        every = self._room_for(indices)
        scored = ~np.isnan(rewards)
        queries, rewards = queries[scored], rewards[scored]
        if len(outside := np.flatnonzero((rewards < -ROUNDING) | (rewards > 1 + ROUNDING))):
            raise ValueError(
                f"queries.order=learnable takes rewards in [0, 1]; round {number} has {rewards[outside[0]]:g} for row "
                f"{queries[outside[0]]} of the training split"
            )
        rewards = rewards.clip(0.0, 1.0)
        asked = np.unique(queries)
        self._sums[asked] = self._worth(asked, number, len(every))
        np.add.at(self._sums, queries, np.stack([rewards, 1 - rewards], axis=1))
        self._asked[asked] = number
        scores = self.scores(indices, number + 1)
        return {
            "queries/seen": float((self._asked[every] > 0).mean()),
            "queries/effective": float(scores.sum() ** 2 / (scores**2).sum()),
        }

    def arrays(self) -> Arrays:
        """What is remembered, for a checkpoint."""
        return {"sums": self._sums, "asked": self._asked}

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Take up what `arrays` gave."""
        if "sums" in arrays:
            self._sums, self._asked = arrays["sums"].copy(), arrays["asked"].copy()

    def _worth(self, rows: Queries, number: int, size: int) -> Floats:
        """The sums [len(rows), 2] of some rows of the split, as they count in a round, of Q = `size` queries."""
        passes = (number - self._asked[rows]) * self.batch_size / size
        worth: Floats = self._sums[rows] * 2.0 ** (-passes / self.half_life)[:, None]
        return worth

    def _room_for(self, indices: Sequence[int]) -> Queries:
        """These rows of the split as an array, once there is room for the sums of each."""
        rows = np.array(indices, dtype=np.int64)
        more = int(rows.max()) + 1 - len(self._asked)
        if more > 0:
            self._sums = np.concatenate([self._sums, np.zeros((more, 2))])
            self._asked = np.concatenate([self._asked, np.zeros(more, dtype=np.int64)])
        return rows


def query_order(size: int, batch_size: int, seed: int, first: int, count: int) -> list[int]:
    """Which queries are trained on: shuffled epochs, the last partial batch of each dropped.

    A pure function: all that has to be remembered is `first`.

    Args:
        size: how many queries there are.
        batch_size: of a round.
        seed: of the shuffles.
        first: how many queries of this order came before.
        count: how many are asked for.

    Returns:
        Positions in the set, one for each of first, first + 1, ... first + count - 1.

    Raises:
        ValueError: a batch is more than there is.
    """
    if size < batch_size:
        raise ValueError(f"batch_size={batch_size} is more than the {size} training prompts")
    length = size // batch_size * batch_size
    return [int(_epoch(size, seed, i // length)[i % length]) for i in range(first, first + count)]


@lru_cache(maxsize=2)
def _epoch(size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(size)
