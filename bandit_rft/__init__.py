"""Reinforcement fine-tuning of language models as batched contextual bandit learning.

Everything is loaded when first used: `bandit-rft --help` and reward workers do not wait for torch, and the operations
need nothing besides torch.

One round of a bandit, from hidden states [B, H] and a head [V, H]:

    >>> import torch
    >>> from bandit_rft import PolicyObjective, linear_policy_loss, linear_sample
    >>> _ = torch.manual_seed(0)
    >>> hidden = torch.randn(4, 8, requires_grad=True)
    >>> weight = torch.randn(16, 8, requires_grad=True)
    >>> sample = linear_sample(hidden, weight, seed=0, sequence_ids=torch.arange(4), positions=torch.zeros(4).long())
    >>> rewards = torch.tensor([1.0, 0.0, 0.0, 1.0])
    >>> loss, stats, logprobs = linear_policy_loss(
    ...     hidden, weight, sample.tokens, rewards, torch.arange(5).int(), objective=PolicyObjective("reinforce")
    ... )
    >>> loss.backward()
    >>> int(stats["tokens_computed"]), int(stats["tokens_skipped"])  # what earned nothing is not computed
    (2, 2)
    >>> torch.allclose(logprobs[rewards > 0], sample.logprobs[rewards > 0], atol=1e-5)
    True
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import advantages, ops
    from .config import Config
    from .listener import Listener
    from .model import Policy
    from .ops import (
        Packed,
        PolicyLoss,
        PolicyObjective,
        Sample,
        linear_logprobs,
        linear_policy_loss,
        linear_sample,
        logprobs_from_logits,
        pack,
        policy_loss_from_logits,
        sample_from_logits,
        unpack,
    )
    from .replay import Replay, reweigh
    from .rewards import RewardFunction, RewardRunner
    from .rollout import RolloutEngine, Sampling, sequence_ids
    from .rollout_batch import RolloutBatch
    from .run_result import RunResult
    from .tasks import Example, Task, load_task
    from .trainer import Trainer
    from .update import TrainingInputs, score_rollouts, training_inputs

__all__ = [
    "Config",
    "Example",
    "Listener",
    "Packed",
    "Policy",
    "PolicyLoss",
    "PolicyObjective",
    "Replay",
    "RewardFunction",
    "RewardRunner",
    "RolloutBatch",
    "RolloutEngine",
    "RunResult",
    "Sample",
    "Sampling",
    "Task",
    "Trainer",
    "TrainingInputs",
    "advantages",
    "linear_logprobs",
    "linear_policy_loss",
    "linear_sample",
    "load_task",
    "logprobs_from_logits",
    "ops",
    "pack",
    "policy_loss_from_logits",
    "reweigh",
    "sample_from_logits",
    "score_rollouts",
    "sequence_ids",
    "training_inputs",
    "unpack",
]

#: Where the names are that are not operations; the operations need torch alone, these the extra [train].
_MODULES = {
    "Config": "config",
    "Example": "tasks",
    "Listener": "listener",
    "Policy": "model",
    "Replay": "replay",
    "RewardFunction": "rewards",
    "RewardRunner": "rewards",
    "RolloutBatch": "rollout_batch",
    "RolloutEngine": "rollout",
    "RunResult": "run_result",
    "Sampling": "rollout",
    "Task": "tasks",
    "Trainer": "trainer",
    "TrainingInputs": "update",
    "load_task": "tasks",
    "reweigh": "replay",
    "score_rollouts": "update",
    "sequence_ids": "rollout",
    "training_inputs": "update",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("bandit_rft")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "ops":
        return import_module(".ops", __name__)
    try:
        if name == "advantages":
            return import_module(".advantages", __name__)
        return getattr(import_module(f".{_MODULES.get(name, 'ops')}", __name__), name)
    except ModuleNotFoundError as error:
        if (name not in _MODULES and name != "advantages") or (error.name or "").split(".")[0] == __name__:
            raise
        raise ModuleNotFoundError(
            f"bandit_rft.{name} needs {error.name}, which is not installed: pip install 'bandit_rft[train]'",
            name=error.name,
        ) from error


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
