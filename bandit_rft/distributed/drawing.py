"""Drawing and scoring with several ranks, behind the interfaces of one."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors.torch
from torch import Tensor

from bandit_rft.model import Policy
from bandit_rft.rewards import RewardResult
from bandit_rft.rollout import RolloutEngine, RolloutError, Sampling, ServerEngine, Watch
from bandit_rft.rollout_batch import RolloutBatch

if TYPE_CHECKING:
    from bandit_rft.data import Scorer
    from bandit_rft.distributed.process import ProcessRanks

#: What the first byte says of those behind it: columns of a batch or nothing, or the words of an error.
DRAWN, FAILED = b"d", b"f"


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

    def push(self, version: int, canary_prompts: Sequence[Sequence[int]] = ()) -> None:
        """Draw with the policy as it is trained now, as this version."""
        self.ranks.gather()
        self.engine.push(version)

    def metrics(self) -> Mapping[str, float | int | None]:
        """Of the engine."""
        return self.engine.metrics()

    def close(self) -> None:
        """Close the engine."""
        self.engine.close()


class FirstEngine:
    """An engine of servers: the first rank alone talks to them, and every rank gets what they drew.

    A failure is told as well. Then all ranks raise the same RolloutError at the same place, and save together what the
    run goes on from.

    Args:
        engine: of each rank; the first one's is asked.
        ranks: that get its rollouts.
    """

    def __init__(self, engine: ServerEngine, ranks: ProcessRanks):
        self.engine, self.ranks = engine, ranks
        self.version: int | None = None

    @property
    def policy(self) -> Policy:
        """What is drawn from."""
        return self.engine.policy

    @property
    def max_length(self) -> int | None:
        """The longest text, prompt and completion, that is decoded; None: any."""
        return self.engine.max_length

    def generate(
        self, prompts: Sequence[Sequence[int]], ids: Tensor, *, seed: int, sampling: Sampling | None = None, n: int = 1,
        watch: Watch | None = None,
    ) -> RolloutBatch:  # fmt: skip
        """As ServerEngine.generate."""
        return self._rollouts(
            lambda: self.engine.generate(prompts, ids, seed=seed, sampling=sampling, n=n, watch=watch)
        )

    def begin(
        self, prompts: Sequence[Sequence[int]], ids: Tensor, *, seed: int, sampling: Sampling | None = None, n: int = 1
    ) -> Callable[[], RolloutBatch]:
        """As ServerEngine.begin; only the first rank has a thread, and all must wait for the rollouts together."""
        first = self.ranks.first
        drawing = self.engine.begin(prompts, ids, seed=seed, sampling=sampling, n=n) if first else None
        return lambda: self._rollouts(drawing)

    def push(self, version: int, canary_prompts: Sequence[Sequence[int]] = ()) -> RolloutBatch | None:
        """As ServerEngine.push, of the policy as it is trained now."""
        self.ranks.gather()
        self.version = version
        return self._from_first(lambda: self.engine.push(version, canary_prompts))

    def metrics(self) -> Mapping[str, float | int | None]:
        """Of the engine; of any but the first rank's, that nothing happened."""
        return self.engine.metrics()

    def close(self) -> None:
        """Close the engine."""
        self.engine.close()

    def _rollouts(self, ask: Callable[[], RolloutBatch] | None) -> RolloutBatch:
        drawn = self._from_first(ask)
        assert drawn is not None
        return drawn

    def _from_first(self, ask: Callable[[], RolloutBatch | None] | None) -> RolloutBatch | None:
        """What the first rank's `ask` returns, or the error that nothing can be had, on every rank."""
        said = None
        if self.ranks.first:
            assert ask is not None
            try:
                answer = ask()
                said = DRAWN + (safetensors.torch.save(answer.columns()) if answer is not None else b"")
            except RolloutError as error:
                self.ranks.bytes_from_first(FAILED + str(error).encode())
                raise
        said = self.ranks.bytes_from_first(said)
        kind, content = said[:1], said[1:]
        if kind == FAILED:
            raise RolloutError(content.decode())
        return RolloutBatch(**safetensors.torch.load(content)) if content else None


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
