"""What a trainer draws with: an engine that has its weights, and the next round ahead where that is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from bandit_rft.assemble import logprob_gap_limit
from bandit_rft.config import Config
from bandit_rft.data import PromptSet
from bandit_rft.distributed import Ranks
from bandit_rft.distributed.drawing import FirstEngine
from bandit_rft.gates import check_canaries
from bandit_rft.hopeless import Hopeless
from bandit_rft.metrics import Metrics
from bandit_rft.model import Policy
from bandit_rft.rollout import Ahead, Engine, Sampling, ServerEngine, sequence_ids
from bandit_rft.rollout_batch import RolloutBatch
from bandit_rft.update import score_rollouts

TRAINING_STREAM = 0


class Sampler:
    """Draws a trainer's rollouts.

    Args:
        engine: draws completions.
        policy: the trainer's, as it is trained: it scores what a server draws with.
        prompts: those trained on.
        config: of the run.
        ahead: holds the round that is drawn while another is trained on; None: none is.
        ranks: the processes that train together.
        hopeless: what ends rollouts early; None: nothing does.
    """

    def __init__(
        self, engine: Engine, policy: Policy, prompts: PromptSet, config: Config,
        ahead: Ahead | None, ranks: Ranks, hopeless: Hopeless | None = None,
    ):  # fmt: skip
        self.engine, self.policy, self.prompts, self.config, self.ahead = engine, policy, prompts, config, ahead
        self.ranks, self.hopeless = ranks, hopeless
        self._canary: Metrics = {}
        r = config.rollout
        self._sampling = Sampling(config.temperature, r.top_k, r.top_p, r.min_p)

    def refresh(self, version: int) -> None:
        """Have the engine draw with the policy as it is now; of a server, see that it does.

        Raises:
            RolloutError: a server did not take the weights.
            CanaryError: it took them, and draws with others.
        """
        if self.engine.version == version:
            return
        if self.ahead is not None:
            self.ahead.settle()  # by the weights that it was begun with
        config = self.config
        score = partial(
            score_rollouts, self.policy, temperature=config.temperature,
            tokens_per_microbatch=config.tokens_per_microbatch, ranks=self.ranks,
        )  # fmt: skip
        canaries = self.engine.push(version, self.prompts.tokens[: config.rollout.canary_prompts])
        self._canary = check_canaries(
            canaries, score, logprob_gap_limit(self.policy, config),
            correct=config.rollout.on_logprob_gap == "correct", where=f"round {version}",
        )  # fmt: skip

    def draw(self, positions: Sequence[int], number: int) -> RolloutBatch:
        """The rollouts of round `number` of the prompts at some positions; nothing of the trainer is changed."""
        asked, columns = self._asked(positions, number)
        if self.hopeless is not None and self.policy.tokenizer is not None:
            examples = [self.prompts.examples[i] for i in positions for _ in range(self.config.num_generations)]
            asked["watch"] = self.hopeless.watch(examples, self.policy.tokenizer)
        return self.engine.generate(**asked).with_columns(**columns)

    def begin(self, positions: Sequence[int], end: int, number: int) -> None:
        """Start to draw round `number` ahead; `end` is the place in the order of queries behind it."""
        assert self.ahead is not None and isinstance(self.engine, ServerEngine | FirstEngine)
        asked, columns = self._asked(positions, number)
        drawing = self.engine.begin(**asked)
        self.ahead.begin(positions, end, lambda: drawing().with_columns(**columns))

    def _asked(self, positions: Sequence[int], number: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """What an engine is asked for, and the columns by which a round knows what it answers."""
        prompts, n = self.prompts, self.config.num_generations
        queries = np.array([prompts.indices[i] for i in positions for _ in range(n)])  # one a rollout
        attempts = np.tile(np.arange(n), len(positions))
        asked = {
            "prompts": [prompts.tokens[i] for i in positions],
            "ids": sequence_ids(TRAINING_STREAM, number, queries, attempts),
            "seed": self.config.seed, "sampling": self._sampling, "n": n,
        }  # fmt: skip
        return asked, {"query": queries, "attempt": attempts, "round": number}

    def metrics(self) -> Metrics:
        """Of the latest push, and what servers did since the last call."""
        return {**self.engine.metrics(), **self._canary}
