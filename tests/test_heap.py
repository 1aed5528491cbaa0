"""What is freed on the heap stays in the process, and the user's own variables go first: counted in page faults."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import save_tiny_llama

from bandit_rft.heap import VARIABLES
from bandit_rft.trainer import Trainer

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")

# Twenty times 40 MB in blocks, as a round has its activations: 10,000 pages.
PROGRAM = """
import ctypes, resource
{before}
library = ctypes.CDLL(None)
library.prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: pages of 4 KiB, so that they can be counted
library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
library.free.argtypes = [ctypes.c_void_p]
def once():
    blocks = [library.malloc(1_000_000) for _ in range(40)]
    for block in blocks:
        ctypes.memset(block, 1, 1_000_000)
    for block in blocks:
        library.free(block)
once()
start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    once()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start)
"""
KEEP = "from bandit_rft.heap import keep_freed_memory; assert keep_freed_memory() is {}"


def faults(before: str, **environment: str) -> int:
    """Pages that the system hands out to the program after its first time."""
    kept = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(before=before)], env={**kept, **environment}, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_freed_memory_is_kept() -> None:
    assert faults("pass") > 100_000  # or the program below shows nothing
    assert faults(KEEP.format(True)) < 1_000


def test_environment_goes_first() -> None:
    assert faults(KEEP.format(False), MALLOC_TRIM_THRESHOLD_="1000000") > 100_000


def test_a_trainer_on_a_cpu_asks_for_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[bool] = []
    monkeypatch.setattr("bandit_rft.trainer.keep_freed_memory", lambda: asked.append(True))
    model = save_tiny_llama(tmp_path / "model")
    Trainer(
        task="arithmetic", model_name_or_path=str(model), output_dir=str(tmp_path / "run"), device="cpu", max_rounds=1,
        batch_size=2, max_prompt_length=64, max_completion_length=4, evaluation={"max_queries": 2},
    ).run()  # fmt: skip
    assert asked == [True]
