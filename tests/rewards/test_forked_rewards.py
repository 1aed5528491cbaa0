"""Rewards that cannot be imported run in a fork of this process, under the same limits as in a process of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import Any

import pytest
import torch
from paths import ROOT

from bandit_rft.rewards import RewardError, RewardFunction, RewardRunner


def run(function: Any, completions: list[str], **options: Any) -> list[float | None]:
    with RewardRunner([function], isolation="fork", **options) as runner:
        return runner.score(["q"] * len(completions), completions, {}).total


def test_a_closure_sees_what_it_closed_over() -> None:
    table = {"a": 1.0, "b": 0.25}

    def lookup(completion: str) -> float:
        return table[completion]

    assert run(lookup, ["a", "b", "a"]) == [1.0, 0.25, 1.0]
    assert run(lambda prompts, completions: [len(c) for c in completions], ["a", "bb"]) == [1, 2]
    mixed = RewardRunner([lookup, "exact_match"], isolation="fork", workers=2)
    with mixed as runner:
        assert runner.score(["q"] * 2, ["a", "b"], {"answer": ["a", "x"]}).total == [2.0, 0.25]


def test_it_runs_elsewhere_and_what_it_changes_stays_there() -> None:
    seen: list[int] = []

    def remember(completion: str) -> float:
        seen.append(os.getpid())
        return float(os.getpid())

    (pid,) = run(remember, ["a"])
    assert pid != os.getpid() and not seen


def test_a_hang_is_killed_and_the_next_completion_is_scored() -> None:
    def picky(completion: str) -> float:
        if completion == "hang":
            time.sleep(60)
        if completion == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        return 1.0

    start = time.monotonic()
    assert run(picky, ["a", "hang", "b", "die", "c"], timeout_s=0.5, on_error="none") == [1, None, 1, None, 1]
    assert time.monotonic() - start < 20
    with pytest.raises(RewardError, match=r"'picky' hung and was killed.*on completion 0"):
        run(picky, ["hang"], timeout_s=0.3)


def test_memory_is_limited_beyond_what_this_process_has() -> None:
    def greedy(completion: str) -> float:
        return float(len(bytearray(int(completion) * 2**20)))

    assert run(greedy, ["10", "900"], memory_mb=256, on_error="none") == [10 * 2**20, None]


def test_an_exception_names_the_function_and_the_line() -> None:
    def broken(completion: str) -> float:
        raise KeyError("what a model wrote \x1b[31m")

    with pytest.raises(RewardError, match=r"'broken' raised KeyError: 'what a model wrote .*test_forked_rewards.py"):
        run(broken, ["a"])


def test_what_is_printed_is_shown(capfd: pytest.CaptureFixture[str]) -> None:
    def talkative(completion: str) -> float:
        print("a bell \x07", flush=True)
        return 1.0

    assert run(talkative, ["a"]) == [1.0]
    assert r"a bell \x07" in capfd.readouterr().err


def test_torch_computes_in_a_fork() -> None:
    """On one thread: those of this process did not come along."""
    torch.set_num_threads(2)
    weight = torch.randn(600, 600)
    assert (weight @ weight).shape  # its threads run

    def norm(completion: str) -> float:
        return float((weight @ weight).norm())

    (found,) = run(norm, ["a"], timeout_s=60)
    assert found == pytest.approx(float((weight @ weight).norm()), rel=1e-4)


ORPHAN = """
import os, time
from bandit_rft.rewards import RewardRunner

def pid(completion):
    return float(os.getpid())

if __name__ == "__main__":
    runner = RewardRunner([lambda completion: float(os.getpid())], isolation="fork", workers=3)
    runner.__enter__()
    found = {int(x) for x in runner.score(["q"] * 600, ["c"] * 600, {}).total}
    print(*found, flush=True)
    time.sleep(60)
"""


def test_forks_end_with_a_process_that_is_killed() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", ORPHAN], stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    workers = [int(pid) for pid in process.stdout.readline().split()]
    assert workers
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while (alive := [pid for pid in workers if _runs(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive


def _runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as status:
            return status.read().rsplit(") ", 1)[1][0] != "Z"
    except OSError:
        return False


def test_the_session_keeps_what_main_defines() -> None:
    def reward(prompts: Any, completions: Any) -> list[float]:
        return [0.0] * len(completions)

    reward.__module__, reward.__qualname__ = "__main__", "reward"
    made = RewardFunction.of_session(reward)
    assert made.function is reward and made.kind == "batch" and made.name == "reward"
    assert RewardFunction.of_session("exact_match").function is None
    assert RewardFunction.of(len).kind == "batch"


def test_a_reward_may_have_rewards_of_its_own() -> None:
    def nested(completion: str) -> float:
        (inner,) = run(lambda completion: 0.5, [completion])
        assert inner is not None
        return 2 * inner

    assert run(nested, ["a"], timeout_s=60) == [1.0]
