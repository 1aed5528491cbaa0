"""`make gpu-check` where it can be tested without a GPU: it refuses politely, and its code runs from end to end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from paths import ROOT

SCRIPT = ROOT / "benchmarks" / "gpu_check.py"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_refuses(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "needs a CUDA GPU" in done.stderr and "Nothing was measured" in done.stderr
    made = subprocess.run(["make", "gpu-check", f"PYTHON={sys.executable}"], cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 2
    assert "needs a CUDA GPU" in made.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_small_run_on_a_cpu_writes_the_whole_table(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--small", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = tmp_path.glob("*.json")
    data = json.loads(path.read_text())
    cases = {result["case"].partition(" (")[0] for result in data["results"]}
    assert cases == {
        "policy", "logprob", "sample", "linear_sample", "linear_policy_loss, fwd + bwd",
        "the same, 70% of rows at 0", "linear_logprobs, forward",
    }  # fmt: skip
    assert all(result["ours_ms"] > 0 and result["other_ms"] > 0 for result in data["results"])
    assert all(error["met"] for error in data["errors"]) and len(data["errors"]) == 4
    assert "CPU" in data["device"] and data["limits"]["copy GB/s"] > 0
    assert "| linear_sample |" in path.with_suffix(".md").read_text()
