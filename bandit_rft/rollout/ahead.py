"""The next round's rollouts, drawn while this round is trained on: one round ahead, never more.

A checkpoint waits for them and keeps them, so a continued run trains on the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bandit_rft.rollout_batch import RolloutBatch


class Ahead:
    """One round's rollouts under way, or drawn and waiting."""

    def __init__(self) -> None:
        self._drawing: Callable[[], RolloutBatch] | None = None
        self._failed: Exception | None = None
        self._batch: RolloutBatch | None = None
        self._positions, self._end = list[int](), 0

    def begin(self, positions: Sequence[int], end: int, drawing: Callable[[], RolloutBatch]) -> None:
        """Keep what has begun to be drawn.

        Args:
            positions: of the queries, in the training prompts.
            end: the position in the order of queries behind them.
            drawing: waits for the rollouts, and is called once; with several ranks, by all of them.
        """
        self._positions, self._end, self._drawing = list(positions), end, drawing

    def settle(self) -> None:
        """Wait until nothing is being drawn."""
        drawing, self._drawing = self._drawing, None
        if drawing is not None:
            try:
                self._batch = drawing()
            except Exception as error:  # told where the rollouts are wanted
                self._failed = error

    def take(self) -> tuple[list[int], int, RolloutBatch] | None:
        """(positions, end, rollouts) of what was begun, once; None where nothing was. Raises what drawing raised."""
        self.settle()
        failed, batch = self._failed, self._batch
        self._failed = self._batch = None
        if failed is not None:
            raise failed
        return None if batch is None else (self._positions, self._end, batch)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What was drawn and not trained on yet, for a checkpoint; {} where nothing was, or where drawing failed.

        `settle` comes first, on every rank: this one may be the only one to ask.
        """
        assert self._drawing is None
        if self._batch is None:
            return {}
        place = np.array([*self._positions, self._end], dtype=np.int64)
        return {"place": place, **{f"batch|{name}": column for name, column in self._batch.arrays().items()}}

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Take up what `arrays` gave."""
        if "place" not in arrays:
            return
        *self._positions, self._end = arrays["place"].tolist()
        columns = {name.removeprefix("batch|"): x for name, x in arrays.items() if name.startswith("batch|")}
        self._batch = RolloutBatch.from_arrays(columns)


def staleness(batch: RolloutBatch, version: int) -> dict[str, float | int | None]:
    """How many versions older than the policy that is about to be trained its rollouts' policies are."""
    ages = version - batch.weight_version.numpy()
    return {"rollout/staleness/mean": float(ages.mean()), "rollout/staleness/max": int(ages.max())}
