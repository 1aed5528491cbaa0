"""Drawing whole completions with the 1.1M model: by the core, and by the model's own forward."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from bandit_rft.model import Policy
from bandit_rft.rollout import RolloutEngine, sequence_ids

from . import models
from .record import OURS

FORWARD = "the model's own forward"


def sides(folder: Path, sequences: int, prompt: int, new: int) -> dict[str, Callable[[], Any]]:
    """Each draws `new` tokens for every sequence; the model is written to the folder where it is not there yet."""
    if not (folder / "config.json").exists():
        models.make("1.1M", folder)
    policy = Policy(AutoModelForCausalLM.from_pretrained(folder))
    policy.stop_tokens = []
    prompts = torch.randint(3, 1024, (sequences, prompt), generator=torch.Generator().manual_seed(0)).tolist()
    ids = sequence_ids(0, 1, list(range(sequences)), 0)
    native, model = (RolloutEngine(policy, max_completion_length=new) for _ in range(2))
    model._native = None
    return {
        OURS: lambda: native.generate(prompts, ids, seed=1),
        FORWARD: lambda: model.generate(prompts, ids, seed=1),
    }
