"""Reward functions and the processes they run in.

The runner is loaded when first used: a worker process needs the functions alone, and starts sooner without it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from bandit_rft.rewards.spec import BUILTINS, RewardError, RewardFunction

if TYPE_CHECKING:
    from bandit_rft.rewards.runner import RewardResult, RewardRunner

__all__ = ["BUILTINS", "RewardError", "RewardFunction", "RewardResult", "RewardRunner"]


def __getattr__(name: str) -> Any:
    if name in ("RewardResult", "RewardRunner"):
        return getattr(import_module("bandit_rft.rewards.runner"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
