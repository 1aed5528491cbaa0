"""A Hugging Face causal LM as hidden states and a head: taken apart, checked, packed, adapted, verified."""

from bandit_rft.model.policy import Policy
from bandit_rft.model.split import UnsupportedModelError

__all__ = ["Policy", "UnsupportedModelError"]
