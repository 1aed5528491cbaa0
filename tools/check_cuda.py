"""Compiles csrc/cuda for every architecture without a GPU: registers a thread and spilled bytes of every kernel.

    python tools/check_cuda.py          prints the Markdown table of docs/building.md

A compilation is remembered in build/check-cuda by what it depends on, so only a change costs its minute.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from build_wheels import ROOT, find_nvcc, run

ARCHITECTURES = (80, 90, 100)
SOURCES = ("policy_rows", "sample_rows")


class Kernel(NamedTuple):
    name: str  # as "differentiate<F32, Bf16>"
    architecture: int
    registers: int
    spilled: int  # bytes of stores and loads
    bytes: int  # of machine code of the whole file


def release(nvcc: Path) -> str:
    found = re.search(r"release ([\d.]+)", run(nvcc, "--version"))
    return found[1] if found else "?"


def _key(nvcc: Path, source: str, architecture: int) -> str:
    parts = [run(nvcc, "--version"), source, str(architecture), Path(__file__).read_text()]
    parts += [p.read_text() for p in sorted((ROOT / "csrc").glob("*.h")) + sorted((ROOT / "csrc/cuda").glob("*"))]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def _demangled(name: str) -> str:
    """differentiate<F32, Bf16> from the kernel's mangled name."""
    found = re.search(r"\d(score|differentiate|sample)I(.*?)EEv", name)
    if found is None:
        return name
    kinds = re.findall(r"3F32|4Bf16|3F16|S\d?_|Lb[01]", found[2].replace("NS0_", ""))  # S0_ is the namespace
    first = kinds[0][1:] if kinds else "?"
    words = {"Lb0": "whole", "Lb1": "filtered"}
    shown = [words.get(k, first if k.startswith("S") else k[1:]) for k in kinds]
    return f"{found[1]}<{', '.join(shown)}>"


def compiled(nvcc: Path, source: str, architecture: int) -> list[Kernel]:
    """What ptxas says of one file; exits with the compiler's words if it does not compile."""
    remembered = ROOT / "build" / "check-cuda" / f"{_key(nvcc, source, architecture)}.json"
    if remembered.exists():
        return [Kernel(*row) for row in json.loads(remembered.read_text())]
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "a.cubin")
        done = subprocess.run(
            [
                nvcc, "-O3", "-std=c++17", "-Xptxas", "-v", '-DBRFT_CUDA_NAMES=""', f"-arch=sm_{architecture}",
                "-cubin", "-o", cubin, ROOT / "csrc" / "cuda" / f"{source}.cu",
            ],
            capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            sys.exit(f"csrc/cuda/{source}.cu does not compile for sm_{architecture}:\n{done.stderr}")
        size = cubin.stat().st_size
    kernels = [
        Kernel(_demangled(name), architecture, int(registers), int(stores) + int(loads), size)
        for name, stores, loads, registers in re.findall(
            r"Function properties for (\S+)\n.*?(\d+) bytes spill stores, (\d+) bytes spill loads\n"
            r".*?Used (\d+) registers",
            done.stderr,
        )
    ]
    remembered.parent.mkdir(parents=True, exist_ok=True)
    remembered.write_text(json.dumps(kernels))
    return kernels


def every_kernel(nvcc: Path) -> list[Kernel]:
    jobs = [(source, architecture) for source in reversed(SOURCES) for architecture in ARCHITECTURES]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(lambda job: compiled(nvcc, *job), jobs))
    return [kernel for kernels in results for kernel in kernels]


def table(kernels: list[Kernel]) -> str:
    names = sorted({kernel.name for kernel in kernels})
    lines = ["| kernel | " + " | ".join(f"sm_{a}" for a in ARCHITECTURES) + " |", "|---|" + "---|" * len(ARCHITECTURES)]
    for name in names:
        cells = [f"{k.registers} / {k.spilled}" for a in ARCHITECTURES for k in kernels if (k.name, k[1]) == (name, a)]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(every_kernel(find_nvcc())))
