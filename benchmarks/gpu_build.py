"""Builds the module with CUDA for this GPU, with what is installed and no network: the first step of `make gpu-check`.

A program of its own, which imports nothing of bandit_rft: what measures is started afterwards and finds it installed.
Exit status 2, with the reason, where it cannot be built.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
REFUSED = 2


def find_nvcc() -> str | None:
    return os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def build() -> str | None:
    """Build the module with CUDA for this GPU's architecture alone; what went wrong, or None."""
    if not torch.cuda.is_available():
        return f"gpu-check needs a CUDA GPU; torch {torch.__version__} finds none here. Nothing was measured."
    environment = dict(os.environ)
    if environment.setdefault("BANDIT_RFT_CUDA", "ON") == "ON":
        nvcc = find_nvcc()
        if nvcc is None:
            return (
                "gpu-check needs nvcc to build the CUDA kernels, and finds none on PATH or in /usr/local/cuda/bin. "
                "Nothing was measured. BANDIT_RFT_CUDA=OFF measures Triton and PyTorch alone."
            )
        environment["CUDACXX"] = nvcc
    major, minor = torch.cuda.get_device_capability()
    command = [
        sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-build-isolation", "--no-deps",
        "-C", f"cmake.define.BANDIT_RFT_CUDA_ARCHITECTURES={major}{minor}", "--editable", str(ROOT),
    ]  # fmt: skip
    code = subprocess.run(command, env=environment).returncode
    return f"gpu-check could not build the module (pip: exit status {code}). Nothing was measured." if code else None


def main() -> int:
    problem = build()
    if problem is not None:
        print(problem, file=sys.stderr)
    return REFUSED if problem else 0


if __name__ == "__main__":
    sys.exit(main())
