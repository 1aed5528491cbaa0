"""What a round draws: completions of queries with their rewards, and which of them are worth training on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from bandit_rft.replay import Trajectory
from bandit_rft.rewards import RewardResult
from bandit_rft.rollout import Rollouts
from bandit_rft.tasks import Example


@dataclass(frozen=True)
class Draw:
    """B completions and what they earned, in the order of their queries."""

    queries: NDArray[np.int64]  # [B], index in the training split
    attempts: NDArray[np.int64]  # [B], 0 .. n - 1 within a query
    examples: list[Example]
    rollouts: Rollouts
    texts: list[str]
    rewards: RewardResult

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def scored(self) -> NDArray[np.bool_]:
        """[B]; False where the reward was None: as if never drawn."""
        return np.array([total is not None for total in self.rewards.total], dtype=bool)

    @property
    def totals(self) -> NDArray[np.float64]:
        """[B] rewards, NaN where there is none."""
        return np.array([np.nan if total is None else total for total in self.rewards.total], dtype=np.float64)

    def trajectories(self, advantages: NDArray[np.float32], rows: Iterable[int], round_index: int) -> list[Trajectory]:
        """The completions `rows` as they are kept for replay."""
        tokens = self.rollouts.tokens.cpu().numpy().astype(np.int32)
        logprobs, totals = self.rollouts.logprobs.float().cpu().numpy(), self.totals
        return [
            Trajectory(
                round=round_index, query=int(self.queries[i]), rollout=int(self.attempts[i]),
                prompt=np.array(self.rollouts.prompts[i], dtype=np.int32), tokens=tokens[self.rollouts.slice_of(i)],
                logprobs=logprobs[self.rollouts.slice_of(i)], reward=float(totals[i]), advantage=float(advantages[i]),
                truncated=self.rollouts.truncated[i],
            )
            for i in rows
        ]  # fmt: skip


def join(draws: Sequence[Draw]) -> Draw:
    """Several draws of one round as one."""
    if len(draws) == 1:
        return draws[0]
    results = [draw.rewards for draw in draws]
    failures: dict[str, int] = {}
    for result in results:
        for name, count in result.failures.items():
            failures[name] = failures.get(name, 0) + count
    names = results[0].per_function
    return Draw(
        np.concatenate([draw.queries for draw in draws]), np.concatenate([draw.attempts for draw in draws]),
        [example for draw in draws for example in draw.examples], join_rollouts([draw.rollouts for draw in draws]),
        [text for draw in draws for text in draw.texts],
        RewardResult(
            [x for result in results for x in result.total],
            {name: [x for result in results for x in result.per_function[name]] for name in names}, failures,
        ),
    )  # fmt: skip


def join_rollouts(parts: Sequence[Rollouts]) -> Rollouts:
    """Batches of completions one after another."""
    return Rollouts(
        [p for part in parts for p in part.prompts], [n for part in parts for n in part.lengths],
        torch.cat([part.tokens for part in parts]), torch.cat([part.logprobs for part in parts]),
        torch.cat([part.entropy for part in parts]), [t for part in parts for t in part.truncated],
    )  # fmt: skip


def replayed_rollouts(trajectories: Sequence[Trajectory], device: torch.device) -> Rollouts:
    """Kept trajectories as the update takes them; their entropy is not kept (NaN)."""
    tokens = np.concatenate([t.tokens for t in trajectories]).astype(np.int64)
    logprobs = torch.from_numpy(np.concatenate([t.logprobs for t in trajectories]))
    return Rollouts(
        [t.prompt.tolist() for t in trajectories], [len(t.tokens) for t in trajectories],
        torch.from_numpy(tokens).to(device), logprobs.to(device), torch.full_like(logprobs, torch.nan).to(device),
        [t.truncated for t in trajectories],
    )  # fmt: skip


def constant_groups(draw: Draw) -> set[int]:
    """Queries whose scored completions all earned exactly the same: a group advantage learns nothing from them."""
    totals = draw.totals
    constant = set()
    for query in np.unique(draw.queries).tolist():
        rewards = totals[(draw.queries == query) & draw.scored]
        if not len(rewards) or (rewards == rewards[0]).all():
            constant.add(query)
    return constant


def most_varied(rewards: NDArray[np.float64], groups: NDArray[np.int64], keep: int) -> NDArray[np.bool_]:
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
