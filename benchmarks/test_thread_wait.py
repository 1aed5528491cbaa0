"""Seconds a round of the demo under each `thread_wait`, alone and beside processes that compute; runs alternate."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

ROUNDS, SKIPPED = 40, 6  # the first rounds of a run are not counted
RUNS = 3  # fewer than four: their spread is the lowest and the highest
#: what the page calls it -> (arguments, environment)
POLICIES: dict[str, tuple[list[str], dict[str, str]]] = {
    "active": (["--thread_wait", "active"], {}),
    "bounded (default)": (["--thread_wait", "bounded"], {}),
    "passive": (["--thread_wait", "passive"], {}),
    "what libgomp does unasked": ([], {"GOMP_SPINCOUNT": "300000"}),  # its documented default
}
BUSY = "while True: pass"


def seconds_a_round(policy: str, folder: Path) -> float:
    """The median of a run."""
    arguments, more = POLICIES[policy]
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")} | more
    keys = [f"--max_rounds={ROUNDS}", "--eval_steps=0", "--evaluation.max_queries=5", f"--output_dir={folder}"]
    subprocess.run(
        [sys.executable, "-m", "bandit_rft", "train", "--preset", "demo", "--quiet", *keys, *arguments],
        env=environment, check=True, capture_output=True,
    )  # fmt: skip
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(line["seconds/round"] for line in lines[SKIPPED:])


@pytest.mark.parametrize("busy", [0, 2], ids=["alone", "beside two"])
@pytest.mark.timeout(1800)
def test_thread_wait(busy: int, tmp_path: Path, benchmark: Any, keep: Callable[..., None]) -> None:
    seconds: dict[str, list[float]] = {policy: [] for policy in POLICIES}
    with ExitStack() as stack:
        for _ in range(busy):
            stack.callback(subprocess.Popen([sys.executable, "-c", BUSY]).kill)
        for run in range(RUNS):
            for number, policy in enumerate(POLICIES):
                seconds[policy].append(seconds_a_round(policy, tmp_path / f"{run}-{number}"))
    benchmark.pedantic(lambda: None)
    sides = {policy: {"role": "reference", "seconds": found} for policy, found in seconds.items()}
    lines = "".join(f"\n    {policy:<28} {statistics.median(found):.3f} s" for policy, found in seconds.items())
    name = f"demo, beside {busy} busy processes" if busy else "demo, alone"
    keep(name, {"group": "thread wait", "sides": sides}, lines)
