"""The machine that a run was measured on: what decides its speed, and nothing that names it."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "transformers", "trl", "liger-kernel", "cut-cross-entropy", "llama-cpp-python", "triton", "numpy")
#: What must agree for the times of two runs to be of one machine.
SAME = ("cpu", "cores", "threads")


def describe(threads: int) -> dict[str, Any]:
    """CPU, cores, memory, threads, versions and the core's instruction set."""
    from bandit_rft.ops import backends

    return {
        "cpu": cpu_name(), "cores": os.cpu_count(), "threads": threads, "memory_gib": memory_gib(),
        "last_level_cache_mib": last_level_cache_mib(), "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(), "versions": versions(), "compiler": core_compiler(),
        "instruction_set": backends.native.instruction_set() if backends.native else None,
    }  # fmt: skip


def cpu_name() -> str:
    """Model name, family and model, as the kernel tells them: clouds hide the name's number."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    found = {key: re.search(rf"^{key}\s*:\s*(.+)$", text, re.M) for key in ("model name", "cpu family", "model")}
    name, family, model = (match[1].strip() if match else "" for match in found.values())
    return f"{name} (family {family}, model {model})" if name else platform.processor() or platform.machine()


def memory_gib() -> float | None:
    """Memory of the machine."""
    found = re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text()) if os.path.exists("/proc/meminfo") else 0
    return round(int(found[1]) / 2**20, 1) if found else None


def last_level_cache_mib() -> float | None:
    """The largest cache of the first core."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) / 1024 for size in sizes if size.endswith("K")), default=None)


def versions() -> dict[str, str]:
    """Of the packages that take part, where they are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def core_compiler() -> str | None:
    """What compiled the core, from its own ELF file; None where that is not told (or there is no core)."""
    from bandit_rft.ops import backends

    return compiler_of(Path(backends.native.__file__)) if backends.native else None


def compiler_of(library: Path) -> str | None:
    """The first compiler's text in a shared library's .comment section, as in "GCC: (Debian 12.2.0-14) 12.2.0"."""
    found = re.search(rb"(GCC: \([^)\0]*\) [\d.]+|clang version [\d.]+)", library.read_bytes())
    return found[1].decode() if found else None


def measured() -> dict[str, Any]:
    """When, of which commit, and how busy the machine was (the load average of a minute, which counts us as well).

    The commit ends in "+" where what is measured has changes that are not committed. BANDIT_RFT_COMMIT names it where
    there is a copy without its history.
    """
    command = ["git", "-C", str(ROOT), "status", "--porcelain", "--", "bandit_rft", "kernels", "csrc", "CMakeLists.txt"]
    try:
        commit = subprocess.run(
            ["git", "-C", str(ROOT), "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit, changed = os.environ.get("BANDIT_RFT_COMMIT", "unknown"), ""
    load = round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None
    return {"date": datetime.date.today().isoformat(), "commit": commit + ("+" if changed else ""), "load": load}
