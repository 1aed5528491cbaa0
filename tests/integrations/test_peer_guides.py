"""The guides from TRL and from verl: their code runs, and their tables are what the tools make."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT

GUIDES = ROOT / "docs" / "guides"
BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(name: str, language: str) -> list[str]:
    return [text for of, text in BLOCK.findall((GUIDES / name).read_text(encoding="utf-8")) if of == language]


def needs(peer: str) -> None:
    if find_spec(peer) is None:
        pytest.skip(f"needs {peer}")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_grpo_trainer_with_our_head(capsys: pytest.CaptureFixture[str]) -> None:
    needs("trl")
    (code,) = blocks("from-trl.md", "python")
    names: dict[str, Any] = {}
    exec(code, names)
    assert "2 times the gradients were ready" in capsys.readouterr().out
    assert names["trainer"].state.global_step == 2


def test_verls_functions_on_tensors(tmp_path: Path) -> None:
    on_tensors, installs = blocks("from-verl.md", "python")
    names: dict[str, Any] = {}
    exec(on_tensors, names)
    assert names["hidden"].grad.abs().max() > 0 and names["loss"].isfinite()
    assert "install()  # needs verl" in installs
    needs("verl")  # in a process of its own: it changes verl
    done = subprocess.run([sys.executable, "-c", installs], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("name", ["from-trl.md", "from-verl.md"])
def test_runs_said_in_our_keys(name: str, tmp_path: Path) -> None:
    commands = [text.replace("\\\n", " ") for text in blocks(name, "sh") if text.startswith("bandit-rft")]
    assert len(commands) == 1
    for command in commands:
        words = [sys.executable, "-m", "bandit_rft", *shlex.split(command)[1:]]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
        assert "group_norm" in done.stdout


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
