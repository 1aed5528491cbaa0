"""One rank of a run that counts what it sends and keeps, sharded and not: counted_trainer.py MODEL FOLDER."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from typing import Any

import torch
from counted_bytes import CollectiveBytes, size
from tiny_models import sums
from tiny_rewards import longer

from bandit_rft.config import build_config
from bandit_rft.listener import Listener
from bandit_rft.tasks import Task
from bandit_rft.trainer import Trainer


class Rounds(Listener):
    """What was sent in each round."""

    def __init__(self, counted: CollectiveBytes):
        self.counted, self.before, self.rounds = counted, Counter[str](), list[dict[str, int]]()

    def round_done(self, metrics: Any) -> None:
        now = Counter(self.counted.sent)
        self.rounds.append(dict(now - self.before))
        self.before = now


def train(model: str, folder: str, shard: str) -> dict[str, Any]:
    config = build_config({
        "preset": "minimal", "model_name_or_path": model, "output_dir": folder, "task": "arithmetic", "device": "cpu",
        "max_rounds": 3, "batch_size": 8, "max_prompt_length": 16, "max_completion_length": 8, "eval_steps": 0,
        "save_steps": 0, "save_total_limit": 0, "verify_steps": 0, "log_rollouts_steps": 0, "evaluation.greedy": False,
        "advantage": "batch_mean", "gradient_checkpointing": True, "distributed.shard": shard,
    })  # fmt: skip
    counted, task = CollectiveBytes(2), sums()
    rounds = Rounds(counted)
    with counted:
        trainer = Trainer(config, rounds, task=Task(task.name, task.splits, [longer]))
        trainer.run()
    of_optimizer = [t for master in trainer.optimizer.masters for t in (master, master.grad)]
    moments = [t for state in trainer.optimizer._adamw.state.values() for t in state.values() if t.ndim]
    return {"rounds": rounds.rounds, "optimizer": size([*of_optimizer, *moments])}


if __name__ == "__main__":
    torch.set_num_threads(1)
    model, folder = sys.argv[1:]
    found = {shard: train(model, f"{folder}/{shard}", shard) for shard in ("fsdp", "ddp")}
    if os.environ["RANK"] == "0":
        print(json.dumps(found))
