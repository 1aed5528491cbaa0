"""Reinforcement fine-tuning of language models as batched contextual bandit learning."""

from importlib.metadata import PackageNotFoundError, version

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

try:
    __version__ = version("bandit_rft")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

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
