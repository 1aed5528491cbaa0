"""Runs of several ranks, each a process of its own, forked from one that has imported everything."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from paths import SUPPORT
from tiny_models import save_tiny_llama

#: What every run begins with. In float64 two orders of a sum differ by 1e-15 of it, so that a wrong normalizer, a
#: gradient counted twice or left out, and a stale weight all stand far above rounding.
TINY = {
    "task": "arithmetic", "device": "cpu", "dtype": "float64", "max_rounds": 10, "batch_size": 6, "max_prompt_length": 16,
    "max_completion_length": 8, "learning_rate": 1e-2, "advantage": "batch_mean", "eval_steps": 0, "save_steps": 0,
    "save_total_limit": 0, "verify_steps": 9, "evaluation.greedy": False,
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
        meanwhile([int(word) for word in self.process.stdout.readline().split()])
        return [os.waitstatus_to_exitcode(int(word)) for word in self.process.stdout.readline().split()]

    def said(self, rank: int) -> str:
        """What a rank of the latest run wrote to stderr."""
        return (self.folder / f"errors-{rank}").read_text()

    def trains(self, world: int, config: dict[str, Any], **order: Any) -> Path:
        """Train to the end; the run folder."""
        statuses = self.run(world, config, **order)
        assert statuses == [0] * world, "\n".join(self.said(rank)[-3000:] for rank in range(world))
        return Path(config["output_dir"])


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("ranks"))
    yield world
    os.killpg(world.process.pid, signal.SIGKILL)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Models by what their head is; V is odd, and no multiple of the ranks."""
    folder = tmp_path_factory.mktemp("models")
    return {
        "untied": str(save_tiny_llama(folder / "untied", vocab_size=49)),
        "tied": str(save_tiny_llama(folder / "tied", vocab_size=49, tie_word_embeddings=True)),
    }
