"""A source tree that is imported as it stands finds its kernels, and says what else is missing."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from paths import ROOT

#: Without the finders of an editable install, which would answer for the package wherever it lies.
PLAIN = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if isinstance(f, type)]; "
DRAW = (
    "import torch; from bandit_rft import linear_sample; "
    "print(linear_sample(torch.eye(3), torch.eye(3) * 99, seed=0, sequence_ids=torch.arange(3), "
    "positions=torch.arange(3)).tokens.tolist()); "
)


def source_tree(folder: Path, *names: str) -> Path:
    for name in names:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "_C.*", "assets"))
    return folder


def run(program: str, folder: Path, *, path: str = "") -> subprocess.CompletedProcess[str]:
    program = PLAIN + f"sys.path.insert(1, {path!r}); " * bool(path) + program
    return subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, timeout=120)


def test_kernels_lie_beside_the_package(tmp_path: Path) -> None:
    done = run(
        DRAW + "from bandit_rft.kernels import enumerations; print(enumerations.__file__)",
        source_tree(tmp_path, "bandit_rft", "kernels"),
    )
    assert done.returncode == 0, done.stderr
    drawn, file = done.stdout.splitlines()
    assert drawn == "[0, 1, 2]"
    assert Path(file) == tmp_path / "kernels" / "enumerations.py"
    assert "the compiled module is missing" in done.stderr
    assert "`pip install " in done.stderr


def test_an_installed_copy_that_is_shadowed_is_named(tmp_path: Path) -> None:
    (tmp_path / "site" / "bandit_rft").mkdir(parents=True)
    (tmp_path / "site" / "bandit_rft" / "_C.abi3.so").touch()
    tree = source_tree(tmp_path / "clone", "bandit_rft", "kernels")
    done = run(DRAW, tree, path=str(tmp_path / "site"))
    assert done.stdout == "[0, 1, 2]\n"
    assert f"the copy in {tmp_path}/site/bandit_rft has it, but {tree}/bandit_rft comes first" in done.stderr


def test_no_kernels_anywhere(tmp_path: Path) -> None:
    done = run(DRAW, source_tree(tmp_path, "bandit_rft"))
    assert done.returncode == 1
    assert "ImportError: bandit_rft.kernels is missing" in done.stderr
    assert "`pip install .` in the source tree installs both" in done.stderr
