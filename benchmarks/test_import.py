"""What `import bandit_rft.ops` takes beyond `import torch`, in fresh processes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

CODE = """
import time
start = time.perf_counter(); import torch
middle = time.perf_counter(); import bandit_rft.ops
print(middle - start, time.perf_counter() - middle)
"""


def test_import(benchmark: Any, keep: Callable[..., None]) -> None:
    torch_alone, beyond = [], []
    for _ in range(5):
        done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
        first, second = map(float, done.stdout.split())
        torch_alone.append(first)
        beyond.append(second)
    sides = {
        "bandit_rft": {"role": "ours", "seconds": beyond},
        "import torch": {"role": "reference", "seconds": torch_alone},
    }
    keep("import bandit_rft.ops, beyond torch", {"group": "import", "sides": sides}, f"\n    {sorted(beyond)} s")
    benchmark.pedantic(lambda: None)
