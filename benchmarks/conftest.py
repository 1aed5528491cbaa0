"""Sides measured in turns in one run: pytest-benchmark times ours, and the set-up of each round times the others.

`--record FILE` keeps every sample, error and peak in one JSON with the machine's description; docs/performance.md is
made of it (`make performance`).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from comparison import record
from comparison.record import OURS

from bandit_rft.ops import backends

Work = Callable[[], Any]
THREADS = 2
RESULTS: list[tuple[str, str]] = []  # label, line


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--shape", type=_shape, default=None, metavar="N,H,V",
        help="tokens, hidden size and vocabulary of test_operations.py, in place of the three that have bars",
    )  # fmt: skip
    parser.addoption("--record", type=Path, default=None, metavar="FILE", help="add what is measured to this JSON")


def _shape(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"must be three positive numbers, as in 1024,896,32000; got {text!r}")
    return tuple(map(int, parts))


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--record", None)
    if path is not None:
        try:
            config.stash[RECORD] = record.Record(path, THREADS)
        except ValueError as error:
            raise pytest.UsageError(str(error)) from None


RECORD = pytest.StashKey[record.Record]()
SHAPES = [(1024, 896, 32000), (2048, 576, 49152), (1536, 640, 40000)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Whatever is measured through a backend is measured through every registered one as well."""
    if "backend" in metafunc.fixturenames:
        own = backends.registered(backends.Call("cpu", torch.float32))
        metafunc.parametrize("backend", [None, *own], ids=lambda name: name or "chosen")
    given = metafunc.config.getoption("--shape")
    if "shape" in metafunc.fixturenames:
        metafunc.parametrize("shape", [given or SHAPES[0]], ids=_named)
    if "each_shape" in metafunc.fixturenames:
        metafunc.parametrize("each_shape", [given] if given else SHAPES, ids=_named)


def _named(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


@pytest.fixture(autouse=True)
def _forced(request: pytest.FixtureRequest) -> Iterator[None]:
    name = request.getfixturevalue("backend") if "backend" in request.fixturenames else None
    with backends.use_backend(name) if name else nullcontext():
        yield


@pytest.fixture
def keep(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Add a case to the record, where one is asked for, and a line to the summary."""

    def add(name: str, case: dict[str, Any], line: str = "") -> None:
        kept = request.config.stash.get(RECORD, None)
        if kept is not None:
            kept.add(name, case)
        RESULTS.append((name, line))

    return add


@pytest.fixture
def side_by_side(benchmark: Any, keep: Callable[..., None]) -> Callable[..., dict[str, Any]]:
    def measure(
        name: str, works: dict[str, Work], *, group: str, roles: Callable[[str], str], rounds: int,
        bars: list[dict[str, Any]] | None = None, missing: dict[str, str] | None = None,
        errors: dict[str, float] | None = None, **more: Any,
    ) -> dict[str, Any]:  # fmt: skip
        """Time all works in turns, ours last. Bars are printed beside what they are for, never enforced."""
        samples: dict[str, list[float]] = {side: [] for side in works}

        def others() -> None:
            for side, work in works.items():
                if side != OURS:
                    start = time.perf_counter()
                    work()
                    samples[side].append(time.perf_counter() - start)

        works[OURS]()
        benchmark.pedantic(works[OURS], setup=others, rounds=rounds, warmup_rounds=0)
        samples[OURS] = list(benchmark.stats.stats.data)
        sides: dict[str, dict[str, Any]] = {
            side: {"role": roles(side), "seconds": seconds} for side, seconds in samples.items()
        }
        for side, error in (errors or {}).items():
            sides[side]["error"] = error
        case = {"group": group, "sides": sides, "missing": missing or {}, "bars": bars or [], **more}
        keep(name, dict(case), "".join(f"\n    {line}" for line in ratios(case)))
        return case

    return measure


def ratios(case: dict[str, Any]) -> list[str]:
    """Ours over every other side, for the terminal."""
    lines = []
    for side, found in case["sides"].items():
        if side != OURS:
            middle, low, high = record.ratio(case, OURS, side)
            seconds = record.spread(found["seconds"]).median
            lines.append(f"/ {side:<40} {middle:6.3f} ({low:.3f}-{high:.3f}), itself {seconds * 1e3:9.2f} ms")
    return lines + [f"/ {side:<40} missing: {why}" for side, why in case["missing"].items()]


@pytest.fixture
def versus(side_by_side: Callable[..., dict[str, Any]], request: pytest.FixtureRequest) -> Callable[..., float]:
    def measure(
        label: str, ours: Work, baseline: Work, bar: float | None, rounds: int = 7, role: str = "peer", **more: Any
    ) -> float:
        """The median ratio ours / baseline; the label names both, as in "ours / baseline"."""
        name, against = label.rsplit(" / ", 1)
        baseline()
        case = side_by_side(
            name, {against: baseline, OURS: ours}, rounds=rounds, roles=lambda side: "ours" if side == OURS else role,
            group=more.pop("group", request.module.__name__.removeprefix("test_")),
            bars=[{"over": OURS, "under": against, "at_most": bar}] if bar else [], **more,
        )  # fmt: skip
        return record.ratio(case, OURS, against).median

    return measure


@pytest.fixture(autouse=True)
def _two_threads() -> None:
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if RESULTS:
        terminalreporter.section("ours / theirs: median and quartiles of the ratio, turn by turn")
        for label, line in RESULTS:
            terminalreporter.line(f"{label}{line}")
