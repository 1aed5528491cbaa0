"""Runs of several ranks, each a process of its own, forked from one that has imported everything; how they compare."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from paths import SUPPORT
from safetensors.torch import load_file

from bandit_rft.metrics import read_metrics

#: What every run begins with. In float64 two orders of a sum differ by 1e-15 of it, so that a wrong normalizer, a
#: gradient counted twice or left out, and a stale weight all stand far above rounding.
TINY = {
    "task": "arithmetic", "device": "cpu", "dtype": "float64", "max_rounds": 10, "batch_size": 6,
    "max_prompt_length": 16, "max_completion_length": 8, "learning_rate": 1e-2, "advantage": "batch_mean",
    "eval_steps": 0, "save_steps": 0, "save_total_limit": 0, "verify_steps": 9, "evaluation.greedy": False,
    "evaluation.max_queries": 5, "log_rollouts_steps": 5,
}  # fmt: skip

#: Something of everything that is kept: moments, a KL coefficient that moves, rollouts, rewards of the past.
REMEMBERING = {
    "max_rounds": 6, "advantage": "history_norm", "replay.capacity": 20, "objective.kl": "k3",
    "objective.kl_coef": 0.05, "kl.target": 0.002, "kl.horizon": 100, "lr_scheduler_type": "linear",
    "lr_scheduler_rounds": 6, "distributed.shard": "fsdp",
}  # fmt: skip


class World:
    """Starts runs of any number of ranks."""

    def __init__(self, folder: Path):
        self.folder = folder
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(
            [sys.executable, str(SUPPORT / "rank_process.py"), str(folder)], text=True, env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip

    def run(
        self, world: int, config: dict[str, Any], meanwhile: Callable[[Sequence[int]], None] = lambda ranks: None,
        **order: Any,
    ) -> list[int]:  # fmt: skip
        """Train; `meanwhile` is told the ranks' process ids. Their exit statuses (negative: a signal)."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"world": world, "config": {**TINY, **config}, **order}) + "\n")
        self.process.stdin.flush()
        try:
            meanwhile([int(word) for word in self.process.stdout.readline().split()])
        finally:  # the next run's first line must not be this one's last
            statuses = self.process.stdout.readline().split()
        return [os.waitstatus_to_exitcode(int(word)) for word in statuses]

    def said(self, rank: int) -> str:
        """What a rank of the latest run wrote to stderr."""
        return (self.folder / f"errors-{rank}").read_text()

    def trains(self, world: int, config: dict[str, Any], **order: Any) -> Path:
        """Train to the end; the run folder."""
        statuses = self.run(world, config, **order)
        assert statuses == [0] * world, "\n".join(self.said(rank)[-3000:] for rank in range(world))
        return Path(config["output_dir"])


#: Of a parameter, in units of a step of AdamW (the learning rate). Weights, gradients and moments are float64, where
#: rounding leaves 1e-15 of a sum; but log-probabilities are kept in float32 between sampler and update, and one that
#: lies between two floats may be rounded either way: 1e-7 of a ratio, an importance weight or a KL. A wrong normalizer,
#: or a share that was left out, is a tenth of a step or more.
TOLERANCE = 1e-5
#: Differs from run to run, or with the rounding of two computations that are compared.
NOT_COMPARED = ("seconds/", "verify/", "sampler_trainer_logprob_diff/")


def same_weights(folder: Path, whole: Path, number: int, atol: float) -> None:
    """Every tensor of a round's checkpoint, the optimizer's too, to `atol`."""
    for pattern in ("*model.safetensors", "optimizer.safetensors"):
        (one,) = (folder / "checkpoints" / f"checkpoint-{number}").glob(pattern)
        found, expected = load_file(one), load_file(whole / "checkpoints" / f"checkpoint-{number}" / one.name)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def same_lines(folder: Path, whole: Path) -> None:
    lines, expected = (
        [{key: x for key, x in line.items() if not key.startswith(NOT_COMPARED)} for line in read_metrics(of)]
        for of in (folder, whole)
    )
    assert [line.keys() for line in lines] == [line.keys() for line in expected]
    for line, other in zip(lines, expected, strict=True):
        for key, value in other.items():
            if value is None or isinstance(value, str):
                assert line[key] == value, (line["round"], key)
            else:  # logged log-probabilities are float32
                assert math.isclose(line[key], value, rel_tol=1e-5, abs_tol=1e-6), (line["round"], key)
