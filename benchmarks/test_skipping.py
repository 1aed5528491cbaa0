"""What it costs to look for rollouts to skip when there are none: the time spent looking, as a share of the round."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from comparison.record import OURS

from bandit_rft.config import build_config
from bandit_rft.metrics import read_metrics
from bandit_rft.ops import policy_loss as operations
from bandit_rft.tasks import Task, load_task
from bandit_rft.trainer import Trainer
from bandit_rft.update import PolicyUpdater


def one(completions: list[str], **columns: Any) -> list[float]:
    return [1.0] * len(completions)


def test_looking_for_rows_to_skip(
    tmp_path: Path, benchmark: Any, monkeypatch: pytest.MonkeyPatch, keep: Callable[..., None]
) -> None:
    looking: list[float] = []

    def timed(function: Any) -> Any:
        def wrapper(*args: Any) -> Any:
            start = time.perf_counter()
            result = function(*args)
            looking[-1] += time.perf_counter() - start
            return result

        return wrapper

    step = PolicyUpdater._step

    def a_step(self: PolicyUpdater, batch: Any, rows: Any, *rest: Any) -> None:
        looking.append(0.0)
        # the selection of whole rollouts, which the step makes as well
        timed(lambda: rows[batch.trained.numpy()[rows] & (batch.advantage.numpy()[rows] != 0)])()
        step(self, batch, rows, *rest)

    for name in ("may_have_gradient", "rows_that_count"):
        monkeypatch.setattr(operations, name, timed(getattr(operations, name)))
    monkeypatch.setattr(PolicyUpdater, "_step", a_step)
    task = load_task("arithmetic")
    task = Task(task.name, task.splits, [one])
    config = build_config(
        {
            "preset": "demo", "max_rounds": 40, "eval_steps": 0, "save_steps": 0, "log_rollouts_steps": 0,
            "evaluation.max_queries": 1, "output_dir": str(tmp_path), "device": "cpu", "learning_rate": 1e-7,
        }
    )  # fmt: skip
    Trainer(config, task=task).run()
    rounds = [line["seconds/round"] for line in read_metrics(tmp_path)[11:]]
    benchmark.pedantic(lambda: None)
    share = statistics.median(looking[10:]) / statistics.median(rounds)
    sides = {OURS: {"role": "ours", "seconds": looking[10:]}, "a round": {"role": "reference", "seconds": rounds}}
    bars = [{"over": OURS, "under": "a round", "at_most": 0.01}]
    case = {"group": "skipping", "sides": sides, "bars": bars}
    keep("looking for rows to skip where there are none", case, f"\n    / a round {share:.4f}")
