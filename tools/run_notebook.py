"""Execute examples/quickstart.ipynb and keep its outputs in it: `.venv/bin/python tools/run_notebook.py`."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).resolve().parents[1] / "examples" / "quickstart.ipynb"


def executed(path: Path, folder: str, kernel: str = "python3") -> Any:
    """The notebook with new outputs, run in a folder by a kernel of that name; an error of a cell is raised."""
    notebook = nbformat.read(path, as_version=4)
    # Nothing is needed from the hub; bars, and the wish for a better one, are no outputs worth keeping.
    os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1", PYTHONWARNINGS="ignore:IProgress")
    client = NotebookClient(notebook, timeout=240, kernel_name=kernel, resources={"metadata": {"path": folder}})
    return client.execute()


def main() -> None:
    """Execute the notebook in an empty folder and write it back."""
    with tempfile.TemporaryDirectory() as folder:
        notebook = executed(NOTEBOOK, folder)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # the times of this machine
    notebook.metadata = {
        "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
        "language_info": {"name": "python"},
    }
    nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    main()
