"""The simulation behind studies/simulations/coverage.md, in small: seeds of their own keep what is promised."""

from __future__ import annotations

import runpy
from typing import Any

import pytest
from paths import ROOT

pytest.importorskip("scipy")
SIMULATION: dict[str, Any] = runpy.run_path(str(ROOT / "studies" / "simulations" / "coverage.py"))


@pytest.mark.parametrize("truth", SIMULATION["TRUTHS"], ids=lambda truth: truth.name)
def test_coverage_and_family_wise_error(truth: Any) -> None:
    covered, error = SIMULATION["rates"](truth, "own seeds", 15, 5, 1000)
    assert 0.93 <= covered <= 0.975 and error <= 0.055


def test_shared_seeds_and_collapsing_runs_are_the_exception_that_is_named() -> None:
    collapsing = next(truth for truth in SIMULATION["TRUTHS"] if truth.collapsing == 0.2)
    assert SIMULATION["rates"](collapsing, "shared, crossed", 15, 3, 1000)[1] > 0.1
    assert "**0.222**" in (ROOT / "studies" / "simulations" / "coverage.md").read_text()
