"""How many instructions the compiled core executes a token, by valgrind's callgrind: the same total in every run.

    python benchmarks/instructions.py             count, and compare with the committed counts (make bench-instructions)
    python benchmarks/instructions.py --write     count twice, and commit to these

Where times drift by a factor of two, instructions do not drift at all, so a change of one percent shows. They are not
time: what waits for memory counts the same. Only the core's own instructions are counted (not Python's, nor libc's),
on one thread. valgrind has no AVX-512: the core is told to use AVX2 (`_C.use_instruction_set`), and that is what the
counts are of. Another compiler makes other code, so the counts name theirs, and under another they are not compared.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from comparison import machine

HERE = Path(__file__).resolve().parent
COMMITTED = HERE / "results" / "instructions.json"
PROGRAM = HERE / "comparison" / "counted_kernels.py"
INSTRUCTION_SET = "avx2"
TOLERANCE = 0.02
#: Of two runs: a draw looks for signals five times a second, which is a few instructions each time.
SAME = 1e-5


class CannotCount(Exception):
    """Nothing can be counted here; the text says why."""


def core() -> Path:
    """The compiled module."""
    from bandit_rft.ops import backends

    if backends.native is None:
        raise CannotCount(f"the compiled core is missing: {backends.native_error}")
    return Path(backends.native.__file__)


def count() -> dict[str, Any]:
    """{"compiler", "instruction_set", "kernels": {name: {"tokens", "instructions"}}}.

    Raises:
        CannotCount: no valgrind, no core, or it did not run under valgrind.
    """
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        raise CannotCount("valgrind is not installed")
    library = core()
    with tempfile.TemporaryDirectory() as folder:
        command = [
            valgrind, "--tool=callgrind", "--dump-before=getsid", "--dump-instr=no",
            f"--callgrind-out-file={folder}/out", sys.executable, "-sP", str(PROGRAM), str(library), INSTRUCTION_SET,
        ]  # fmt: skip
        if shutil.which("setarch"):
            command = ["setarch", "-R", *command]  # addresses are the same in every run, and so are hash tables
        one = {
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "PYTHONHASHSEED": "0",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        others = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        done = subprocess.run(command, capture_output=True, text=True, env={**others, **one})
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if not line.startswith("==")] or done.stderr.splitlines()
            raise CannotCount(f"the core did not run under valgrind: {said[-1] if said else done.returncode}")
        ran = [line.split("\t")[1:] for line in done.stdout.splitlines() if line.startswith("KERNEL")]
        parts = [Path(f"{folder}/out.{i + 1}") for i in range(2 * len(ran))]
        totals = [own_instructions(path.read_text(), library.name) for path in parts[1::2]]  # between two calls
    kernels = {
        name: {"tokens": int(tokens), "instructions": total} for (name, tokens), total in zip(ran, totals, strict=True)
    }
    about = {"compiler": machine.compiler_of(library), "instruction_set": INSTRUCTION_SET}
    return {**about, "valgrind": version(valgrind), "kernels": kernels}


def version(valgrind: str) -> str:
    """As it says itself."""
    return subprocess.run([valgrind, "--version"], capture_output=True, text=True, check=True).stdout.strip()


def own_instructions(profile: str, library: str) -> int:
    """Instructions executed in the functions of one library, from a callgrind profile.

    A profile lists costs by function; "ob=(7) path" or "ob=(7)" says of which object the functions that follow are.
    The line after "calls=" is what a callee cost, which is counted where the callee stands.
    """
    names: dict[str, str] = {}
    total, ours, called = 0, False, False
    for line in profile.splitlines():
        found = re.match(r"(c?ob)=\((\d+)\)(?: (.+))?$", line)
        if found:
            kind, number, name = found.groups()
            if name:
                names[number] = name
            if kind == "ob":
                ours = Path(names[number]).name == library
        elif line.startswith("calls="):
            called = True
        elif line[:1] in "0123456789+-*" and line:
            if ours and not called:
                total += int(line.split()[-1])
            called = False
    return total


def a_token(kernel: dict[str, int]) -> float:
    """Instructions a token."""
    return kernel["instructions"] / kernel["tokens"]


def differences(committed: dict[str, Any], found: dict[str, Any], tolerance: float = TOLERANCE) -> list[str]:
    """What is not within the tolerance, in words."""
    lines = []
    for name in dict.fromkeys([*committed["kernels"], *found["kernels"]]):
        pair = committed["kernels"].get(name), found["kernels"].get(name)
        if pair[0] is None or pair[1] is None:
            lines.append(f"{name}: {'not committed' if pair[0] is None else 'not counted any more'}")
            continue
        before, now = map(a_token, pair)
        if abs(now / before - 1) > tolerance:
            lines.append(f"{name}: {before:,.0f} instructions a token, now {now:,.0f} ({now / before - 1:+.1%})")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="count twice and write the committed counts")
    given = parser.parse_args(arguments)
    try:
        found = count()
        again = count() if given.write else found
    except CannotCount as reason:
        print(f"bench-instructions: {reason}", file=sys.stderr)
        return 2
    for name, kernel in found["kernels"].items():
        print(f"{name:<40} {a_token(kernel):14,.1f} instructions a token")
    if unlike := differences(found, again, SAME):
        print("bench-instructions: two runs differ, so nothing is written", *unlike, sep="\n", file=sys.stderr)
        return 1
    if given.write:
        COMMITTED.parent.mkdir(parents=True, exist_ok=True)
        COMMITTED.write_text(json.dumps({**found, **machine.measured()}, indent=1) + "\n")
        return 0
    committed = json.loads(COMMITTED.read_text())
    if committed["compiler"] != found["compiler"]:
        print(f"not compared: counted for {committed['compiler']}, and this core is of {found['compiler']}")
        return 0
    lines = differences(committed, found)
    print("\n".join(lines) or f"all within {TOLERANCE:.0%} of the committed counts")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
