"""One side of one operation in a process of its own: its peak memory beyond inputs and gradients, in MiB.

python benchmarks/comparison/fresh.py loss "plain PyTorch" 1024,896,32000 --zero 0.7
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import re
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()


def resident_peak(reset: bool = False) -> float:
    """The process's high-water mark in MiB; `reset` lets it start again from what is used now."""
    if reset:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what the allocator holds back is not in use
        Path("/proc/self/clear_refs").write_text("5")
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def run(
    operation: str, side: str, shape: tuple[int, ...], zero: float, once: bool = False, threads: int = 2
) -> dict[str, Any]:
    """Measure here. `once`: the first call is what is measured (and timed), not the second."""
    if operation == "completions":
        return run_completions(side, shape)
    import torch

    sys.path.insert(0, str(HERE.parents[1]))
    from comparison import logit_rows, peers
    from comparison.batch import Batch

    torch.set_num_threads(threads)
    learned, small, make = operation in ("loss", "learned"), (64, 64, 512), partial(Batch, zero=zero)
    sides: dict[str, Any]
    if (of_rows := {**logit_rows.ROWS, **logit_rows.FILTERS}.get(operation)) is not None:
        learned, small, make, sides = of_rows.learned, (16, 2048), of_rows.logits, of_rows.works()
    else:
        sides = {
            "loss": peers.LOSS, "logprobs": peers.LOGPROBS, "learned": peers.LOGPROBS_LEARNED, "draws": peers.DRAWS
        }[operation]  # fmt: skip
    try:
        sides[side](make(*small))()  # threads, imports
        batch = make(*shape)
        before = resident_peak(reset=True)
        work = sides[side](batch)
        if not once:
            work()  # compiles, which takes more memory than anything
            batch.clear()
            before = resident_peak(reset=True)
        start = time.perf_counter()
        work()
        seconds = time.perf_counter() - start
    except peers.Missing as reason:
        return {"missing": str(reason)}
    except Exception as error:
        return {"missing": f"{type(error).__name__}: {error}"[:300]}
    gradients = batch.gradient_bytes() / 2**20 if learned and peers.role(side) != "limit" else 0.0
    peak = resident_peak()
    return {"peak_mib": max(0.0, peak - before - gradients), "process_mib": peak, "seconds": seconds}


def run_completions(side: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """Of drawing (sequences, tokens of a prompt, tokens of a completion) with the 1.1M model."""
    sys.path.insert(0, str(HERE.parents[1]))
    from comparison import completions

    with tempfile.TemporaryDirectory() as folder:
        draw = completions.sides(Path(folder), *shape)[side]
        completions.sides(Path(folder), 2, 4, 4)[side]()  # imports, threads
        before = resident_peak(reset=True)
        start = time.perf_counter()
        draw()
        seconds = time.perf_counter() - start
    peak = resident_peak()
    return {"peak_mib": max(0.0, peak - before), "process_mib": peak, "seconds": seconds}


def measure(
    operation: str, side: str, shape: tuple[int, ...], zero: float = 0.0, once: bool = False, threads: int = 2
) -> dict[str, Any]:
    """Measure in a fresh process: {"peak_mib", "process_mib", "seconds"} or {"missing"}."""
    command = [sys.executable, str(HERE), operation, side, ",".join(map(str, shape)), "--zero", str(zero)]
    command += ["--threads", str(threads)]
    done = subprocess.run(command + ["--once"] * once, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return {"missing": said[-1][:300]}
    found: dict[str, Any] = json.loads(done.stdout.rpartition("RESULT")[2])
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("operation", help="loss, logprobs, learned, draws, completions, or a case of logit_rows.py")
    parser.add_argument("side")
    parser.add_argument("shape", type=lambda text: tuple(map(int, text.split(","))))
    parser.add_argument("--zero", type=float, default=0.0)
    parser.add_argument("--once", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    print("RESULT" + json.dumps(run(**vars(given))))
