"""What pip installs beside these files: the Triton kernels and the compiled core.

A source tree that is imported as it stands has its kernels one folder up, and no compiled core.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

_PACKAGE = Path(__file__).parents[1]


def load_kernels(module: str = "") -> ModuleType:
    """bandit_rft.kernels, or one of its modules; in a source tree from its folder kernels/.

    Raises:
        ImportError: there is neither.
    """
    try:
        import_module("bandit_rft.kernels")
    except ModuleNotFoundError as error:
        if error.name != "bandit_rft.kernels":
            raise
        _take_from_source_tree()
    return import_module(f"bandit_rft.kernels.{module}".removesuffix("."))


def _take_from_source_tree() -> None:
    folder = _PACKAGE.parent / "kernels"
    spec = spec_from_file_location(
        "bandit_rft.kernels", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    if not (folder / "__init__.py").is_file() or spec is None or spec.loader is None:
        raise ImportError(
            f"bandit_rft.kernels is missing: {_PACKAGE} was not installed by pip, and there is no source tree's "
            f"{folder}. `pip install .` in the source tree installs both",
            name="bandit_rft.kernels",
        )
    module = module_from_spec(spec)
    sys.modules["bandit_rft.kernels"] = module
    spec.loader.exec_module(module)


def load_core() -> tuple[ModuleType | None, str | None]:
    """bandit_rft._C, or None and why it is missing, with what would help."""
    try:
        return import_module("bandit_rft._C"), None
    except ImportError as error:
        reason = str(error)
    for entry in sys.path:
        installed = Path(entry or ".").absolute() / "bandit_rft"
        if installed != _PACKAGE and any(installed.glob("_C.*")):
            return None, (
                f"{reason}; the copy in {installed} has it, but {_PACKAGE} comes first on sys.path: run from another "
                "folder, or `pip install --no-build-isolation -e .` in the source tree"
            )
    return None, f"{reason}; `pip install .` in the source tree builds it"
