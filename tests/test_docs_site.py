"""The documentation site is built without a warning, holds what it should, and fetches nothing when it is read."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from paths import ROOT

#: What a browser fetches by itself; a link that a reader follows is another matter.
FETCHED = re.compile(r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"(https?:)?//|<link\b[^>]*\bhref=\"(https?:)?//")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if any(find_spec(name) is None for name in ("mkdocs", "material", "mkdocstrings")):
        pytest.skip("needs the extra [docs]")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.slow
def test_pages_fetch_nothing_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        assert not FETCHED.search(page.read_text(encoding="utf-8")), page.relative_to(site)
    assert "fonts.googleapis" not in "".join(page.read_text(encoding="utf-8") for page in site.rglob("*.css"))


@pytest.mark.slow
def test_links_out_of_docs_and_references_hold(site: Path) -> None:
    start = (site / "index.html").read_text(encoding="utf-8")
    for target in ("operations.html", "examples/minimal_rl.py.html", "studies/results/index.html"):
        assert f'href="{target}"' in start and (site / target).is_file(), target
    assert (site / "studies" / "results" / "tiny" / "report.html").is_file()
    reference = (site / "reference" / "operations.html").read_text(encoding="utf-8")
    for name in ("linear_sample", "linear_logprobs", "linear_policy_loss", "PolicyObjective", "sample_from_logits"):
        assert re.search(rf'id="bandit_rft\.ops\.\w+\.{name}"', reference), name
