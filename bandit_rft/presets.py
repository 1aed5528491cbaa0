"""Presets: sets of configuration values with a name, each on top of another or of the defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Two trees as one: what `above` says holds, key by key; a section it names keeps its other keys."""
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        merged[key] = merge(under, value) if isinstance(under, Mapping) and isinstance(value, Mapping) else value
    return merged


PRESETS: dict[str, dict[str, Any]] = {
    # arXiv 2601.22532, the baseline: raw outcome reward in the clipped surrogate, KL to the initial model.
    "paper": {
        "batch_size": 32, "num_generations": 1, "advantage": "reward", "learning_rate": 1e-6, "weight_decay": 0.01,
        "adam_beta1": 0.9, "adam_beta2": 0.999, "max_grad_norm": 1.0, "temperature": 1.0, "max_prompt_length": 512,
        "max_completion_length": 1024, "eval_steps": 100,
        "objective": {
            "kind": "ppo", "clip_low": 0.2, "clip_high": 0.2, "dual_clip": 3.0, "aggregation": "token-mean", "kl": "k3",
            "kl_coef": 0.001, "entropy_coef": 0.0,
        },
        "evaluation": {"num_samples": 1, "greedy": False},
    },
}  # fmt: skip
#: The paper's baseline without the KL term, which is what lets rollouts of reward 0 cost nothing.
PRESETS["minimal"] = merge(PRESETS["paper"], {"objective": {"kl": "none", "kl_coef": 0.0}})
#: For rollouts of an earlier policy (rollout.ahead): one a query, compared with the query's running mean; tokens whose
#: ratio to the sampler lies outside a band are dropped (as in SAO, arXiv 2607.07508).
PRESETS["single-rollout"] = merge(PRESETS["minimal"], {
    "advantage": "history_mean",
    "objective": {"kind": "importance_mask", "importance_floor": 0.2, "importance_cap": 4.0, "dual_clip": None},
})  # fmt: skip
#: Minimal on the built-in task and model, with greedy answers as well: they are short.
PRESETS["demo"] = merge(PRESETS["minimal"], {
    "model_name_or_path": "arithmetic-base", "task": "arithmetic", "learning_rate": 5e-5, "max_rounds": 160,
    "max_prompt_length": 64, "max_completion_length": 64, "eval_steps": 40, "save_steps": 80,
    "evaluation": {"greedy": True, "max_queries": 500},
})  # fmt: skip
