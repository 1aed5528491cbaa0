"""Compiles csrc/cuda without a GPU and reads the machine code: what each kernel does with a logit and occupies.

    python tools/check_cuda.py            prints the tables of docs/building.md (every architecture)
    python tools/check_cuda.py --write    puts them there
    python tools/check_cuda.py --loop 'differentiate<F32, F32, plain>' 90      the instructions that are counted

How instructions are counted: a kernel's loops are its backward branches. A loop that moves a row has 16-byte loads on
the way from the branch's target to the branch (copies into shared memory, LDGSTS, are no loads: one turn asks for
them and a later one reads them there); of the ways through it, the one with most 16-byte accesses and then
fewest instructions is the one that a span without an edge takes (scalar accesses at a row's edge, barriers of overlaid
gradients and the exact noise of a token that may win lie on other ways). Its instructions, predicated ones included,
are divided by its logits: the bytes of its 16-byte loads by the size of a logit. Passes over a row are added up.

Compilations are remembered in build/check-cuda by what they depend on, so only a change costs its time.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import ctypes
import hashlib
import json
import os
import re
import shutil
import site
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from build_wheels import ROOT, find_nvcc, run

ARCHITECTURES = (80, 90, 100)
SOURCES = ("policy_rows", "sample_rows")
BUILDING = ROOT / "docs" / "building.md"
BEGIN, END = "<!-- python tools/check_cuda.py --write -->\n", "<!-- end -->\n"
VOCABULARY = 151_936  # of the plans whose shared memory is shown
#: major, opt-in shared memory of a block, of a multiprocessor, warps of a multiprocessor
LIMITS = {80: (8, 166_912, 167_936, 64), 90: (9, 232_448, 233_472, 64), 100: (10, 232_448, 233_472, 64)}
REGISTERS = 65_536
BYTES = {"F32": 4, "Bf16": 2, "F16": 2}
#: An H200: lane instructions a second (132 SMs x 128 lanes x 1.98 GHz), the share that issues, a copy's bytes a second.
LANE_INSTRUCTIONS, ISSUED, COPY = 33e12, 0.65, 4.3e12
MUFU_SLOTS = 8  # the special function unit takes 16 lanes a clock of a multiprocessor's 128


class Loop(NamedTuple):
    """The way through a loop over a row that a span without an edge takes."""

    logits: int  # of a lane in one turn
    instructions: int
    mufu: int  # operations of the special function unit
    accesses: dict[str, int]  # as {"LDG.128": 4}

    @property
    def cost(self) -> float:
        return self.instructions / self.logits


class Kernel(NamedTuple):
    name: str  # as "differentiate<F32, Bf16, plain>"
    architecture: int
    registers: int
    spilled: int  # bytes of stores and loads
    loops: list[Loop]

    @property
    def instructions(self) -> float:
        """A logit, in all passes."""
        return sum(loop.cost for loop in self.loops)

    @property
    def mufu(self) -> float:
        return sum(loop.mufu / loop.logits for loop in self.loops)

    @property
    def types(self) -> list[str]:
        return re.findall("F32|Bf16|F16", self.name)

    @property
    def copy_bandwidth(self) -> float:
        """The share of a copy's bytes a second that the instructions allow on an H200: a prediction, no measurement."""
        moved = sum(BYTES[kind] for kind in self.types)  # in, and out where something is written
        logits = min(LANE_INSTRUCTIONS * ISSUED / self.instructions, LANE_INSTRUCTIONS / MUFU_SLOTS / self.mufu)
        return logits * moved / COPY


def release(nvcc: Path) -> str:
    found = re.search(r"release ([\d.]+)", run(nvcc, "--version"))
    return found[1] if found else "?"


def find_cuobjdump(nvcc: Path) -> Path:
    """From the toolkit, or from Triton's package; an exit where neither is."""
    triton = [Path(p, "triton/backends/nvidia/bin") for p in (*site.getsitepackages(), site.getusersitepackages())]
    for folder in (nvcc.parent, *triton):
        if (folder / "cuobjdump").is_file():
            return folder / "cuobjdump"
    if found := shutil.which("cuobjdump"):
        return Path(found)
    sys.exit("no cuobjdump: install the CUDA toolkit, or `pip install triton`")


def _sources() -> list[Path]:
    return [*sorted((ROOT / "csrc").glob("*.h")), *sorted((ROOT / "csrc/cuda").glob("*"))]


def remembered(nvcc: Path, source: str, architecture: int) -> Path:
    """The file of what one compilation gave."""
    parts = [run(nvcc, "--version"), source, str(architecture), Path(__file__).read_text()]
    key = hashlib.sha256("\0".join([*parts, *(p.read_text() for p in _sources())]).encode()).hexdigest()[:20]
    return ROOT / "build" / "check-cuda" / f"{key}.json"


def _demangled(name: str) -> str:
    """differentiate<F32, Bf16, plain> from the kernel's mangled name."""
    found = re.search(r"\d(score|differentiate|sample)I(.*?)EEv", name)
    if found is None:
        return name
    kinds = re.findall(r"3F32|4Bf16|3F16|S\d?_|Lb[01]", found[2].replace("NS0_", ""))  # S0_ is the namespace
    first = kinds[0][1:] if kinds else "?"
    flags = [("whole", "filtered"), ("general", "plain")] if found[1] == "sample" else [("general", "plain")]
    words = [first if k.startswith("S") else k[1:] for k in kinds if not k.startswith("Lb")]
    words += [pair[k == "Lb1"] for pair, k in zip(flags, (k for k in kinds if k.startswith("Lb")), strict=True)]
    return f"{found[1]}<{', '.join(words)}>"


class Instruction(NamedTuple):
    address: int
    text: str

    @property
    def operation(self) -> str:
        return self.text.split()[1 if self.text.startswith("@") else 0]

    @property
    def target(self) -> int | None:
        found = re.match(r"(?:@!?U?P\S+ )?BRA\S* .*?(0x[0-9a-f]+)$", self.text)
        return int(found[1], 16) if found else None

    @property
    def falls_through(self) -> bool:
        conditional = self.text.startswith(("@", "BRA.DIV")) or re.match(r"BRA\S* !?U?P\d", self.text) is not None
        return conditional or self.operation.split(".")[0] not in ("BRA", "EXIT", "RET", "BRX")

    @property
    def access(self) -> str:
        """LDG.128, STG.32, LDS.128, LDGSTS.128 ...; empty where no memory of the row or shared memory is touched."""
        if self.text.startswith("@!PT"):  # never executed: ptxas puts some before fences and copies
            return ""
        found = re.match(r"(LDGSTS|LDG|STG|LDS|STS)\b", self.operation)
        width = re.search(r"\.(128|64|U?S?16|U?S?8)\b", self.operation)
        return f"{found[1]}.{width[1].lstrip('US') if width else 32}" if found else ""


def functions(sass: str) -> dict[str, list[Instruction]]:
    found: dict[str, list[Instruction]] = {}
    for part in re.split(r"\n\s*Function : ", sass)[1:]:
        name, _, body = part.partition("\n")
        lines = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?)\s*;", body)
        found[name.strip()] = [Instruction(int(address, 16), " ".join(text.split())) for address, text in lines]
    return found


def _way(code: list[Instruction], begin: int, end: int) -> list[Instruction]:
    """From `begin` to `end` forwards: most 16-byte accesses, then fewest instructions.

    Where a loop has its row in shared memory, a 16-byte load from global memory is for what has no room there: such a
    load counts against a way, or if a predicate turns it off, not at all.
    """
    part = [i for i in code if begin <= i.address <= end]
    kept = any(i.access == "LDS.128" for i in part)
    off = {i.address for i in part if kept and i.access == "LDG.128" and i.text.startswith("@")}
    best: dict[int, tuple[int, int]] = {part[0].address: (0, 0)}  # (-accesses, instructions) before an address
    came: dict[int, int] = {}
    for instruction, following in zip(part, [*part[1:], None], strict=True):
        if instruction.address not in best:
            continue
        wide = instruction.access.endswith(".128") and instruction.address not in off
        against = kept and wide and instruction.access == "LDG.128"
        cost = (best[instruction.address][0] - wide + 2 * against, best[instruction.address][1] + 1)
        onwards = [instruction.target] if instruction.target is not None else []
        if instruction.falls_through and following is not None:
            onwards.append(following.address)
        for address in onwards:
            if instruction.address < address <= end and (address not in best or cost < best[address]):
                best[address] = cost
                came[address] = instruction.address
    if end not in best:
        return []
    at = {i.address: i for i in part}
    way = [at[end]]
    while way[-1].address != begin:
        way.append(at[came[way[-1].address]])
    return way[::-1]


def row_ways(code: list[Instruction]) -> list[list[Instruction]]:
    """The counted way through each innermost loop that loads a row: it stores nothing into shared memory but copies."""
    branches = [(i.target, i.address) for i in code if i.target is not None and i.target < i.address]
    ways: list[list[Instruction]] = []
    for begin, end in branches:
        way = _way(code, begin, end)
        outer = any(
            (b, e) != (begin, end) and begin <= b and e <= end and _loads(_way(code, b, e)) for b, e in branches
        )
        if _loads(way) and not outer and not any(i.access.startswith("STS") for i in way):
            ways.append(way)
    return ways


def _accesses(way: list[Instruction]) -> Counter[str]:
    """Of a row in shared memory without the loads of what has no room there: a predicate turns them off."""
    found = Counter(i.access for i in way if i.access)
    if found["LDS.128"]:
        del found["LDG.128"]
    return found


def _loads(way: list[Instruction]) -> int:
    found = _accesses(way)
    return found["LDG.128"] + found["LDS.128"]


def _loops(name: str, code: list[Instruction]) -> list[Loop]:
    width = BYTES[re.findall("F32|Bf16|F16", name)[0]]
    return [
        Loop(
            16 * _loads(way) // width, len(way), sum(i.operation.startswith("MUFU") for i in way),
            dict(_accesses(way)),
        )
        for way in row_ways(code)
    ]  # fmt: skip


def _assembled(nvcc: Path, source: str, architecture: int) -> tuple[str, str]:
    """(ptxas's words, SASS) of one file; exits with the compiler's words if it does not compile."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "a.cubin")
        done = subprocess.run(
            [
                nvcc, "-O3", "-std=c++17", "-Xptxas", "-v", '-DBRFT_CUDA_NAMES=""', f"-arch=sm_{architecture}",
                "-cubin", "-o", cubin, ROOT / "csrc" / "cuda" / f"{source}.cu",
            ],
            capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            sys.exit(f"csrc/cuda/{source}.cu does not compile for sm_{architecture}:\n{done.stderr}")
        return done.stderr, run(find_cuobjdump(nvcc), "-sass", cubin)


def compiled(nvcc: Path, source: str, architecture: int) -> list[Kernel]:
    known = remembered(nvcc, source, architecture)
    if known.exists():
        return [Kernel(*row[:4], [Loop(*loop) for loop in row[4]]) for row in json.loads(known.read_text())]
    said, sass = _assembled(nvcc, source, architecture)
    code = functions(sass)
    kernels = []
    for name, stores, loads, registers in re.findall(
        r"Function properties for (\S+)\n.*?(\d+) bytes spill stores, (\d+) bytes spill loads\n"
        r".*?Used (\d+) registers",
        said,
    ):
        short, body = _demangled(name), [i for i in code[name] if i.operation != "NOP"]
        kernels.append(Kernel(short, architecture, int(registers), int(stores) + int(loads), _loops(short, body)))
    known.parent.mkdir(parents=True, exist_ok=True)
    known.write_text(json.dumps(kernels))
    return kernels


def every_kernel(nvcc: Path, architectures: tuple[int, ...] = ARCHITECTURES) -> list[Kernel]:
    jobs = [(source, architecture) for source in reversed(SOURCES) for architecture in architectures]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(lambda job: compiled(nvcc, *job), jobs))
    return sorted((kernel for kernels in results for kernel in kernels), key=lambda k: (k.name, k.architecture))


class Occupancy(NamedTuple):
    cluster: int  # blocks on one row
    shared: int  # bytes of a block
    blocks: int  # on a multiprocessor at a time
    warps: int


def occupancies(kernels: list[Kernel]) -> dict[tuple[str, int], Occupancy]:
    """What csrc/cuda/launch.h plans for a row of VOCABULARY logits, and what of it fits a multiprocessor."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "plans.so")
        run(
            "c++", "-std=c++17", "-shared", "-fPIC", "-DBRFT_EMULATED_DEVICE", f"-I{ROOT / 'tests/native'}",
            "-o", library, ROOT / "tests/native/emulated_cuda.cpp",
        )  # fmt: skip
        plans = ctypes.CDLL(str(library))
    found = {}
    for kernel in kernels:
        major, of_block, of_sm, warps_of_sm = LIMITS[kernel.architecture]
        plans.use_device(major, of_block, of_sm, 512, ctypes.c_bool(False))
        out = (ctypes.c_int * 5)()
        what = "filtered" if "filtered" in kernel.name else kernel.name.split("<")[0]
        plans.plan_of(ctypes.c_int64(VOCABULARY), BYTES[kernel.types[0]], what.encode(), ctypes.c_bool(False), out)
        cluster, threads, _, _, shared = out
        registers = threads * ((kernel.registers + 7) // 8 * 8)
        blocks = min(REGISTERS // registers, of_sm // (shared + 1024), warps_of_sm * 32 // threads)
        found[kernel.name, kernel.architecture] = Occupancy(cluster, shared, blocks, blocks * threads // 32)
    return found


def tables(kernels: list[Kernel], shown: Sequence[int] = (90,)) -> str:
    """Counts on all architectures; shared memory, occupancy and accesses on those that are `shown`."""
    of = {(k.name, k.architecture): k for k in kernels}
    fits = occupancies(kernels)
    names = list(dict.fromkeys(k.name for k in kernels))
    head = "".join(f" sm_{a} |" for a in ARCHITECTURES)
    lines = [
        "Instructions a logit in all passes over the row (of them on the special function unit), and the share of a",
        "copy's bandwidth on an H200 that those of sm_90 allow. **Predicted**, not measured: 33 T lane instructions a",
        "second, of which 65% issue, against 4.3 TB/s; 1 means that memory is the limit.",
        "",
        f"| kernel |{head} of copy bandwidth, predicted |",
        "|---|" + "---|" * (len(ARCHITECTURES) + 1),
    ]
    for name in names:
        cells = [f"{of[name, a].instructions:.1f} ({of[name, a].mufu:.1f})" for a in ARCHITECTURES]
        # What is selected by filters is visited a number of times that depends on the row: no share is predicted.
        share = "" if "filtered" in name else f"{min(1.0, of[name, 90].copy_bandwidth):.2f}"
        lines.append(f"| `{name}` | {' | '.join(cells)} | {share} |")
    for architecture in shown:
        lines += [
            "",
            f"Registers a thread / bytes spilled; then for a row of {VOCABULARY:,} logits on sm_{architecture}: "
            "blocks on it x shared",
            "memory of each, warps on a multiprocessor, and the accesses of one turn of each loop (16 logits a lane).",
            "",
            f"| kernel |{head} blocks, shared memory | warps | accesses |",
            "|---|" + "---|" * (len(ARCHITECTURES) + 3),
        ]
        for name in names:
            cells = [f"{of[name, a].registers} / {of[name, a].spilled}" for a in ARCHITECTURES]
            fit = fits[name, architecture]
            loops = dict.fromkeys(
                ", ".join(f"{n} {what}" for what, n in sorted(loop.accesses.items()))
                for loop in of[name, architecture].loops
            )
            cells += [f"{fit.cluster} x {fit.shared / 1024:.1f} KiB", str(fit.warps), "; ".join(loops)]
            lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def recorded() -> str:
    """The tables of docs/building.md."""
    return BUILDING.read_text().partition(BEGIN)[2].partition(END)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/building.md")
    parser.add_argument("--loop", nargs=2, metavar=("KERNEL", "ARCHITECTURE"), help="print what is counted of a kernel")
    options = parser.parse_args()
    nvcc = find_nvcc()
    if options.loop:
        name, architecture = options.loop
        for source in SOURCES:
            for mangled, code in functions(_assembled(nvcc, source, int(architecture))[1]).items():
                if _demangled(mangled) == name:
                    for way in row_ways([i for i in code if i.operation != "NOP"]):
                        print(*(f"{i.address:05x}  {i.text}" for i in way), "", sep="\n")
        return
    kernels = every_kernel(nvcc)
    if options.write:
        text = tables(kernels)
        before, _, rest = BUILDING.read_text().partition(BEGIN)
        BUILDING.write_text(before + BEGIN + text + END + rest.partition(END)[2])
    else:
        print(tables(kernels, ARCHITECTURES), end="")


if __name__ == "__main__":
    main()
