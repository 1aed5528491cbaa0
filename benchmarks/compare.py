"""Whether a run is slower than an earlier one; exit status 1 if something is, 2 if they cannot be compared.

    python benchmarks/compare.py OLD.json NEW.json [--tolerance 0.05]       (make bench-compare OLD=... NEW=...)

A machine's speed drifts by more than most changes are worth, but both sides of a case drift together. So what is
compared is ours over a reference that does not change with this project (the limit, else plain PyTorch, else the first
peer that both runs have), turn by turn. A case is slower if the median of these quotients grew by more than the
tolerance *and* the runs' quartiles do not overlap. Where a case has no reference, its seconds are compared likewise.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from comparison import machine, record
from comparison.record import OURS, Spread

PLAIN = "plain PyTorch"


class Change(NamedTuple):
    """A case's quotient then and now, and over what."""

    case: str
    over: str
    old: Spread
    new: Spread

    @property
    def factor(self) -> float:
        return self.new.median / self.old.median

    def slower(self, tolerance: float) -> bool:
        return self.factor > 1 + tolerance and self.new.low > self.old.high

    def faster(self, tolerance: float) -> bool:
        return self.factor < 1 / (1 + tolerance) and self.new.high < self.old.low


def reference(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """The side that both runs of a case have and that this project does not change."""
    usable = [
        name for name, side in old["sides"].items()
        if name != OURS and side.get("seconds") and new["sides"].get(name, {}).get("seconds")
    ]  # fmt: skip
    first = [name for name in usable if old["sides"][name]["role"] == "limit"]
    return next(iter([*first, *(name for name in usable if name == PLAIN), *usable]), None)


def changes(old: dict[str, Any], new: dict[str, Any]) -> tuple[list[Change], list[str], list[str]]:
    """(of the cases that both have timed, cases of `old` alone, cases of `new` alone)."""
    timed = [
        {name for name, case in run["cases"].items() if case["sides"].get(OURS, {}).get("seconds")}
        for run in (old, new)
    ]
    found = []
    for name in old["cases"]:
        if name not in timed[0] & timed[1]:
            continue
        then, now = old["cases"][name], new["cases"][name]
        against = reference(then, now)
        if against is None:
            spreads = [record.spread(case["sides"][OURS]["seconds"]) for case in (then, now)]
        else:
            spreads = [record.ratio(case, OURS, against) for case in (then, now)]
        found.append(Change(name, against or "seconds", *spreads))
    return found, sorted(timed[0] - timed[1]), sorted(timed[1] - timed[0])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--tolerance", type=float, default=0.05, help="growth that counts as noise [0.05]")
    given = parser.parse_args(arguments)
    if given.tolerance < 0:
        parser.error(f"--tolerance must be >= 0; got {given.tolerance}")
    try:
        old, new = record.load(given.old), record.load(given.new)
    except ValueError as error:
        print(f"bench-compare: {error}", file=sys.stderr)
        return 2
    found, gone, added = changes(old, new)
    if not found:
        print("bench-compare: the runs have no timed case in common", file=sys.stderr)
        return 2
    for key in machine.SAME:
        if old["machine"][key] != new["machine"][key]:
            print(f"note: another {key}: {old['machine'][key]}, then {new['machine'][key]}")
    if old["machine"]["versions"] != new["machine"]["versions"]:
        print("note: versions differ, so the references may have changed as well")
    slower = [change for change in found if change.slower(given.tolerance)]
    for change in found:
        verdict = "SLOWER" if change in slower else "faster" if change.faster(given.tolerance) else "as before"
        print(
            f"{verdict:<10}{change.factor:6.2f}x  {change.case}\n{'':20}/ {change.over}: "
            f"{change.old.median:.3g} ({change.old.low:.3g}-{change.old.high:.3g}), then "
            f"{change.new.median:.3g} ({change.new.low:.3g}-{change.new.high:.3g})"
        )
    for name in gone:
        print(f"not measured any more: {name}")
    for name in added:
        print(f"new: {name}")
    print(f"{len(found)} cases, {len(slower)} slower by more than {given.tolerance:.0%} and beyond the spread")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
