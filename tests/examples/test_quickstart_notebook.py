"""examples/quickstart.ipynb: the outputs that lie in the repository are whole. tests/guides runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from paths import ROOT

NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook["cells"] for output in cell.get("outputs", [])]


def kinds(notebook: Any) -> set[str]:
    return {kind for output in outputs(notebook) for kind in output.get("data", {})}


def test_what_lies_in_the_repository_was_executed() -> None:
    text = NOTEBOOK.read_text(encoding="utf-8")
    notebook = json.loads(text)
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert {"image/svg+xml", "text/html"} <= kinds(notebook)  # pictures and tables
    assert all(output["output_type"] != "error" for output in outputs(notebook))
    assert len(text) < 200_000 and str(Path.home()) + "/" not in text and "site-packages" not in text
