"""Several ranks train on a server's rollouts what one does; the first alone asks it; what fails there ends them all."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from fake_vllm import FakeVllm
from paths import SUPPORT
from rank_world import World, same_lines, same_weights

from bandit_rft.checkpoint import list_checkpoints, read_state
from bandit_rft.metrics import read_metrics

AHEAD = {"rollout.ahead": 1, "objective.kind": "importance_mask"}
SOON = {"DEAD_AFTER_S": 10.0, "GRACE_S": 3.0}


@pytest.fixture
def servers(models: dict[str, str]) -> Iterator[list[FakeVllm]]:
    servers = [FakeVllm(Path(models["tied"])) for _ in range(2)]
    yield servers
    for server in servers:
        server.stop()


@pytest.fixture
def values(models: dict[str, str], servers: list[FakeVllm]) -> dict[str, Any]:
    return {
        "model_name_or_path": models["tied"], "dtype": "float32", "max_rounds": 5, "rollout.engine": "vllm",
        "rollout.urls": [server.url for server in servers], "rollout.max_logprob_gap": 1e-3,
        "rollout.retry_s": 2.0, "rollout.request_timeout_s": 10.0,
    }  # fmt: skip


def trained(world: World, count: int, values: dict[str, Any], folder: Path, **order: Any) -> Path:
    return world.trains(count, {**values, "output_dir": str(folder)}, **order)


def in_round(number: int, folder: Path, then: Callable[[], None]) -> Callable[[Sequence[int]], None]:
    """Do something once the line of the round before is written."""

    def wait(ranks: Sequence[int]) -> None:
        deadline = time.monotonic() + 60
        while len(read_metrics(folder)) < number and time.monotonic() < deadline:
            time.sleep(0.005)
        then()

    return wait


def same_bits(folder: Path, whole: Path, number: int) -> None:
    for name in ("model.safetensors", "optimizer.safetensors"):
        one, other = (of / "checkpoints" / f"checkpoint-{number}" / name for of in (folder, whole))
        assert one.read_bytes() == other.read_bytes(), name


@pytest.mark.parametrize(
    ("count", "keys"),
    [
        (2, {"distributed.shard": "fsdp"}),
        (2, {"distributed.shard": "ddp", **AHEAD}),
        (2, {"distributed.shard": "fsdp", "lora.rank": 2, "eval_steps": 2, **AHEAD}),
    ],
    ids=["fsdp", "ddp, ahead", "fsdp, adapters, ahead"],
)
def test_several_ranks_train_on_a_servers_rollouts_what_one_does(
    world: World, values: dict[str, Any], servers: list[FakeVllm], tmp_path: Path, count: int, keys: dict[str, Any]
) -> None:
    values |= keys
    alone = {key: value for key, value in values.items() if not key.startswith("distributed.")}
    whole = trained(world, 1, alone, tmp_path / "whole")
    asked = [dict(server.calls) for server in servers]
    for server in servers:
        server.calls.clear()
    folder = trained(world, count, values, tmp_path / "run")
    same_weights(folder, whole, 5, atol=1e-4)  # of a step of 1e-2, in float32
    same_lines(folder, whole)
    assert [dict(server.calls) for server in servers] == asked, "one rank asks, and pushes"
    assert all(server.version.endswith("-5") and not server.paused for server in servers)
    lines = read_metrics(folder)
    assert all(0 <= line["canary/logprob_gap"] < 1e-4 for line in lines if "canary/logprob_gap" in line)
    if "rollout.ahead" in keys:
        assert [line["rollout/staleness/mean"] for line in lines[1:]] == [0, 1, 1, 1, 1]


def test_a_server_that_is_gone_ends_all_ranks_and_the_run_continues_with_the_same_bits(
    world: World, values: dict[str, Any], servers: list[FakeVllm], tmp_path: Path
) -> None:
    whole, folder = trained(world, 2, values, tmp_path / "whole"), tmp_path / "run"
    servers[0].delay = 0.1  # so that it is gone before the run has ended
    meanwhile = in_round(3, folder, servers[1].stop)
    patch = {**SOON, "GRACE_S": 0.5}  # for which the first rank may go on writing, once another has ended
    assert world.run(2, {**values, "output_dir": str(folder)}, meanwhile, patch=patch, saving=4.0) == [1, 1]
    for rank in (0, 1):
        assert "RolloutError: gave up after " in world.said(rank), world.said(rank)
        assert servers[1].url in world.said(rank) and "rollout.retry_s=2" in world.said(rank), world.said(rank)
    (checkpoint,) = list_checkpoints(folder / "checkpoints")
    assert 2 <= read_state(checkpoint)["round"] == read_metrics(folder)[-1]["round"] < 5
    servers[1].start()
    same_bits(trained(world, 2, values, folder), whole, 5)


def test_a_round_drawn_ahead_is_taken_up_again_by_all_ranks(
    world: World, values: dict[str, Any], tmp_path: Path
) -> None:
    values |= AHEAD
    whole = trained(world, 2, values, tmp_path / "whole")
    folder = trained(world, 2, values, tmp_path / "run", stop=[1, 3])
    assert [line["round"] for line in read_metrics(folder)] == [0, 1, 2, 3]
    same_bits(trained(world, 2, values, folder), whole, 5)


@pytest.mark.slow
def test_a_rank_that_fails_while_a_round_is_drawn_ahead_ends_all(
    world: World, values: dict[str, Any], servers: list[FakeVllm], tmp_path: Path
) -> None:
    values |= {**AHEAD, "output_dir": str(tmp_path), "rollout.request_timeout_s": 120.0}

    def asked() -> int:
        return sum(server.calls["/inference/v1/generate"] for server in servers)

    def hang() -> None:
        before = asked()
        while asked() < before + 6:  # the rollouts of round 1; those of round 2 come half a second later
            time.sleep(0.01)
        time.sleep(0.2)
        for server in servers:
            server.delay = 60.0

    for server in servers:
        server.delay = 0.5
    start = time.monotonic()
    assert world.run(2, values, in_round(1, tmp_path, hang), patch=SOON, fault=1, fault_in="verify") == [1, 1]
    assert time.monotonic() - start < 40, "nobody waited for the servers"
    assert "RuntimeError: of rank 1's own" in world.said(1) and "RuntimeError: of rank 1's own" in world.said(0)


@pytest.mark.slow
def test_rollouts_that_take_longer_than_ranks_wait_are_named(
    world: World, values: dict[str, Any], servers: list[FakeVllm], tmp_path: Path
) -> None:
    for server in servers:
        server.delay = 0.8
    values |= {
        "rollout.retry_s": 0.5, "rollout.request_timeout_s": 1.5, "rollout.max_requests": 1,
        "distributed.timeout_s": 4.0, "output_dir": str(tmp_path),
    }  # fmt: skip
    assert world.run(2, values, patch=SOON) == [1, 1]
    for rank in (0, 1):
        assert "waited for longer than distributed.timeout_s for another rank, which is alive" in world.said(rank)


def test_weights_that_did_not_arrive_end_all_ranks(
    world: World, values: dict[str, Any], servers: list[FakeVllm], tmp_path: Path
) -> None:
    values |= {**AHEAD, "max_rounds": 500, "output_dir": str(tmp_path)}
    meanwhile = in_round(2, tmp_path, lambda: setattr(servers[1], "wrong", True))
    assert world.run(2, values, meanwhile, patch=SOON) == [1, 1]
    for rank in (0, 1):
        assert "CanaryError: round " in world.said(rank) and "rollout server 2 drew" in world.said(rank)
    (checkpoint,) = list_checkpoints(tmp_path / "checkpoints")
    assert read_state(checkpoint)["round"] == read_metrics(tmp_path)[-1]["round"]


@pytest.mark.slow
def test_torchrun_starts_ranks_and_the_first_of_them_a_server(models: dict[str, str], tmp_path: Path) -> None:
    server = shlex.join([sys.executable, str(SUPPORT / "fake_vllm.py"), "--model", "{model}", "--port", "{port}"])
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "bandit_rft",
        "train", "--preset", "minimal", "--task", "arithmetic", "--model_name_or_path", models["tied"],
        "--output_dir", str(tmp_path / "run"), "--device", "cpu", "--max_rounds", "2", "--batch_size", "4",
        "--eval_steps", "0", "--evaluation.max_queries", "2", "--max_prompt_length", "40",
        "--max_completion_length", "4", "--rollout.engine", "vllm", "--rollout.server_command", server,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line["round"] for line in read_metrics(tmp_path / "run")] == [0, 1, 2]
    assert (tmp_path / "run" / "server.log").read_text().count("$ ") == 1
    folder = str(tmp_path / "run")
    assert not [p for p in psutil.process_iter(["cmdline"]) if any(folder in part for part in p.info["cmdline"] or [])]
