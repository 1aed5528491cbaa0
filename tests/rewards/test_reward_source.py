"""What a reward in a file is known by: what its function reaches in that file, and nothing else."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from bandit_rft.rewards import RewardFunction
from bandit_rft.rewards.source import source_digest

FILE = """
import re as patterns

WORDS = patterns.compile("a+")
try:
    from fast import split
except ImportError:
    def split(text):
        return text.split()

class Judge:
    def score(self, text):
        return len(split(text))

def paid(completion, judge=Judge()):
    return float(bool(WORDS.search(completion)) + judge.score(completion))

def another(completion):
    return 0.0

if __name__ == "__main__":
    print(paid("a"))
"""


@pytest.fixture
def digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    """The digest of `paid` in a file of this text."""
    monkeypatch.chdir(tmp_path)

    def of(text: str) -> str | None:
        Path("mine.py").write_text(text)
        return source_digest(RewardFunction.parse("sample:mine.py:paid"))

    return of


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("a+", "b+"), ("text.split()", "text.split('.')"), ("from fast", "from slow"), ("len(", "2 * len("),
        ("import re as", "import regex as"), ("float(", "0.5 * float("),
        ("\nclass", "\nimport random\nrandom.seed(1)\nclass"),
        ("\nclass", "\nWORDS = None\nclass"), ("def paid", "@print\ndef paid"),
    ],
)  # fmt: skip
def test_what_it_reaches_counts(digest, old: str, new: str) -> None:  # type: ignore[no-untyped-def]
    assert old in FILE and digest(FILE) != digest(FILE.replace(old, new)) is not None


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("\ndef paid", "\n# a remark\n\n\ndef paid"), ("return 0.0", "return 1.0"), ('print(paid("a"))', "print(1)"),
        ("import re as", '"""What it is."""\nimport re as'), ("class Judge:", 'class Judge:\n    """Judges."""'),
        ("\nclass", "\nUNUSED = 1\nclass"),
    ],
)  # fmt: skip
def test_the_rest_of_the_file_does_not(digest, old: str, new: str) -> None:  # type: ignore[no-untyped-def]
    assert old in FILE and digest(FILE) == digest(FILE.replace(old, new)) is not None


def test_modules_are_read_and_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "judges"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (package / "strict.py").write_text(FILE)
    monkeypatch.syspath_prepend(tmp_path)
    reward = RewardFunction("judges.strict:paid", "sample")
    before = source_digest(reward)
    (package / "strict.py").write_text(FILE.replace("a+", "b+"))
    assert None is not before != source_digest(reward) and "judges" not in sys.modules


def test_where_there_is_no_source_there_is_no_digest(tmp_path: Path) -> None:
    for target in ("math:sqrt", "nowhere.at_all:paid", f"{tmp_path / 'gone.py'}:paid", "bandit_rft.tasks.gsm8k:gsm8k"):
        assert source_digest(RewardFunction(target)) is None
    assert source_digest(RewardFunction("a:paid", function=len)) is None
    for text in ("def paid(:\n", "def paid(completion):\n    return " + "-" * 5000 + "1\n"):
        (tmp_path / "broken.py").write_text(text)
        assert source_digest(RewardFunction(f"{tmp_path / 'broken.py'}:paid")) is None


def test_what_a_decorator_keeps_counts(digest: Any) -> None:
    text = "KEPT = {}\ndef add(function):\n    KEPT[function.__name__] = function\n@add\ndef one(x):\n    return 1.0\n"
    text += "def paid(completion):\n    return KEPT['one'](completion)\n"
    assert digest(text) != digest(text.replace("return 1.0", "return 2.0"))
