"""An environment as a user of the wheel has it: nothing but what was installed there, and no way to the source tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from paths import ROOT

#: Run when a Python of the environment starts: a file that the wheel forgot must not be found in the source tree.
GUARD = """
import os, sys

def refuse(event, arguments, root={root!r}):
    if event == "open" and isinstance(arguments[0], (str, bytes)) and os.fsdecode(arguments[0]).startswith(root):
        raise PermissionError(f"{{os.fsdecode(arguments[0])}} is of the source tree, which a user does not have")

sys.addaudithook(refuse)
"""
#: Variables of the developer's shell that must not reach a user's.
DEVELOPERS = ("BANDIT_RFT", "COVERAGE", "HF_", "JUPYTER", "PYTEST", "PYTHON", "VIRTUAL_ENV")


@dataclass(frozen=True)
class Environment:
    """Where a journey is made.

    Attributes:
        python: its interpreter.
        variables: of the processes that run there.
        wheel: what `pip install .` of a clone would install; None: this is the developer's own environment.
    """

    python: Path
    variables: dict[str, str]
    wheel: Path | None


def clean_environment(folder: Path) -> Environment | None:
    """Build the wheel and an environment without it; None where pip reaches no registry.

    Versions are those of constraints.txt. Whoever runs there installs, so that what is missing from a page's commands
    is missing there.
    """
    copied = shutil.copy(ROOT / "constraints.txt", folder)
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    cache = subprocess.run([python, "-m", "pip", "cache", "dir"], check=True, capture_output=True, text=True).stdout
    variables = _variables(python) | {
        "HOME": str(folder / "home"), "PIP_CACHE_DIR": cache.strip(), "PIP_CONSTRAINT": copied, "PIP_QUIET": "2",
        "PIP_NO_COMPILE": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }  # fmt: skip
    (folder / "home").mkdir()
    probe = ["install", "--dry-run", "--ignore-installed", "--no-deps", "--retries", "0", "--timeout", "20", "six"]
    if subprocess.run([python, "-m", "pip", *probe], env=variables, capture_output=True).returncode:
        return None
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    if find_spec("scikit_build_core") is not None:  # as `make wheel` does; an object file is compiled once
        build.append("--no-build-isolation")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(build, check=True, env={**os.environ, "PATH": path})
    (wheel,) = folder.glob("bandit_rft-*.whl")
    (packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (packages / "source_guard.py").write_text(GUARD.format(root=f"{ROOT}{os.sep}"))
    (packages / "source_guard.pth").write_text("import source_guard\n")
    return Environment(python, {**variables, "JOURNEY_WHEEL": str(wheel)}, wheel)


def own_environment() -> Environment:
    """The one that the tests run in."""
    return Environment(Path(sys.executable), _variables(Path(sys.executable)), None)


def _variables(python: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(DEVELOPERS)}
    return kept | {"PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
