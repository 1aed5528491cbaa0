"""examples/quickstart.ipynb: it runs, its model learns, and the outputs that lie in the repository are whole."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
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


def test_it_runs_as_it_stands(tmp_path: Path) -> None:
    pytest.importorskip("nbclient", reason="needs the extra [dev]")
    pytest.importorskip("ipykernel", reason="needs the extra [dev]")
    spec = importlib.util.spec_from_file_location("run_notebook", ROOT / "tools" / "run_notebook.py")
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    done = tool.executed(NOTEBOOK, str(tmp_path))
    assert {"image/svg+xml", "text/html"} <= kinds(done)
    printed = "".join(output.get("text", "") for output in outputs(done))
    assert "round 60/60" in printed and "forks of this process" in printed and "\x1b" not in printed
    (table,) = (
        output["data"]["text/plain"] for output in outputs(done)
        if output.get("data", {}).get("text/plain", "").startswith("RunResult(60 rounds")
    )  # fmt: skip
    before, after = table.partition("test pass@1 ")[2].partition(";")[0].split(" -> ")
    assert 0.25 < float(before) < 0.5 and float(after) > 0.9
    assert (tmp_path / "runs" / "quickstart" / "report.html").is_file()
