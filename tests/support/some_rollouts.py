"""Rollouts made up for the tests of the update."""

from __future__ import annotations

from dataclasses import replace

import torch

from bandit_rft.model import Policy
from bandit_rft.rollout_batch import RolloutBatch
from bandit_rft.update import score_rollouts


def some_batch(policy: Policy, *, stale: float = 0.0) -> RolloutBatch:
    """Nine completions with the log-probabilities the policy gives them (moved by up to `stale`)."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 9, (9,), generator=generator).tolist()
    tokens = torch.randint(2, 40, (sum(lengths),), generator=generator)
    prompts = [[1, 4 + i, 9] for i in range(9)]
    nothing = torch.zeros(len(tokens))
    batch = RolloutBatch.of(
        prompts, tokens, lengths, nothing, nothing, [False] * 9, round=1, advantage=[1, -1, 0, 2, -0.5, 1, 0, -2, 1]
    )
    logprobs = score_rollouts(policy, batch, temperature=1.0, tokens_per_microbatch=10_000)
    return replace(batch, logprobs=logprobs + stale * torch.randn(len(tokens), generator=generator))


def some_rollouts(seed: int = 0, count: int = 7, longest: int = 8) -> RolloutBatch:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    prompts = [torch.randint(3, 40, (int(k),), generator=generator).tolist() for k in torch.randint(1, 6, (count,))]
    tokens = torch.randint(2, 40, (sum(lengths),), generator=generator)
    logprobs = -torch.rand(len(tokens), generator=generator) * 4
    return RolloutBatch.of(prompts, tokens, lengths, logprobs, torch.ones(len(tokens)), [False] * count, round=1)
