"""The examples in docstrings do what they show."""

from __future__ import annotations

import doctest
from importlib import import_module

import pytest
from paths import ROOT

MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "bandit_rft").rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)


def test_the_first_page_of_the_reference_has_one() -> None:
    assert {"bandit_rft", "bandit_rft.advantages", "bandit_rft.tasks.arithmetic"} <= set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    failed, attempted = doctest.testmod(import_module(name))
    assert attempted > 0 and failed == 0, capsys.readouterr().out
