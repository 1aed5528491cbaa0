"""The benchmark of a GRPOTrainer's step measures both sides, and writes a table and its numbers."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from paths import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import trl_step


def test_both_sides_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process: importing TRL three times costs more than all else."""
    pytest.importorskip("trl", "1.16", reason="pip install trl==1.16.0")

    def here(command: list[str], **unused: Any) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", command[1:])
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            trl_step.main()
        return SimpleNamespace(returncode=0, stdout=printed.getvalue(), stderr="")

    monkeypatch.setattr(trl_step.subprocess, "run", here)
    given = ["--shape", "4,8,32,512", "--zero", "0.5", "--device", "cpu", "--repetitions", "2"]
    monkeypatch.setattr(sys, "argv", ["trl_step.py", *given, "--output", str(tmp_path)])
    trl_step.main()
    results = json.loads((tmp_path / "trl_step.json").read_text())
    theirs, ours = results["runs"]
    assert (theirs["fused"], ours["fused"], ours["gradients_ready"]) == (False, True, 2)
    assert all(len(run["seconds"]) == 2 and min(run["seconds"]) > 0 for run in results["runs"])
    table = (tmp_path / "trl_step.md").read_text()
    assert "| 50% |" in table and table in capsys.readouterr().out
