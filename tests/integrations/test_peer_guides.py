"""The guides from TRL and from verl: their tables are what the tools make. tests/guides runs their code."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from paths import ROOT

GUIDES = ROOT / "docs" / "guides"
BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(name: str, language: str) -> list[str]:
    return [text for of, text in BLOCK.findall((GUIDES / name).read_text(encoding="utf-8")) if of == language]


def needs(peer: str) -> None:
    if find_spec(peer) is None:
        pytest.skip(f"needs {peer}")


def test_verls_functions_are_installed(tmp_path: Path) -> None:
    needs("verl")
    (code,) = [text for text in blocks("from-verl.md", "python") if "install()  # needs verl" in text]
    # In a process of its own: it changes verl.
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]


def table(name: str) -> list[list[str]]:
    text = (GUIDES / name).read_text(encoding="utf-8")
    found = re.search(r"<!-- parity: [^\n]*-->\n(.*?)\n<!-- end of parity -->", text, re.DOTALL)
    assert found is not None, f"{name}: run tools/peer_tables.py"
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in found[1].splitlines()]


def test_the_table_of_parity_with_trl_is_whole() -> None:
    needs("trl")
    from trl_parity import LOSSES, parity_cases

    head, _, *rows = table("from-trl.md")
    assert head[1:] == [f"`{loss}`" for loss in LOSSES]
    assert [row[0] for row in rows] == list(parity_cases())
    assert all(float(cell.strip("*")) <= 1e-5 for row in rows for cell in row[1:])


def test_the_table_of_parity_with_verl_is_whole() -> None:
    from verl_parity import MODES

    from bandit_rft.integrations.verl import LOSSES

    head, _, *rows = table("from-verl.md")
    assert head[1:] == [f"`{mode}`" for mode in MODES]
    assert [row[0] for row in rows[::2]] == [f"`{kind}`" for kind in LOSSES]
    assert all(float(cell) <= 1e-5 for row in rows for cell in row[1:])
