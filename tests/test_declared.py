"""What the package imports is declared: pyproject.toml names its distribution, or one that cannot do without it."""

from __future__ import annotations

import ast
import re
import sys
import tomllib

from paths import ROOT

#: Imported under another name than its distribution's.
DISTRIBUTIONS = {"yaml": "pyyaml"}
#: Comes with what is declared: that is built on it, and what it hands out is of it.
BROUGHT = {
    "annotated_types": "pydantic",
    "huggingface_hub": "transformers",
    "markupsafe": "jinja2",
    "pandas": "datasets",
}
#: Whoever calls for these has them: a run inside verl, a push to a server of vLLM's.
THEIRS = {"verl", "vllm"}


def test_every_import_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    users = [names for extra, names in extras.items() if extra not in ("bench", "dev", "docs")]
    declared = {
        re.split(r"[\[>=<]", name)[0].lower().replace("_", "-")
        for names in [project["dependencies"], *users]
        for name in names
    }
    declared.add("triton")  # torch brings it where a GPU is served; without it nothing asks for it
    imported = dict[str, str]()
    for folder in ("bandit_rft", "kernels"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    names = [node.module]
                else:
                    continue
                imported |= {name.partition(".")[0]: str(file.relative_to(ROOT)) for name in names}
    foreign = imported.keys() - sys.stdlib_module_names - {"bandit_rft"} - THEIRS
    assert len(foreign) > 15
    for name in sorted(foreign):
        distribution = BROUGHT.get(name) or DISTRIBUTIONS.get(name, name)
        assert distribution.replace("_", "-") in declared, f"{imported[name]} imports {name}, which no extra brings"
