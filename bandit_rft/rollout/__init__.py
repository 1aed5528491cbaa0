"""Rollouts: completions drawn from the current policy, with the log-probabilities they were drawn at."""

from bandit_rft.rollout.ahead import Ahead, staleness
from bandit_rft.rollout.engine import Engine, RolloutEngine, Sampling, Watch, sequence_ids
from bandit_rft.rollout.server import RolloutError, ServerEngine

__all__ = [
    "Ahead", "Engine", "RolloutEngine", "RolloutError", "Sampling", "ServerEngine", "Watch", "sequence_ids",
    "staleness",
]  # fmt: skip
