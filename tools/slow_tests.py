"""Write tests/slow_tests.txt, the tests that `make test-fast` leaves out, from the times of a run of all tests.

    .venv/bin/python -m pytest --junitxml build/junit.xml && .venv/bin/python tools/slow_tests.py build/junit.xml

A test function is slow when its cases take longer than TOTAL_S together and MEAN_S each on average. One that did not
run there (skipped) stays what it was, unless it no longer exists. What a fixture takes is counted for the first case
that asks for it: a file whose tests share a slow one is marked `slow` itself.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
LIST = ROOT / "tests" / "slow_tests.txt"
#: Seconds. Chosen so that what is left takes a minute on the machine of CI.
TOTAL_S, MEAN_S = 0.3, 0.05


def listed() -> set[str]:
    """The functions in the list, as "tests/folder/test_file.py::test_function"."""
    if not LIST.exists():
        return set()
    return {line for line in LIST.read_text().splitlines() if line and not line.startswith("#")}


def exists(function: str) -> bool:
    """Whether there is such a test function."""
    path, _, name = function.partition("::")
    file = ROOT / path
    return (
        file.is_file() and re.search(rf"^(async )?def {re.escape(name)}\(", file.read_text(), re.MULTILINE) is not None
    )


def measured(report: Path) -> dict[str, list[float]]:
    """Seconds of each case of each function that ran, from pytest's --junitxml."""
    times = defaultdict[str, list[float]](list)
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        if case.find("skipped") is None:
            function = case.attrib["classname"].replace(".", "/") + ".py::" + case.attrib["name"].partition("[")[0]
            times[function].append(float(case.attrib["time"]))
    return dict(times)


def is_slow(seconds: list[float]) -> bool:
    """Whether a function whose cases take so long is left out of the fast tests."""
    return sum(seconds) > TOTAL_S and sum(seconds) / len(seconds) > MEAN_S


def main(report: Path) -> None:
    """Write the list, and say how much is left."""
    times = measured(report)
    slow = {function for function, seconds in times.items() if is_slow(seconds)}
    slow |= listed() - times.keys()
    head = "# Left out by `make test-fast`. Written by tools/slow_tests.py from measured times; do not edit.\n"
    LIST.write_text(head + "".join(f"{function}\n" for function in sorted(filter(exists, slow))))
    left = [seconds for function, seconds in times.items() if function not in slow]
    print(f"{sum(map(len, left))} cases of {len(left)} functions are fast, if no mark says otherwise: "
          f"{sum(map(sum, left)):.0f} seconds of {sum(map(sum, times.values())):.0f}")  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]))
