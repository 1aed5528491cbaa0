"""Every Triton kernel in Triton's interpreter, on a CPU: triton_operations.py in a process of its own.

The interpreter is switched on before anything imports Triton, and would change torch.compile in this process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from packaging.version import Version
from paths import ROOT, SUPPORT

pytestmark = pytest.mark.slow  # minutes of interpreted kernels

OUTDATED = (
    find_spec("triton") is not None
    and Version(version("triton")) < Version("3.7")
    and Version(np.__version__) >= Version("2.4")
)


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
@pytest.mark.skipif(OUTDATED, reason="the interpreter of Triton < 3.7 needs numpy < 2.4")
@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs these tests on the GPU")
def test_operations_in_the_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", str(SUPPORT / "triton_operations.py")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-2000:]
