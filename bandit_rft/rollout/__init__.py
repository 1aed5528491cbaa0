"""Rollouts: completions drawn from the current policy, with the log-probabilities they were drawn at."""

from bandit_rft.rollout.engine import RolloutEngine, Sampling, sequence_ids

__all__ = ["RolloutEngine", "Sampling", "sequence_ids"]
