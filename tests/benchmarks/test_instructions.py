"""Instructions a token of the compiled core stay within 2% of the committed counts."""

from __future__ import annotations

import json
import sys

import pytest
from paths import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import instructions

COUNTED = {"compiler": "a compiler", "kernels": {"one": {"tokens": 10, "instructions": 1000}}}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_core_executes_what_was_committed() -> None:
    if not instructions.COMMITTED.exists():
        pytest.skip("the results are not in a source distribution")
    committed = json.loads(instructions.COMMITTED.read_text())
    try:
        found = instructions.count()
    except instructions.CannotCount as reason:
        pytest.skip(f"instructions are not counted: {reason}")
    if found["compiler"] != committed["compiler"]:
        pytest.skip(f"counted for {committed['compiler']}; this core is of {found['compiler']}, which makes other code")
    lines = instructions.differences(committed, found)
    assert not lines, "\n".join([*lines, "on purpose? `python benchmarks/instructions.py --write`"])


@pytest.mark.parametrize(("now", "lines"), [(1019, 0), (981, 0), (1021, 1), (979, 1)])
def test_two_percent(now: int, lines: int) -> None:
    found = {"kernels": {"one": {"tokens": 10, "instructions": now}}}
    assert len(instructions.differences(COUNTED, found)) == lines


def test_a_kernel_that_is_gone_or_new_is_named() -> None:
    found = {"kernels": {"two": {"tokens": 1, "instructions": 1}}}
    assert instructions.differences(COUNTED, found) == ["one: not counted any more", "two: not committed"]


def test_own_instructions_are_those_of_the_library_alone() -> None:
    profile = """\
ob=(1) /lib/python
fn=(1) main
12 100
ob=(2) /x/_C.so
fn=(2)
5 20
+3 7
cob=(1)
cfn=(1)
calls=3 12
* 5000
ob=(1)
fn=(1)
cob=(2)
calls=1 5
12 27
ob=(2)
9 1
totals: 128
"""
    assert instructions.own_instructions(profile, "_C.so") == 28


def test_without_valgrind_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(instructions.CannotCount, match="valgrind is not installed"):
        instructions.count()
    assert instructions.main([]) == 2
    assert "valgrind is not installed" in capsys.readouterr().err
