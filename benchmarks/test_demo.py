"""The demo, as a user runs it: how right it gets, and how long the whole command takes."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bandit_rft.metrics import read_metrics

SPLITS = ("test", "train", "longer")


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_demo(seed: int, tmp_path: Path, benchmark: Any, keep: Callable[..., None]) -> None:
    command = [sys.executable, "-m", "bandit_rft", "train", "--preset", "demo", "--quiet", f"--seed={seed}"]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
    subprocess.run([*command, f"--output_dir={tmp_path}"], check=True, capture_output=True, env=environment)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    lines = read_metrics(tmp_path)
    evaluated = [line for line in lines if "eval/test/pass@1" in line]
    figures: dict[str, Any] = {
        "cpu seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "rounds": lines[-1]["round"],
        "pass@1": [[line["round"], line["eval/test/pass@1"]] for line in evaluated],
    }
    for name in evaluated[0]:
        if name.startswith("eval/") and name.endswith(("pass@1", "greedy")):
            figures[name.removeprefix("eval/")] = [evaluated[0][name], evaluated[-1][name]]
    sides = {"bandit_rft": {"role": "ours", "seconds": [seconds], "figures": figures}}
    keep(f"the demo, seed {seed}", {"group": "demo", "seed": seed, "sides": sides}, f"\n    {figures} {seconds:.0f} s")
    benchmark.pedantic(lambda: None)
