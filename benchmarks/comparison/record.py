"""The JSON of a run: for each case its sides' samples, their errors and peaks, and what was missing.

    {"schema": 1, "machine": {...}, "cases": {"loss, 1024 x 896 x 32000": {
        "group": "loss", "shape": [1024, 896, 32000], "date": ..., "commit": ...,
        "sides": {"bandit_rft": {"role": "ours", "seconds": [...], "error": ..., "peak_mib": ..., "figures": {...}}},
        "missing": {"FlashInfer": "needs a CUDA GPU"}, "bars": [{...}]}}}

Samples of one case were taken in turns, so the n-th of one side and the n-th of another belong together: a ratio is the
median of their quotients, and its spread is that of the quotients. A run of several commands adds to one file.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from . import machine

SCHEMA = 1
OURS = "bandit_rft"
UPDATE_PRODUCTS = "the products of an update, nothing else"
READING = "reading the weights"  # once a token, as decoding has to: a side of its own, in the same turns


class Spread(NamedTuple):
    """Median and quartiles."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles; of fewer than four values, the lowest and highest instead of quartiles."""
    ordered = sorted(values)
    if len(ordered) < 4:
        return Spread(statistics.median(ordered), ordered[0], ordered[-1])
    low, _, high = statistics.quantiles(ordered, n=4, method="inclusive")
    return Spread(statistics.median(ordered), low, high)


def ratio(case: dict[str, Any], over: str, under: str) -> Spread:
    """`over`'s seconds / `under`'s, turn by turn; of medians and quartiles where their samples are not pairs."""
    a, b = case["sides"][over]["seconds"], case["sides"][under]["seconds"]
    if len(a) != len(b):
        x, y = spread(a), spread(b)
        return Spread(x.median / y.median, x.low / y.high, x.high / y.low)
    return spread([x / y for x, y in zip(a, b, strict=True)])


def peers(case: dict[str, Any]) -> list[str]:
    """The sides that compete, in the order they were measured."""
    return [name for name, side in case["sides"].items() if side["role"] == "peer" and side.get("seconds")]


def fastest(case: dict[str, Any], among: Iterable[str] | None = None) -> str | None:
    """The peer with the lowest median; None where no peer was measured."""
    names = [name for name in (peers(case) if among is None else among) if name in case["sides"]]
    return min(names, key=lambda name: statistics.median(case["sides"][name]["seconds"]), default=None)


def limit(case: dict[str, Any]) -> str | None:
    """The side that is the limit, where the case has one."""
    return next((name for name, side in case["sides"].items() if side["role"] == "limit"), None)


class Record:
    """One file, written whole after every case.

    Args:
        path: of the JSON; an existing one is added to.
        threads: that the run uses.

    Raises:
        ValueError: the file is of another format or another machine.
    """

    def __init__(self, path: Path, threads: int):
        self.path = path
        about = machine.describe(threads)
        self.data: dict[str, Any] = {"schema": SCHEMA, "machine": about, "cases": {}}
        if path.exists():
            earlier = load(path)
            different = [key for key in machine.SAME if earlier["machine"][key] != about[key]]
            if different:
                key = different[0]
                raise ValueError(
                    f"--record: {path} was measured with another {key} ({earlier['machine'][key]}, here {about[key]}); "
                    "name another file"
                )
            self.data["cases"] = earlier["cases"]

    def add(self, name: str, case: dict[str, Any]) -> None:
        """Add a case, or what else was measured of it (a peak, beside times of an earlier command)."""
        kept = self.data["cases"].setdefault(name, {"sides": {}, "missing": {}, "bars": []})
        sides, missing = case.pop("sides", {}), case.pop("missing", {})
        for side, found in sides.items():
            kept["sides"].setdefault(side, {}).update(found)
            kept["missing"].pop(side, None)
        kept["missing"].update({side: why for side, why in missing.items() if side not in sides})
        timed = any("seconds" in found for found in sides.values())
        if timed:  # times are of one run: a side that it left out keeps none of an earlier one's
            for side in set(kept["sides"]) - set(sides):
                kept["sides"][side] = {k: v for k, v in kept["sides"][side].items() if k in ("role", "peak_mib")}
        now = machine.measured()
        # times that are kept are of a run before
        beside = not timed and any("seconds" in found for found in kept["sides"].values())
        kept.update(case, **({"peaks_commit": now["commit"]} if beside else now))
        self.write()

    def write(self) -> None:
        """Replace the file in one step."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(self.path.name + ".new")
        temporary.write_text(json.dumps(rounded(self.data), indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, self.path)


def rounded(value: Any) -> Any:
    """The same with numbers of five significant digits: more than any clock here can tell."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(one) for one in value]
    return value


def load(path: Path) -> dict[str, Any]:
    """Read a run.

    Raises:
        ValueError: it is not one, or of another format.
    """
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not the JSON of a benchmark run: {error}") from None
    if not isinstance(data, dict) or data.get("schema") != SCHEMA or "cases" not in data:
        raise ValueError(f"{path} is not the JSON of a benchmark run of schema {SCHEMA}")
    return data
