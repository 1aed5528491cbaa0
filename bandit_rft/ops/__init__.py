"""The operations: what a custom training loop needs of the LM head. See docs/operations.md."""

from .backends import checked, describe, use_backend
from .logprobs import linear_logprobs, logprobs_from_logits
from .objective import PolicyObjective
from .padding import Packed, pack, unpack
from .policy_loss import PolicyLoss, linear_policy_loss, policy_loss_from_logits
from .reference import Sample
from .sampling import linear_sample, sample_from_logits

__all__ = [
    "Packed",
    "PolicyLoss",
    "PolicyObjective",
    "Sample",
    "checked",
    "describe",
    "linear_logprobs",
    "linear_policy_loss",
    "linear_sample",
    "logprobs_from_logits",
    "pack",
    "policy_loss_from_logits",
    "sample_from_logits",
    "unpack",
    "use_backend",
]
