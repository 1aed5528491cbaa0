"""What mkdocs does not do by itself: pages from files of the repository that are not in docs/.

README.md is the site's first page. A file that a page links to outside docs/ comes along under its own path, so that
the links hold in the repository and on the site: text as a page, source code as a page that shows it, the rest as is.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).resolve().parents[1]
CODE = {".py": "python", ".yaml": "yaml", ".toml": "toml"}
PAGES = ("CONTRIBUTING.md", "CHANGELOG.md")  # besides what is linked to
# A Markdown link or picture, or what an HTML tag of a page shows or leads to.
LINK = re.compile(r"""(?:(?<=\]\()|(?<=\ssrc=")|(?<=\shref="))(?!\w+:|//|#)([^)\s#"]+)""")
FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the first page and, from page to page, whatever is linked to outside docs/."""
    waiting = ["README.md", *PAGES, *(f"docs/{file.src_uri}" for file in files.documentation_pages())]
    seen: set[str] = set()
    while waiting:
        path = waiting.pop()
        if path in seen or not (ROOT / path).is_file():
            continue  # a link to nothing is reported by mkdocs itself
        seen.add(path)
        suffix = Path(path).suffix
        text = (ROOT / path).read_text(encoding="utf-8") if suffix == ".md" or suffix in CODE else ""
        if suffix == ".md":
            for target in LINK.findall(FENCE.sub("", text)):
                waiting.append(posixpath.normpath(posixpath.join(posixpath.dirname(path), target)))
        if path.startswith("docs/") and suffix == ".md":
            continue
        if suffix == ".md":
            file = File.generated(config, site_path(path), content=in_site_links(text, path))
        elif suffix in CODE:
            content = f"# {path}\n\n```{CODE[suffix]}\n{text}```\n"
            file = File.generated(config, site_path(path), content=content)
        else:
            file = File.generated(config, site_path(path), abs_src_path=str(ROOT / path))
        if file.src_uri not in {uri for group in config.nav or [] for uri in in_nav(group)}:
            file.inclusion = InclusionLevel.NOT_IN_NAV
        files.append(file)
    return files


def on_page_markdown(markdown: str, page: object, config: MkDocsConfig, files: Files) -> str:
    """Point the links of a page in docs/ to where their targets are on the site."""
    file: File = page.file  # type: ignore[attr-defined]
    return markdown if file.generated_by else in_site_links(markdown, f"docs/{file.src_uri}")


def site_path(path: str) -> str:
    """Where a file of the repository is on the site: docs/ is its root."""
    if path == "README.md":
        return "index.md"
    path = path.removeprefix("docs/")
    return f"{path}.md" if Path(path).suffix in CODE else path


def in_site_links(markdown: str, path: str) -> str:
    """Rewrite the relative links of the file at `path`, fenced code left alone."""
    here = posixpath.dirname(site_path(path))

    def link(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), match[1]))
        return posixpath.relpath(site_path(target), here or ".")

    parts = FENCE.split(markdown)
    return "".join(part if part.startswith("```") else LINK.sub(link, part) for part in parts)


def in_nav(entry: object) -> list[str]:
    """List the pages of a part of the navigation."""
    if isinstance(entry, str):
        return [entry]
    values = entry.values() if isinstance(entry, dict) else entry
    return [uri for value in values for uri in in_nav(value)]  # type: ignore[attr-defined]
