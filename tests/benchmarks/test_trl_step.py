"""The benchmark of a GRPOTrainer's step runs, measures both sides and writes a table and its numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT


@pytest.mark.slow
def test_both_sides_are_measured(tmp_path: Path) -> None:
    pytest.importorskip("trl", "1.16", reason="pip install trl==1.16.0")
    script = str(ROOT / "benchmarks" / "trl_step.py")
    command = [
        sys.executable,
        script,
        "--shape",
        "4,8,32,512",
        "--zero",
        "0.5",
        "--device",
        "cpu",
        "--repetitions",
        "2",
    ]
    done = subprocess.run([*command, "--output", str(tmp_path)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "trl_step.json").read_text())
    theirs, ours = results["runs"]
    assert (theirs["fused"], ours["fused"], ours["gradients_ready"]) == (False, True, 2)
    assert all(len(run["seconds"]) == 2 and min(run["seconds"]) > 0 for run in results["runs"])
    assert (tmp_path / "trl_step.md").read_text() == done.stdout.removesuffix("\n")
    assert "| 50% |" in done.stdout
