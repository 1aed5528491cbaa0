"""When one rank dies, hangs or fails, the others end and name it; and the run can go on as if it had not."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from rank_world import REMEMBERING, World

from bandit_rft.metrics import read_metrics
from bandit_rft.run_folder import RunFolder

KILLS = int(os.environ.get("BANDIT_RFT_RANK_KILLS", "1"))
ROUNDS = 8 + 4 * KILLS  # more than a run gets on between kills
#: So that a test does not wait as long as a run does (watch.py).
SOON = {"DEAD_AFTER_S": 10.0, "GRACE_S": 3.0}


@pytest.fixture
def values(models: dict[str, str], tmp_path: Path) -> dict[str, Any]:
    return {
        **REMEMBERING, "model_name_or_path": models["untied"], "output_dir": str(tmp_path / "run"), "save_steps": 1,
        "max_rounds": ROUNDS, "lr_scheduler_rounds": ROUNDS,
    }  # fmt: skip


def after_round(number: int, folder: str, then: Callable[[Sequence[int]], None]) -> Callable[[Sequence[int]], None]:
    """Do something to the ranks once a round's line is written."""

    def wait(ranks: Sequence[int]) -> None:
        start = time.monotonic()
        while len(read_metrics(Path(folder))) <= number and time.monotonic() - start < 60:
            time.sleep(0.005)
        then(ranks)

    return wait


@pytest.mark.slow
@pytest.mark.timeout(120 + 90 * KILLS)
def test_a_killed_rank_is_named_and_the_run_goes_on_as_if_it_had_lived(
    world: World, values: dict[str, Any], tmp_path: Path
) -> None:
    moments = random.Random(16)
    whole = world.trains(2, {**values, "output_dir": str(tmp_path / "whole")})
    seconds = sorted(line["seconds/round"] for line in read_metrics(whole))
    for kill in range(KILLS):
        victim, killed = kill % 2, [0.0]

        def strike(ranks: Sequence[int], victim: int = victim, killed: list[float] = killed) -> None:
            time.sleep(moments.uniform(0, 2 * seconds[len(seconds) // 2]))
            os.kill(ranks[victim], signal.SIGKILL)
            killed[0] = time.monotonic()

        done = len(read_metrics(Path(values["output_dir"])))
        statuses = world.run(2, values, after_round(done, values["output_dir"], strike), patch=SOON)
        assert time.monotonic() - killed[0] < 60
        assert statuses[victim] == -signal.SIGKILL and statuses[1 - victim] == 1
        said = world.said(1 - victim)
        assert f"rank {victim} (process " in said or (victim == 0 and "rank 0, which serves it" in said), said
        assert "can be continued from its last checkpoint" in said
    folder = world.trains(2, values)
    for name in ("model.safetensors", "optimizer.safetensors", "replay.safetensors"):
        one, other = (of / "checkpoints" / f"checkpoint-{ROUNDS}" / name for of in (folder, whole))
        assert one.read_bytes() == other.read_bytes(), name


@pytest.mark.slow
def test_a_stopped_rank_is_named(world: World, values: dict[str, Any]) -> None:
    """It holds its connections open, so that nothing but its silence tells of it."""
    stopped = list[int]()

    def stop(ranks: Sequence[int]) -> None:
        os.kill(ranks[1], signal.SIGSTOP)
        stopped.append(ranks[1])
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and "ends: rank 1" not in world.said(0):
            time.sleep(0.1)
        os.kill(ranks[1], signal.SIGKILL)

    statuses = world.run(2, {**values, "max_rounds": 500}, after_round(1, values["output_dir"], stop), patch=SOON)
    assert statuses == [1, -signal.SIGKILL]
    assert f"rank 0 ends: rank 1 (process {stopped[0]} on " in world.said(0), world.said(0)


def kill_once(world: World, what: str, rank: int = 0, *, victim: int = 1) -> Callable[[Sequence[int]], None]:
    """Kill a rank that halts once another has said `what`, or after a minute."""

    def wait(ranks: Sequence[int]) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and what not in world.said(rank):
            time.sleep(0.1)
        os.kill(ranks[victim], signal.SIGKILL)

    return wait


@pytest.mark.slow
def test_a_rank_stopped_as_soon_as_it_has_joined_is_named(world: World, values: dict[str, Any]) -> None:
    """Before the second in which it would have given its next sign of life."""
    statuses = world.run(2, values, kill_once(world, "rank 0 ends"), patch=SOON, halt=[1, "after"])
    assert statuses == [1, -signal.SIGKILL]
    assert "rank 0 ends: rank 1 (process " in world.said(0), world.said(0)


@pytest.mark.slow
def test_a_rank_stopped_before_it_has_joined_is_named(world: World, values: dict[str, Any]) -> None:
    values["distributed.timeout_s"] = 5.0
    statuses = world.run(2, values, kill_once(world, "Error"), patch=SOON, halt=[1, "before"])
    assert statuses == [1, -signal.SIGKILL]
    assert "RankError: rank 1 has not joined" in world.said(0), world.said(0)


@pytest.mark.slow
def test_a_stopped_rank_that_serves_the_store_is_named(world: World, values: dict[str, Any]) -> None:
    meanwhile = kill_once(world, "rank 1 ends", 1, victim=0)
    statuses = world.run(2, values, meanwhile, patch=SOON, halt=[0, "after"])
    assert statuses == [-signal.SIGKILL, 1]
    assert "rank 1 ends: the store at " in world.said(1) and "rank 0, which serves it" in world.said(1), world.said(1)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [False, True], ids=["stopped", "killed"])
def test_a_rank_that_joins_late_hears_that_the_server_is_gone(
    world: World, values: dict[str, Any], killed: bool
) -> None:
    """It has met rank 0, and has yet to connect for its signs of life."""
    start = time.monotonic()

    def kill(ranks: Sequence[int]) -> None:
        """Once the other has said that it is stopped, or as soon as it is."""
        if not killed:
            kill_once(world, "rank 1 ends", 1, victim=0)(ranks)
        else:
            while "T (stopped)" not in Path(f"/proc/{ranks[0]}/status").read_text() and time.monotonic() < start + 60:
                time.sleep(0.01)
            os.kill(ranks[0], signal.SIGKILL)

    statuses = world.run(2, values, kill, patch={**SOON, "DEAD_AFTER_S": 4.0}, halt=[0, "after"], late=1)
    assert statuses == [-signal.SIGKILL, 1]
    assert "rank 0, which serves it" in world.said(1), world.said(1)
    assert time.monotonic() - start < 60


@pytest.mark.slow
def test_the_rank_that_serves_the_store_waits_until_all_have_read_who_died(
    world: World, values: dict[str, Any]
) -> None:
    def kill(ranks: Sequence[int]) -> None:
        os.kill(ranks[2], signal.SIGKILL)

    statuses = world.run(3, values, after_round(0, values["output_dir"], kill), patch=SOON)
    assert statuses == [1, 1, -signal.SIGKILL]
    for rank in (0, 1):  # rank 1 missed it and wrote so down; the store must not end before it has read that
        assert "rank 2 (process " in world.said(rank), world.said(rank)
        assert "can be continued from its last checkpoint" in world.said(rank)


@pytest.mark.slow
def test_an_error_of_its_own_is_told_once_the_others_are_seen_to_live(world: World, values: dict[str, Any]) -> None:
    """A RuntimeError might be a broken connection; the other rank's next signs of life say that it is not."""
    assert world.run(2, values, patch={"DEAD_AFTER_S": 300.0}, fault=1) == [1, 1]
    assert "RuntimeError: of rank 1's own" in world.said(1)
    assert "rank 1 (process " in world.said(0) and "RuntimeError: of rank 1's own" in world.said(0), world.said(0)


def test_what_fails_on_one_rank_is_told_by_the_others(world: World, values: dict[str, Any]) -> None:
    assert world.run(2, values, patch=SOON, reward="raises") == [1, 1]
    assert "RewardError" in world.said(0)
    assert "rank 0 (process " in world.said(1) and "RewardError" in world.said(1)


def test_a_reward_that_timed_out_is_no_rank_that_did(world: World, values: dict[str, Any]) -> None:
    assert world.run(2, values, patch=SOON, reward="times_out") == [1, 1]
    assert "RewardError" in world.said(0) and "timeout_s for another rank" not in world.said(0) + world.said(1)


def test_a_folder_in_use_is_refused_to_all_ranks(world: World, values: dict[str, Any]) -> None:
    with RunFolder(values["output_dir"]).lock():
        assert world.run(2, values, patch=SOON) == [1, 1]
    assert "ConfigError" in world.said(0) and "in use" in world.said(0)
    assert "in use" in world.said(1)


def test_one_rank_that_is_asked_to_stop_stops_all_after_the_same_round(world: World, values: dict[str, Any]) -> None:
    folder = world.trains(2, values, stop=[1, 3])
    assert [line["round"] for line in read_metrics(folder)] == [0, 1, 2, 3]
    assert (folder / "checkpoints" / "checkpoint-3").is_dir()


def test_max_seconds_is_the_first_ranks_clock(world: World, values: dict[str, Any]) -> None:
    folder = world.trains(2, {**values, "max_seconds": 1e-3})
    assert [line["round"] for line in read_metrics(folder)] == [0, 1]


@pytest.mark.slow
def test_torchrun_starts_the_command(tmp_path: Path) -> None:
    """As the guide says it: one run folder, one report, one report of progress."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "bandit_rft",
        "train", "--preset", "demo", "--device", "cpu", "--max_rounds", "2", "--eval_steps", "0",
        "--evaluation.max_queries", "8", "--output_dir", str(tmp_path / "run"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line["round"] for line in read_metrics(tmp_path / "run")] == [0, 1, 2]
    assert (tmp_path / "run" / "report.html").is_file()
    assert done.stdout.count("Watch reward and Pass@1") == 1
