"""What several ranks are refused, how work is shared, and what a process that is alone is asked."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from typing import Any

import numpy as np
import pytest
import torch
from paths import SUPPORT
from tiny_models import tiny_llama

from bandit_rft.cli import main
from bandit_rft.distributed import Ranks, join_ranks
from bandit_rft.distributed.ranks import balanced
from bandit_rft.distributed.sharded import ShardedPolicy
from bandit_rft.launched import launched_rank
from bandit_rft.model import Policy, UnsupportedModelError

DEMO = ["--preset", "demo", "--device", "cpu", "--max_rounds", "1"]
SERVER = ["--rollout.engine", "vllm", "--rollout.urls", "http://a:1"]
LAUNCHED = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_work_is_shared_once_and_evenly(world: int) -> None:
    sizes = np.random.default_rng(world).integers(1, 100, 40)
    shares = balanced(sizes.tolist(), world)
    assert sorted(np.concatenate(shares).tolist()) == list(range(40))
    loads = [int(sizes[share].sum()) for share in shares]
    # Graham's bound for the largest first: 4/3 of the best, which is no less than the mean.
    assert max(loads) <= (4 / 3) * sizes.sum() / world + sizes.max() / 3


def test_less_work_than_ranks_leaves_some_without() -> None:
    assert [share.tolist() for share in balanced([5, 9], 3)] == [[1], [0], []]
    assert [share.tolist() for share in balanced([], 2)] == [[], []]


def test_a_process_that_is_alone_has_no_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with join_ranks(sharded=True, timeout_s=1.0, gpu=False) as ranks:
        assert type(ranks) is Ranks and ranks.first and not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["train", *DEMO, *SERVER, "--rollout.push", "nccl"], "rollout.push=nccl is for one process; there are 2"),
        (
            ["train", *DEMO, *SERVER, "--distributed.timeout_s", "1800"],
            "distributed.timeout_s=1800 must be more than rollout.retry_s + 2 * rollout.request_timeout_s = 1800",
        ),
        (["train", *DEMO, "--device", "cuda:0"], "device=cuda:0"),
        (["train", *DEMO, "--dry_run"], "--dry_run is for one process"),
        (["eval", *DEMO], "eval is for one process"),
    ],
)
def test_what_several_ranks_cannot_do_is_refused(
    launched: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Any, command: list[str], said: str
) -> None:
    launched.chdir(tmp_path)
    if command.count("--device") == 2:
        del command[command.index("--device") : command.index("--device") + 2]
    assert main(command) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("name", "version"), [("torch", "2.12.1+cpu"), ("safetensors", "0.7.0")])
def test_old_libraries_are_refused(launched: pytest.MonkeyPatch, name: str, version: str) -> None:
    has = metadata.version
    launched.setattr(metadata, "version", lambda of: version if of == name else has(of))
    refused = pytest.raises(ImportError, match=rf"need {name} >= \d+\.\d+; this is {re.escape(version)}")
    with refused, join_ranks(sharded=True, timeout_s=1.0, gpu=False):
        pass


def test_an_incomplete_environment_is_refused(launched: pytest.MonkeyPatch) -> None:
    launched.delenv("MASTER_PORT")
    with pytest.raises(ValueError, match="MASTER_PORT is not set"), join_ranks(sharded=True, timeout_s=1.0, gpu=False):
        pass


def test_one_process_is_alone_whatever_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "")
    assert launched_rank() == (0, 1)


def test_a_model_whose_calls_depend_on_its_texts_is_not_split() -> None:
    policy = Policy(tiny_llama())
    for plan in (replace(policy.plan, mode="single"), replace(policy.plan, apart=16)):
        policy.plan = plan
        with pytest.raises(UnsupportedModelError, match=r"equally many; distributed\.shard=ddp"):
            ShardedPolicy(policy)


def test_a_model_of_several_dtypes_is_not_split() -> None:
    policy = Policy(tiny_llama().to(torch.bfloat16))
    policy.base.norm.float()  # type: ignore[operator, union-attr]
    with pytest.raises(UnsupportedModelError, match=r"dtypes .*bfloat16.*float32.*distributed\.shard=ddp"):
        ShardedPolicy(policy)


ZERO_GRAD = """
import sys, tempfile, torch, torch.distributed as dist
from tiny_models import tiny_llama
from bandit_rft.distributed.process import ProcessRanks
from bandit_rft.model import Policy
dist.init_process_group("gloo", init_method="file://" + tempfile.mktemp(), rank=0, world_size=1)
ranks = ProcessRanks(sharded=True)
policy = ranks.shard(Policy(tiny_llama()))
optimizer = ranks.optimizer(policy, learning_rate=0.0)
norms = []
for way in ("", "parameters", "base", ""):
    if way == "parameters":
        for parameter in policy.parameters():
            parameter.grad = None
    elif way == "base":
        policy.base.zero_grad()
    with ranks.working(policy):
        policy.hidden_states(torch.arange(3, 20), [9, 8]).square().sum().backward()
    norms.append(float(optimizer.step()))
optimizer.close()
print(*norms)
"""


def test_shares_are_trained_after_zero_grad() -> None:
    """Autograd puts a new gradient into the share, where nobody would look for it."""
    command = [sys.executable, "-c", ZERO_GRAD]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(SUPPORT)})
    assert done.returncode == 0, done.stderr
    norms = [float(norm) for norm in done.stdout.split()]
    assert len(norms) == 4 and norms[0] > 0 and norms == pytest.approx([norms[0]] * 4)
