"""Shared fixtures. Real data are found through BANDIT_RFT_DATA (default: ../shared/data beside the repository)."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import browser  # noqa: F401  (a fixture)

from bandit_rft.ops import backends  # first: in a source tree that is not installed, it finds bandit_rft.kernels

ROOT = Path(__file__).resolve().parents[1]


#: Functions that `make test-fast` leaves out besides those that are marked in their files; by tools/slow_tests.py.
SLOW = frozenset((ROOT / "tests" / "slow_tests.txt").read_text().splitlines())


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is on the list of slow tests, all cases of a function alike."""
    for item in items:
        if item.path.is_relative_to(ROOT):
            name = getattr(item, "originalname", None) or item.name
            if f"{item.path.relative_to(ROOT).as_posix()}::{name}" in SLOW:
                item.add_marker(pytest.mark.slow)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """After the fast tests, the files that took longest: where to look when they are no longer fast."""
    if config.getoption("markexpr") != "not slow":
        return
    seconds = Counter[str]()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds[report.nodeid.partition("::")[0]] += report.duration  # type: ignore[assignment]
    slowest = ", ".join(f"{file} {s:.1f}" for file, s in seconds.most_common(5))
    terminalreporter.write_line(f"seconds: {slowest}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    """A backend that somebody registered need not serve every dtype that the tests ask it for."""
    try:
        return (yield)
    except ValueError as error:
        own = [entry.backend.name for entry in backends.BACKENDS if entry.backend.name not in backends.BUILT_IN]
        if any(f"BANDIT_RFT_BACKEND={name} cannot serve this call" in str(error) for name in own):
            pytest.skip(str(error))
        raise


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def each_instruction_set(request: pytest.FixtureRequest) -> Iterator[None]:
    """The compiled core's kernels of every instruction set that this processor has, one after another."""
    core = pytest.importorskip("bandit_rft._C", reason="needs the compiled core")
    before = core.instruction_set()
    try:
        core.use_instruction_set(request.param)
    except ValueError as reason:
        pytest.skip(str(reason))
    yield
    core.use_instruction_set(before)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data sets and models, or a visible skip."""
    folder = Path(os.environ.get("BANDIT_RFT_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set BANDIT_RFT_DATA")
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of a few thousand random weights, as a Hugging Face folder that tests read and never write."""
    from tiny_models import save_tiny_llama  # imports transformers, which `make gpu-check` does without

    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
