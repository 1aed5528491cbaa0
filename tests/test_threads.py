"""How OpenMP threads wait is what libgomp itself says it is, and the user's own variables go first."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bandit_rft.threads import SPINS, VARIABLES, choose_wait


def libgomp_says(command: list[str], **environment: str) -> dict[str, str]:
    """What the OpenMP runtime of a process prints of its settings as it is loaded."""
    kept = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    done = subprocess.run(
        [sys.executable, *command], env={**kept, **environment, "OMP_DISPLAY_ENV": "VERBOSE"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    found = dict(re.findall(r"(OMP_WAIT_POLICY|GOMP_SPINCOUNT) = '(\w+)'", done.stderr))
    if not found:
        pytest.skip("this torch brings another OpenMP runtime than libgomp")
    return found


@pytest.mark.parametrize("policy", ["bounded", "active", "passive"])
def test_policy_reaches_the_runtime(policy: str) -> None:
    program = f"from bandit_rft.threads import choose_wait; assert choose_wait({policy!r}); import torch"
    said = libgomp_says(["-c", program])
    if policy == "bounded":
        assert said["GOMP_SPINCOUNT"] == str(SPINS)
    else:
        assert said["OMP_WAIT_POLICY"] == policy.upper()


def test_environment_goes_first() -> None:
    program = "from bandit_rft.threads import choose_wait; assert not choose_wait('bounded'); import torch"
    assert libgomp_says(["-c", program], GOMP_SPINCOUNT="77")["GOMP_SPINCOUNT"] == "77"
    assert libgomp_says(["-c", program], OMP_WAIT_POLICY="ACTIVE")["OMP_WAIT_POLICY"] == "ACTIVE"


def test_too_late_once_torch_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert "torch" in sys.modules
    assert not choose_wait("passive")
    assert not any(name in os.environ for name in VARIABLES)


@pytest.mark.parametrize(("given", "expected"), [((), str(SPINS)), (("--thread_wait", "passive"), None)])
def test_training_bounds_it(given: tuple[str, ...], expected: str | None, tmp_path: Path) -> None:
    keys = [f"--{key}={value}" for key, value in (("max_rounds", 0), ("evaluation.max_queries", 1))]
    command = ["-m", "bandit_rft", "train", "--preset", "demo", *keys, "--output_dir", str(tmp_path)]
    said = libgomp_says([*command, *given])
    if expected is None:
        assert said["OMP_WAIT_POLICY"] == "PASSIVE"
    else:
        assert said["GOMP_SPINCOUNT"] == expected
