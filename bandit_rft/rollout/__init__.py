"""Rollouts: completions drawn from the current policy, with the log-probabilities they were drawn at."""

from bandit_rft.rollout.engine import RolloutEngine, Rollouts, Sampling, sequence_ids

__all__ = ["RolloutEngine", "Rollouts", "Sampling", "sequence_ids"]
