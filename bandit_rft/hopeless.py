"""Rollouts that are ended once their reward can only be 0: which these are, and what does not go with it.

A reward tells by a function beside it. Its module holds HOPELESS, a mapping from the reward's name to a function of the
beginning of a completion (a text) and of columns of the data, as a reward of kind "sample" takes them. It returns True
only where no completion that begins so earns anything, the beginning itself included; False says nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from bandit_rft.rewards import RewardError, RewardFunction
from bandit_rft.rollout import Watch
from bandit_rft.rollout_batch import RolloutBatch
from bandit_rft.tasks import Example, Task, collate


class Hopeless:
    """What a task's reward tells of the beginnings of completions.

    Args:
        task: with one reward, whose module tells.
        every: tokens between two looks at a completion.

    Raises:
        ValueError: the task has several rewards, or one that does not tell.
    """

    def __init__(self, task: Task, every: int):
        self.every = every
        rewards = [reward for reward in task.rewards if isinstance(reward, RewardFunction)]
        names = ", ".join(reward.name for reward in rewards)
        if len(rewards) != 1:
            raise ValueError(f"rollout.stop_hopeless needs a task with one reward; {task.name} has {names}")
        function = rewards[0].load(prepare=False)
        told = getattr(function, "__globals__", {}).get("HOPELESS", {})
        if (check := told.get(getattr(function, "__name__", ""))) is None:
            raise ValueError(
                "rollout.stop_hopeless needs a reward that tells early that a completion will earn nothing; "
                f"{names} has no function in HOPELESS of its module (docs/tasks-and-rewards.md)"
            )
        name = f"HOPELESS of {names}"
        self._check, self._reward = check, RewardFunction(f"{check.__module__}:{name}", "sample", function=check)
        self._reward.check_columns(check, task.columns)

    def watch(self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> Watch:
        """What an engine asks while it draws completions; `examples` are those of its rows."""

        def told(rows: list[int], tokens: list[list[int]]) -> list[bool]:
            # What follows may complete a character whose first bytes are there: it is no part of the text yet.
            texts = [text.rstrip("\ufffd") for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]
            of = [examples[row] for row in rows]
            calls = self._reward.calls(self._check, [one.prompt for one in of], texts, collate(of))
            entries = [entry for call in calls for entry in call]
            if failed := [entry for entry in entries if isinstance(entry, str)]:
                raise RewardError(f"reward {self._reward.name}: {failed[0]}")
            return [bool(entry) for entry in entries]

        return Watch(self.every, told)


def hopeless_count(batch: RolloutBatch, stop_tokens: Sequence[int]) -> int:
    """How many rollouts were ended early: neither by a stop token nor by the length limit."""
    last = batch.tokens[batch.cu_seqlens[1:].long() - 1]
    return int((~batch.truncated & ~torch.isin(last, torch.tensor(list(stop_tokens)))).sum())
