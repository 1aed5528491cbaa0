"""Reward functions and the processes they run in."""

from bandit_rft.rewards.spec import BUILTINS, RewardError, RewardFunction
from bandit_rft.rewards.workers import RewardResult, RewardRunner

__all__ = ["BUILTINS", "RewardError", "RewardFunction", "RewardResult", "RewardRunner"]
