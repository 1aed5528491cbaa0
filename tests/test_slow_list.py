"""The list of slow tests names tests that exist, and leaves every part of the package some fast ones."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import slow_tests


def test_what_is_listed_exists() -> None:
    assert len(slow_tests.listed()) > 100
    assert [function for function in sorted(slow_tests.listed()) if not slow_tests.exists(function)] == []


@pytest.mark.parametrize(
    "part", ["benchmarks", "integrations", "kernels", "model", "ops", "ranks", "report", "rewards", "rollout", "study",
             "tasks", "training"],
)  # fmt: skip
def test_every_part_has_fast_tests(part: str) -> None:
    """Whoever changes one of them hears of a mistake within two minutes."""
    fast = 0
    for file in (ROOT / "tests" / part).glob("test_*.py"):
        text = file.read_text()
        if not re.search(r"^pytestmark = .*slow|^    pytest.mark.slow,", text, re.MULTILINE):
            path = file.relative_to(ROOT).as_posix()
            names = re.findall(r"^def (test_\w+)\(", text, re.MULTILINE)
            fast += sum(f"{path}::{name}" not in slow_tests.listed() for name in names)
    assert fast >= 2


@pytest.mark.parametrize(
    ("seconds", "slow"), [([0.2], False), ([0.4], True), ([0.04] * 100, False), ([0.06] * 4, False), ([0.06] * 6, True)]
)
def test_slow_is_long_together_and_on_average(seconds: list[float], slow: bool) -> None:
    assert slow_tests.is_slow(seconds) is slow


def test_what_did_not_run_stays_what_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = "tests/test_slow_list.py"
    monkeypatch.setattr(slow_tests, "LIST", tmp_path / "list")
    slow_tests.LIST.write_text(
        f"# ...\n{here}::test_what_is_listed_exists\n{here}::test_slow_is_long_together_and_on_average\n{here}::gone\n"
    )
    cases = {"test_every_part_has_fast_tests[ops]": "9", "test_slow_is_long_together_and_on_average[1]": "0.01"}
    lines = "".join(f'<testcase classname="tests.test_slow_list" name="{n}" time="{t}"/>' for n, t in cases.items())
    (tmp_path / "junit.xml").write_text(f"<testsuites><testsuite>{lines}</testsuite></testsuites>")
    slow_tests.main(tmp_path / "junit.xml")
    assert slow_tests.listed() == {f"{here}::test_every_part_has_fast_tests", f"{here}::test_what_is_listed_exists"}


def test_what_is_listed_is_left_out() -> None:
    """The list is read where pytest selects: of a file without marks, its listed functions are not run."""
    file = "tests/ops/test_installed.py"
    listed = {name for name in slow_tests.listed() if name.startswith(f"{file}::")}
    found = []
    for more in ([], ["-m", "not slow"]):
        command = [sys.executable, "-m", "pytest", "--collect-only", "-qo", "addopts=", *more, file]
        lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
        found.append({line.split("[")[0] for line in lines if "::" in line})
    every, fast = found
    assert listed and every - fast == listed
