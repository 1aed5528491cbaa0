"""Reinforcement fine-tuning of language models as batched contextual bandit learning.

The operations are loaded when first used, so that `bandit-rft --help` and reward workers do not wait for torch.

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
    from .ops import (
        PolicyLoss,
        PolicyObjective,
        Sample,
        linear_logprobs,
        linear_policy_loss,
        linear_sample,
        logprobs_from_logits,
        policy_loss_from_logits,
        sample_from_logits,
    )

__all__ = [
    "PolicyLoss",
    "PolicyObjective",
    "Sample",
    "linear_logprobs",
    "linear_policy_loss",
    "linear_sample",
    "logprobs_from_logits",
    "policy_loss_from_logits",
    "sample_from_logits",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(".ops", __name__), name)
    if name == "__version__":
        from importlib.metadata import version

        return version("bandit_rft")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
