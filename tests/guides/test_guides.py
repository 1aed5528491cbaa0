"""The guides do what they show: each page is one script, run from top to bottom in a process and a folder of its own.

The environment is a clean one: the wheel, and what the page tells its reader to install. An undeclared dependency or a
file that the wheel lacks ends the journey. All pages share that environment and stand in the order in which it grows,
so that each meets what its own commands and those of smaller ones brought. Where pip reaches no registry, the pages
run in the tests' own environment, and one test is skipped and says so.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from clean_environment import Environment, clean_environment, own_environment
from paths import ROOT, SUPPORT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # seconds: where nothing is in pip's cache, torch is fetched

#: The pages, and what must hold at the end, besides that nothing failed.
PAGES = {
    "from-verl.md": ["hidden.grad.abs().max() > 0 and loss.isfinite()"],
    "own-loop.md": ["sum(curve[-2:]) > sum(curve[:2]) + 0.2", "abs(float(stats['ratio_mean']) - 1) < 1e-3"],
    "own-data.md": [
        "result.metrics['eval/test/pass@1'].iloc[-1] > result.metrics['eval/test/pass@1'].iloc[0] + 0.1",
        "result.metrics.index[-1] == 20 and result.finished",
        "result.report.path.is_file() and Path('curve.svg').is_file()",
        "trainer.scorer.isolation == 'fork'",
    ],
    "from-trl.md": ["trainer.state.global_step == 2 and head.outcome.came_true == 2"],
}
#: What a page must have printed.
PRINTS = {"from-verl.md": "group_norm", "from-trl.md": "2 times the gradients were ready"}
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Environment]:
    folder = tmp_path_factory.mktemp("clean")
    yield clean_environment(folder) or own_environment()
    # Gigabytes in tens of thousands of files: beside the next tests, which need not wait for a slow disk.
    command = ["sh", "-c", 'rm -rf "$1" > /dev/null 2>&1 &', "sh", str(folder)]
    subprocess.run(command, check=True, start_new_session=True)


def replay(text: str, checks: list[str], environment: Environment, folder: Path) -> str:
    """Follow a page in an empty folder; what it printed."""
    script, page, empty = folder / "script" / "run_page.py", folder / "page.md", folder / "empty"
    script.parent.mkdir()
    empty.mkdir()
    script.write_bytes((SUPPORT / "run_page.py").read_bytes())
    page.write_text(text, encoding="utf-8")
    command = [str(environment.python), str(script), str(page), *checks]
    done = subprocess.run(command, cwd=empty, env=environment.variables, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    assert "Traceback" not in done.stderr
    return done.stdout


def test_the_environment_is_clean(environment: Environment, tmp_path: Path) -> None:
    """The package is the wheel's, what nobody installed is missing, and the source tree cannot be read."""
    if environment.wheel is None:
        pytest.skip("pip reaches no registry: the guides run in the environment of these tests, not in a clean one")
    page = "```sh\npip install .\n```\n\n```python\nimport sys, bandit_rft\nfrom importlib.util import find_spec\n```\n"
    checks = [
        "bandit_rft.__file__.startswith(sys.prefix) and bandit_rft.linear_logprobs",
        "not any(map(find_spec, ('pydantic', 'pytest', 'transformers', 'trl')))",
    ]
    replay(page, checks, environment, tmp_path)
    reads = [str(environment.python), "-c", f"open({str(ROOT / 'README.md')!r})"]
    done = subprocess.run(reads, env=environment.variables, cwd=tmp_path, capture_output=True, text=True)
    assert "PermissionError" in done.stderr and "source tree" in done.stderr


@pytest.mark.parametrize("page", [name for name in PAGES if name != "from-trl.md"])
def test_a_page_runs_from_top_to_bottom(page: str, environment: Environment, tmp_path: Path) -> None:
    text = (ROOT / "docs" / "guides" / page).read_text(encoding="utf-8")
    assert PRINTS.get(page, "") in replay(text, PAGES[page], environment, tmp_path)


def test_the_notebook_runs_as_it_stands(
    environment: Environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its kernel is of the environment, what drives it is of the tests' own, as with a Jupyter elsewhere."""
    pytest.importorskip("nbclient", reason="needs the extra [dev]")
    pytest.importorskip("ipykernel", reason="needs the extra [dev]")
    first, *_ = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    replay("".join(first["source"]) + "\n", [], environment, tmp_path)
    kernel = tmp_path / "jupyter" / "kernels" / "clean" / "kernel.json"
    kernel.parent.mkdir(parents=True)
    command = [str(environment.python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    kernel.write_text(json.dumps({"argv": command, "display_name": "clean", "language": "python"}))
    for name in ("PYTHONPATH", "BANDIT_RFT_BACKEND"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**environment.variables, "JUPYTER_PATH": str(tmp_path / "jupyter")}.items():
        monkeypatch.setenv(name, value)
    done = notebook_tool().executed(NOTEBOOK, str(tmp_path / "empty"), "clean")
    outputs = [output for cell in done["cells"] for output in cell.get("outputs", [])]
    assert {"image/svg+xml", "text/html"} <= {kind for output in outputs for kind in output.get("data", {})}
    printed = "".join(output.get("text", "") for output in outputs)
    assert "round 60/60" in printed and "forks of this process" in printed and "\x1b" not in printed
    texts = [output.get("data", {}).get("text/plain", "") for output in outputs]
    (table,) = (text for text in texts if text.startswith("RunResult(60 rounds"))
    before, after = table.partition("test pass@1 ")[2].partition(";")[0].split(" -> ")
    assert 0.25 < float(before) < 0.5 and float(after) > 0.9
    assert (tmp_path / "empty" / "runs" / "quickstart" / "report.html").is_file()


def test_a_study_of_ones_own(environment: Environment, tmp_path: Path) -> None:
    """Its file, cut to six runs of a round, and its four commands."""
    text = (ROOT / "docs" / "your-own-study.md").read_text(encoding="utf-8")
    assert re.findall(r"^bandit-rft study (\w+)", text, re.MULTILINE) == ["plan", "run", "status", "report"]
    for there, short in (
        ("```yaml\n", "```python\n# mine.yaml\n"), ("amount: 40", "amount: 1"), ("[0, 1, 2, 3, 4]", "[0, 1]"),
        ("max_queries: 200", "max_queries: 4, greedy: false"),
    ):  # fmt: skip
        assert there in text
        text = text.replace(there, short, 1)
    page = "__import__('pathlib').Path('runs/mine/report/report.html').read_text()"
    checks = [f"'two seeds or more' not in {page}", f"'learning rate' in {page}"]
    printed = replay(text, checks, environment, tmp_path)
    assert "two seeds: where runs differ" in printed and "6 cells: 6 finished" in printed


def notebook_tool() -> Any:
    spec = importlib.util.spec_from_file_location("run_notebook", ROOT / "tools" / "run_notebook.py")
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


def test_a_trainer_of_trl(environment: Environment, tmp_path: Path) -> None:
    """Last: what TRL brings would hide what the other pages miss."""
    if environment.wheel is None and find_spec("trl") is None:
        pytest.skip("needs trl")
    text = (ROOT / "docs" / "guides" / "from-trl.md").read_text(encoding="utf-8")
    assert PRINTS["from-trl.md"] in replay(text, PAGES["from-trl.md"], environment, tmp_path)


def test_every_guide_is_run_on_the_site_and_linked_from_the_first_page() -> None:
    assert {path.name for path in (ROOT / "docs" / "guides").glob("*.md")} == set(PAGES)
    for page in PAGES:
        assert f"guides/{page}" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
        first = (ROOT / "README.md").read_text(encoding="utf-8")
        assert re.search(rf"docs/guides/{page}|\[{page}\]", first) and page in first
