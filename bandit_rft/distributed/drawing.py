"""Drawing and scoring with several ranks, behind the interfaces of one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from bandit_rft.model import Policy
from bandit_rft.rewards import RewardResult
from bandit_rft.rollout import RolloutEngine, Sampling, Watch
from bandit_rft.rollout_batch import RolloutBatch

if TYPE_CHECKING:
    from bandit_rft.data import Scorer
    from bandit_rft.distributed.process import ProcessRanks


class SplitEngine:
    """An engine that draws a run of the prompts on each rank, and gives every rank all rollouts.

    A draw depends on its own random stream and not on the batch around it, so the tokens are those of one rank.
    """

    def __init__(self, engine: RolloutEngine, ranks: ProcessRanks):
        self.engine, self.ranks = engine, ranks

    @property
    def policy(self) -> Policy:
        """What is drawn from."""
        return self.engine.policy

    @property
    def version(self) -> int | None:
        """Of the weights drawn with."""
        return self.engine.version

    @property
    def max_length(self) -> int | None:
        """The longest text, prompt and completion, that is decoded; None: any."""
        return self.engine.max_length

    @property
    def batch_size(self) -> int:
        """Sequences decoded together, by all ranks."""
        return self.engine.batch_size * self.ranks.world

    def generate(
        self, prompts: Sequence[Sequence[int]], ids: Tensor, *, seed: int, sampling: Sampling | None = None, n: int = 1,
        watch: Watch | None = None,
    ) -> RolloutBatch:  # fmt: skip
        """As RolloutEngine.generate."""
        mine = np.array_split(np.arange(len(prompts)), self.ranks.world)[self.ranks.rank]
        part = None
        if len(mine):
            first, end = int(mine[0]), int(mine[-1]) + 1
            if watch is not None:  # it knows the rows of the whole call
                told, before = watch.told, first * n
                watch = replace(watch, told=lambda rows, tokens: told([before + row for row in rows], tokens))
            part = self.engine.generate(
                prompts[first:end], ids[first * n : end * n], seed=seed, sampling=sampling, n=n, watch=watch
            )
        return self.ranks.gather_batch(part).with_columns(query=np.arange(len(prompts)).repeat(n))

    def push(self, version: int) -> None:
        """Draw with the policy as it is trained now, as this version."""
        self.ranks.gather()
        self.engine.push(version)

    def metrics(self) -> Mapping[str, float | int | None]:
        """Of the engine."""
        return self.engine.metrics()

    def close(self) -> None:
        """Close the engine."""
        self.engine.close()


class FirstScorer:
    """Rewards from the first rank's scorer, which alone has workers; every rank gets them."""

    def __init__(self, scorer: Scorer, ranks: ProcessRanks):
        self._scorer, self._ranks = scorer, ranks

    def score(
        self, prompts: Sequence[Any], completions: Sequence[Any], columns: Mapping[str, Sequence[Any]]
    ) -> RewardResult:
        """As RewardRunner.score."""
        said = None
        if self._ranks.first:
            said = json.dumps(asdict(self._scorer.score(prompts, completions, columns))).encode()
        return RewardResult(**json.loads(self._ranks.bytes_from_first(said)))
