"""Seconds a round of the demo under each `thread_wait`, alone and beside busy processes; runs alternate.

python benchmarks/thread_wait.py --busy 2 --repeat 3
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

POLICIES = ("active", "bounded", "passive", "libgomp")  # the last: what the runtime does when it is told nothing
BUSY = "while True: pass"


def seconds_a_round(policy: str, rounds: int) -> float:
    """The median of a demo run, without its first rounds."""
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    choice = ["--thread_wait", policy]
    if policy == "libgomp":
        environment["GOMP_SPINCOUNT"], choice = "300000", []  # its documented default
    with tempfile.TemporaryDirectory() as folder:
        keys = [f"--max_rounds={rounds}", "--eval_steps=0", "--evaluation.max_queries=5", f"--output_dir={folder}"]
        subprocess.run(
            [sys.executable, "-m", "bandit_rft", "train", "--preset", "demo", "--quiet", *keys, *choice],
            env=environment, check=True, capture_output=True,
        )  # fmt: skip
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(line["seconds/round"] for line in lines[6:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--busy", type=int, default=2, help="processes that do nothing but compute [2]")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each [3]")
    parser.add_argument("--rounds", type=int, default=40)
    given = parser.parse_args()
    print(f"{os.cpu_count()} cores; medians of {given.repeat} runs (lowest to highest), seconds a round")
    for busy in (0, given.busy):
        found: dict[str, list[float]] = {policy: [] for policy in POLICIES}
        with ExitStack() as stack:
            for _ in range(busy):
                process = subprocess.Popen([sys.executable, "-c", BUSY])
                stack.callback(process.kill)
            for _ in range(given.repeat):
                for policy in POLICIES:
                    found[policy].append(seconds_a_round(policy, given.rounds))
        for policy, values in found.items():
            print(
                f"beside {busy} busy: {policy:<8} {statistics.median(values):.3f} ({min(values):.3f}-{max(values):.3f})"
            )


if __name__ == "__main__":
    main()
