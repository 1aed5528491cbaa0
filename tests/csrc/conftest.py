"""The CUDA kernels and their bindings compiled for the CPU, once for all tests here."""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
from paths import ROOT


@pytest.fixture(scope="session")
def emulated_cuda(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tests/native/emulated_cuda.cpp as a shared library that is also the Python module `emulated_cuda`."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler: the CUDA kernels' source cannot be run on this CPU")
    pybind11 = pytest.importorskip("pybind11")
    library = tmp_path_factory.mktemp("emulated") / "emulated_cuda.so"
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-DBRFT_EMULATED_DEVICE"]
    flags += ['-DBRFT_CUDA_VERSION="none"', '-DBRFT_CUDA_NAMES="none"']
    flags += [f"-I{ROOT / 'tests/native'}", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    flags += ["-fsanitize=alignment", "-fsanitize-recover=alignment"]  # emulated_cuda.cpp has the handler
    source = ROOT / "tests/native/emulated_cuda.cpp"
    built = subprocess.run([compiler, *flags, "-o", library, source], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return library
