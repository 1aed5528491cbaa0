"""The guides do what they show: each page is one script, run from top to bottom in a process and a folder of its own.

A block whose first line is a comment with a file's name is that file; the others run one after another, in one session.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

PAGES = ["own-data.md", "own-loop.md"]

RUNNER = r"""
import re, subprocess, sys
from pathlib import Path

text = Path(sys.argv[1]).read_text(encoding="utf-8")
session = {"__name__": "__main__"}
for block in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
    kind, code = block.groups()
    line = text.count("\n", 0, block.start()) + 1
    named = re.match(r"# ([\w.]+)\n", code)
    if kind == "sh":
        done = subprocess.run(code, shell=True, executable="/bin/bash")
        assert done.returncode == 0, f"the command of line {line} failed"
    elif named:
        Path(named[1]).write_text(code)
    elif kind == "python":
        exec(compile("\n" * line + code, sys.argv[1], "exec"), session)
for check in sys.argv[2:]:
    assert eval(check, session), check
"""
#: What must hold at a page's end, besides that nothing failed.
HOLDS = {
    "own-loop.md": ["sum(curve[-2:]) > sum(curve[:2]) + 0.2", "abs(float(stats['ratio_mean']) - 1) < 1e-3"],
    "own-data.md": [
        "result.metrics['eval/test/pass@1'].iloc[-1] > result.metrics['eval/test/pass@1'].iloc[0] + 0.1",
        "result.metrics.index[-1] == 20 and result.finished",
        "result.report.path.is_file() and Path('curve.svg').is_file()",
        "trainer.scorer.isolation == 'fork'",
    ],
}


@pytest.mark.parametrize("page", PAGES)
def test_a_page_runs_from_top_to_bottom(page: str, tmp_path: Path) -> None:
    script = tmp_path / "run_page.py"
    script.write_text(RUNNER)
    folder = tmp_path / "empty"
    folder.mkdir()
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    environment.pop("PYTHONPATH", None)  # as a user has it: the package is installed, the repository is not on the path
    environment |= {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(script), str(ROOT / "docs" / "guides" / page), *HOLDS[page]]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    assert "Traceback" not in done.stderr


def test_every_guide_is_on_the_site_and_linked_from_the_first_page() -> None:
    for page in PAGES:
        assert f"guides/{page}" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
        assert f"docs/guides/{page}" in (ROOT / "README.md").read_text(encoding="utf-8")
