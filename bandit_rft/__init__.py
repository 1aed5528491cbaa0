"""Reinforcement fine-tuning of language models as batched contextual bandit learning.

The operations are loaded when first used, so that `bandit-rft --help` and reward workers do not wait for torch.
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
