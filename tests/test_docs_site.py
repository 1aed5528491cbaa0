"""The documentation site is built without a warning, holds what it should, and fetches nothing when it is read."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT

#: What a browser fetches by itself; a link that a reader follows is another matter.
FETCHED = re.compile(r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"(https?:)?//|<link\b[^>]*\bhref=\"(https?:)?//")
#: Where a picture, a style or a script is, as a page says it.
SHOWN = re.compile(r"<(?:script|img|source)\b[^>]*\bsrc=\"([^\"]+)\"|<link\b[^>]*\bhref=\"([^\"]+)\"")


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


@pytest.mark.slow
def test_what_a_page_shows_is_on_the_site(site: Path) -> None:
    """mkdocs checks Markdown's links and pictures, not those of HTML tags: the first page's pictures."""
    pictures, missing = 0, []
    for page in site.rglob("*.html"):
        if "studies" in page.relative_to(site).parts:  # reports of studies are in one file each
            continue
        for match in SHOWN.finditer(page.read_text(encoding="utf-8")):
            target = (match[1] or match[2]).partition("#")[0].partition("?")[0]
            pictures += target.endswith(".svg")
            base = site if page.name == "404.html" else page.parent
            if not target.startswith("data:") and not (base / target.removeprefix("/")).is_file():
                missing.append(f"{page.relative_to(site)}: {target}")
    assert missing == [] and pictures >= 4


def test_links_of_html_tags_are_pointed_to_the_site_as_markdown_s_are() -> None:
    links = docs_site().in_site_links
    text = '<img src="docs/images/demo.svg" alt="a"> <a href="docs/gpu.md#x">b</a> [c](docs/gpu.md) <img src="https://d.e/f">'
    assert links(text, "README.md") == (
        '<img src="images/demo.svg" alt="a"> <a href="gpu.md#x">b</a> [c](gpu.md) <img src="https://d.e/f">'
    )
    assert links('```html\n<img src="docs/a.svg">\n```\n', "README.md") == '```html\n<img src="docs/a.svg">\n```\n'


def docs_site() -> Any:
    pytest.importorskip("mkdocs", reason="needs the extra [docs]")
    spec = importlib.util.spec_from_file_location("docs_site", ROOT / "tools" / "docs_site.py")
    assert spec is not None and spec.loader is not None
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    return hook
