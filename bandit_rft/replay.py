"""Trajectory replay: rollouts kept to be trained on again, with the log-probabilities of the policy that drew them.

With these an importance weight against today's policy can be formed. (The paper's replay is of rewards, not of
rollouts: that is the advantage `history_norm`, see history.py.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from bandit_rft.history import Arrays
from bandit_rft.rollout_batch import RolloutBatch
from bandit_rft.selection import SELECTIONS

if TYPE_CHECKING:
    from bandit_rft.metrics import Metrics

#: Upper ends of the staleness histogram's classes, in rounds; the last class is open.
STALENESS_CLASSES = (1, 3, 7, 15)


class Replay:
    """The newest `capacity` rollouts, first in, first out, in host memory.

    Args:
        capacity: rollouts.
    """

    def __init__(self, capacity: int):
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1 rollout; got {capacity}")
        self.capacity = capacity
        self.kept: RolloutBatch | None = None  # oldest first

    def __repr__(self) -> str:
        return f"Replay({len(self):,} of {self.capacity:,} rollouts)"

    def __len__(self) -> int:
        return 0 if self.kept is None else len(self.kept)

    def add(self, batch: RolloutBatch) -> None:
        """Keep the rollouts of the current round, in order; the oldest ones make room."""
        every = batch if self.kept is None else RolloutBatch.cat([self.kept, batch])
        self.kept = every.select(range(max(len(every) - self.capacity, 0), len(every)))

    def draw(
        self, count: int, *, now: int, sampling: str = "uniform", max_staleness: int | None = None, seed: int = 0
    ) -> tuple[RolloutBatch | None, float]:
        """Up to `count` rollouts, without repeats, and the share of those kept that was young enough to be drawn.

        Args:
            count: at most so many.
            now: the current round; with the seed it is all that the choice depends on.
            sampling: uniform, or by the advantage: see SELECTIONS.
            max_staleness: rollouts drawn more rounds ago stay out; None: none does.
            seed: of the choice.

        Returns:
            (rollouts, share); (None, share) when there is nothing to draw.

        Raises:
            ValueError: for an unknown sampling.
        """
        if sampling not in SELECTIONS:
            raise ValueError(f"sampling must be one of {', '.join(SELECTIONS)}; got {sampling!r}")
        if self.kept is None or not len(self.kept):
            return None, 1.0
        young = np.arange(len(self.kept))
        if max_staleness is not None:
            young = young[now - self.kept.round.numpy() <= max_staleness]
        rng = np.random.Generator(np.random.PCG64([seed, now, 0x5E91A7]))
        advantages = self.kept.advantage.double().numpy()[young]
        chosen = young[SELECTIONS[sampling](advantages, min(count, len(young)), rng)]
        return self.kept.select(chosen) if len(chosen) else None, len(young) / len(self.kept)

    def arrays(self) -> Arrays:
        """The columns of everything kept, for a checkpoint."""
        return {} if self.kept is None else self.kept.arrays()

    def restore(self, arrays: Arrays) -> None:
        """Take up what `arrays` gave."""
        self.kept = RolloutBatch.from_arrays(arrays) if arrays else None


def reweigh(
    old: RolloutBatch,
    score: Callable[[RolloutBatch], Tensor],
    *,
    correction: str = "token",
    cap: float = 2.0,
    every: bool = False,
) -> tuple[RolloutBatch, Metrics]:
    """Replayed rollouts with today's log-probabilities and their truncated importance weights, and how these look.

    An objective's ratio then starts from today's policy, whatever policy drew the rollout (decoupled PPO,
    arXiv 2110.00641).

    Args:
        old: the replayed rollouts, with the log-probabilities of the policy that drew them.
        score: today's log-probabilities [n] of a batch's n tokens.
        correction: token | sequence, see `importance_weights`.
        cap: largest weight.
        every: also weigh rollouts whose advantage is 0; otherwise they are not scored and weigh 1.

    Raises:
        ValueError: for an unknown correction.
    """
    if correction not in ("token", "sequence"):
        raise ValueError(f"correction must be token or sequence; got {correction!r}")
    rows = np.arange(len(old)) if every else np.flatnonzero(old.advantage.numpy())
    logprobs, importance = old.logprobs.clone(), torch.ones_like(old.logprobs)
    part = old.select(rows)
    today = score(part)
    weights, truncated = importance_weights(part.split(today - part.logprobs), correction, cap)
    mask = torch.zeros(len(old), dtype=torch.bool)
    mask[rows] = True
    scored = old.per_token(mask)
    logprobs[scored] = today
    if weights:
        importance[scored] = torch.cat(weights)
    return replace(old, logprobs=logprobs, importance=importance), {
        "replay/truncated_fraction": truncated,
        "replay/effective_sample_size": effective_sample_size(torch.cat(weights)) if weights else None,
    }


def importance_weights(log_ratios: Sequence[Tensor], correction: str, cap: float) -> tuple[list[Tensor], float]:
    """Truncated importance weights of completions from their tokens' log(policy / behavior), and the share truncated.

    "token": min(ratio, cap) for each token. "sequence": min(product of ratios, cap), the same for all tokens.
    """
    if correction == "sequence":
        log_ratios = [ratio.sum().expand_as(ratio) for ratio in log_ratios]
    weights = [ratio.double().exp().clamp(max=cap).float() for ratio in log_ratios]
    truncated = sum(int((w >= cap).sum()) for w in weights) / max(sum(len(w) for w in weights), 1)
    return weights, truncated


def effective_sample_size(weights: Tensor) -> float:
    """(sum w)^2 / (n sum w^2), between 1/n and 1: which share of so many equal weights these are worth."""
    return float(weights.sum() ** 2 / (len(weights) * (weights * weights).sum()))


def staleness_metrics(drawn: RolloutBatch | None, now: int) -> Metrics:
    """How old the replayed rollouts are: mean, largest, and a histogram, in rounds since they were drawn."""
    ages = now - drawn.round.numpy() if drawn is not None else np.zeros(0, dtype=np.int64)
    metrics: Metrics = {
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
