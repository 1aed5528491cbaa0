"""Compiles every Triton kernel ahead of time without a GPU and reads the machine code, as check_cuda.py does for CUDA.

    python tools/check_triton.py                 prints the tables of docs/building.md for the installed Triton
    python tools/check_triton.py --write         puts them there
    python tools/check_triton.py --versions 3.4.0 3.6.0 [--write]    compiles with these, each from a folder of its own
    python tools/check_triton.py --json 90       what came out for one architecture

How instructions of a fused head are counted: its persistent loop is the largest backward branch around the matrix
instructions. Of the ways through it that store, the one with fewest instructions is a tile without a rival (whose exact
noise lies on another way) and without a target; less the way of a turn that only multiplies, it is what the tile costs
besides its product. That is divided by the tile's logits a thread.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

from build_wheels import ROOT
from check_cuda import ARCHITECTURES, BUILDING, Instruction, functions

BEGIN, END = "<!-- python tools/check_triton.py --write -->\n", "<!-- end of check_triton.py -->\n"
VERSIONS_BEGIN = "<!-- python tools/check_triton.py --versions --write -->\n"
VERSIONS_END = "<!-- end of check_triton.py --versions -->\n"
MATRIX = ("wgmma.mma_async", "tcgen05.mma", "mma.sync")
#: The same, as the machine code has them.
PRODUCTS = ("HGMMA", "UTCHMMA", "HMMA")
VOCABULARY = 151_936
#: Rows of a batch, or a chunk of tokens.
DRAWS, SCORES = (64, 32, 16), (64, 8192)
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")
TYPES = {
    "hidden": "*bf16", "weight": "*bf16", "logits": "*fp32", "gradient": "*fp32", "winning_token": "*i32",
    **dict.fromkeys(["targets", "target", "seed", "sequences", "positions", "token", "tokens"], "*i64"),
    **dict.fromkeys(["rows", "vocabulary", "tiles", "stride", "hidden_stride", "weight_stride"], "i32"),
    "gradient_stride": "i32", "count": "i64",
    **dict.fromkeys(["logit_scale", "softcap", "temperature", "low", "high", "dual_clip", "kl_coef"], "fp32"),
    **dict.fromkeys(["entropy_coef", "top_k", "top_p", "min_p"], "fp32"),
}  # fmt: skip


def cases(capability: int) -> list[tuple[str, Any, dict[str, Any]]]:
    """(name, kernel, its constants and options) of everything that is launched on such a GPU, at V = VOCABULARY."""
    import torch
    from bandit_rft.kernels import (  # type: ignore[import-untyped]
        head_tile,
        linear_logprobs,
        linear_sample,
        policy_rows,
        sample_rows,
        scale_gradient,
    )

    described = capability >= 90
    heads = [("linear_logprobs", rows, False, described) for rows in SCORES]
    heads += [("linear_sample", rows, True, described) for rows in DRAWS]
    if described:  # where rows are not aligned to 16 bytes
        heads.append(("linear_logprobs by pointers", 8192, False, False))
    found: list[tuple[str, Any, dict[str, Any]]] = []
    tiles = set()
    for name, rows, draws, bulk in heads:
        tile = head_tile.configuration(rows, torch.bfloat16, capability, draws)
        if (name, tile) in tiles:
            continue
        tiles.add((name, tile))
        constants = {"H": 4096, "SOFTCAP": False, "WIDEN": False, "bias": None, "temperatures": None}
        constants |= {"DESCRIBED": bulk, **tile._asdict(), "types": {}}
        if not draws:
            constants["WIDTH"] = head_tile.state_width(torch.bfloat16)
        if bulk:
            constants["types"] = {
                "hidden": f"tensordesc<bf16[{tile.BLOCK_N}, {tile.BLOCK_H}]>",
                "weight": f"tensordesc<bf16[{tile.BLOCK_V}, {tile.BLOCK_H}]>",
            }
        found.append(
            (f"{name}, {rows} rows", linear_sample.draw_tiles if draws else linear_logprobs.score_tiles, constants)
        )
    block, warps = policy_rows.block_of(VOCABULARY)
    row = {"temperatures": None, "SOFTCAP": False, "BLOCK": block, "num_warps": warps, "enable_fp_fusion": False}
    policy = {**row, "given_logprob": None, "given_entropy": None, "reference": None, "KIND": 3, "KL": 0}
    draw = {**row, "TOP_K": False, "TOP_P": False, "MIN_P": False}
    filtered = {**row, **sample_rows.filtered_block(VOCABULARY), "TOP_K": True, "TOP_P": True, "MIN_P": True}
    merge = dict.fromkeys(["winners", "winning_token", "token", "sampling_logprobs", "kept_mass"])
    found.append(("merge_tiles", head_tile.merge_tiles, {**merge, **head_tile.MERGE}))
    found.append(("logprob_rows", policy_rows.visit_rows, {**policy, "KIND": -1}))
    found.append(("policy_rows", policy_rows.visit_rows, policy))
    found.append(("policy_rows, bfloat16 out", policy_rows.visit_rows, {**policy, "types": {"gradient": "*bf16"}}))
    found.append(("sample_rows", sample_rows.draw_rows, draw))
    found.append(("sample_rows, filtered", sample_rows.draw_rows, filtered))
    found.append(("scale_gradient", scale_gradient.scale_all, {"BLOCK": scale_gradient.BLOCK}))
    return found


def variants(capability: int) -> list[tuple[str, Any, dict[str, Any]]]:
    """What other calls launch than `cases`, each of a kind: that they compile, before a user's first call does."""
    import torch
    from bandit_rft.kernels import head_tile, linear_logprobs, linear_sample

    found = []
    for name, kernel, constants in cases(capability):
        if name.startswith("linear") and "pointers" not in name:
            others = {k: v for k, v in constants.items() if k not in ("bias", "temperatures")}
            types = {k: v.replace("bf16", "fp16") for k, v in constants["types"].items()}
            found.append((f"{name}, float16", kernel, {**others, "H": 2040, "SOFTCAP": True, "types": types}))
    for rows, kernel, draws in ((64, linear_sample.draw_tiles, True), (8192, linear_logprobs.score_tiles, False)):
        for dtype, name in ((torch.float32, "*fp32"), (torch.float16, "*fp16")):
            tile = head_tile.configuration(rows, dtype, capability, draws)
            constants = {"H": 901, "SOFTCAP": False, "WIDEN": False, "DESCRIBED": False, **tile._asdict()}
            constants |= {"types": {"hidden": name, "weight": name, "bias": name}}
            if not draws:
                constants["WIDTH"] = head_tile.state_width(dtype)
            found.append((f"{kernel.__name__} by pointers, {name}", kernel, constants))
    rows_of = {name: (kernel, constants) for name, kernel, constants in cases(capability)}
    kernel, policy = rows_of["policy_rows"]
    given = {k: v for k, v in policy.items() if k not in ("given_logprob", "given_entropy", "temperatures")}
    found.append(("policy_rows, given", kernel, {**given, "KIND": 0, "SOFTCAP": True}))
    for kind in range(1, 6):
        constants = {k: v for k, v in policy.items() if k not in ("reference", "temperatures")}
        constants |= {"KIND": kind, "KL": 1 + kind % 3, "types": {"gradient": "*fp16"}}
        found.append((f"policy_rows, objective {kind}", kernel, constants))
    kernel, filtered = rows_of["sample_rows, filtered"]
    for only in ("TOP_K", "TOP_P", "MIN_P"):
        constants = {**filtered, **dict.fromkeys(("TOP_K", "TOP_P", "MIN_P"), False), only: True, "SOFTCAP": True}
        found.append((f"sample_rows, {only}", kernel, {k: v for k, v in constants.items() if k != "temperatures"}))
    return found


# --- counting ---------------------------------------------------------------------------------------------------------


def shortest_way(code: list[Instruction], begin: int, end: int) -> list[Instruction]:
    """The fewest instructions from the one at `begin` forwards to the one at `end`; [] where there is no way."""
    part = [i for i in code if begin <= i.address <= end]
    length, came = {begin: 1}, dict[int, int]()
    for instruction, following in zip(part, [*part[1:], None], strict=True):
        if instruction.address not in length:
            continue
        onwards = [] if instruction.target is None else [instruction.target]
        if instruction.falls_through and following is not None:
            onwards.append(following.address)
        for address in onwards:
            after = length[instruction.address] + 1
            if instruction.address < address <= end and after < length.get(address, after + 1):
                length[address], came[address] = after, instruction.address
    if end not in length:
        return []
    at = {i.address: i for i in part}
    way = [at[end]]
    while way[-1].address != begin:
        way.append(at[came[way[-1].address]])
    return way[::-1]


def _loops(code: list[Instruction]) -> list[tuple[int, int]]:
    return [(i.target, i.address) for i in code if i.target is not None and i.target < i.address]


def tile_instructions(code: list[Instruction]) -> int:
    """Instructions of a fused head's warp for one tile, without those of the turns of its product."""
    products = [i.address for i in code if i.operation.split(".")[0] in PRODUCTS]
    around = [(b, e) for b, e in _loops(code) if any(b <= a <= e for a in products)]
    # A wait that has to be repeated jumps out of the loop and back in from behind it; that is no loop of its own.
    around = [loop for loop in around if shortest_way(code, *loop)]
    begin, end = max(around, key=lambda loop: loop[1] - loop[0])
    inner = min(around, key=lambda loop: loop[1] - loop[0])
    stores = [i.address for i in code if i.operation.startswith("STG") and begin < i.address < end]
    ways = [(shortest_way(code, begin, s), shortest_way(code, s, end)) for s in stores]
    tile = min(len(before) + len(after) - 1 for before, after in ways if before and after)
    return tile - len(shortest_way(code, *inner))


def row_instructions(code: list[Instruction]) -> int:
    """Instructions of a row kernel's warp for one turn of each of its innermost loops that load the row."""
    loops = [(b, e) for b, e in _loops(code) if shortest_way(code, b, e)]
    loads = [i.address for i in code if i.operation.startswith("LDG")]
    loading = [loop for loop in loops if any(loop[0] <= a <= loop[1] for a in loads)]
    innermost = [a for a in loading if not any(a[0] <= b[0] and b[1] <= a[1] and a != b for b in loading)]
    return sum(len(shortest_way(code, *loop)) for loop in innermost)


def _output(tool: str, *arguments: str) -> str:
    import triton

    path = str(getattr(triton.knobs.nvidia, tool).path)
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def compiled(name: str, kernel: Any, constants: dict[str, Any], capability: int) -> dict[str, Any]:
    """What Triton makes of one kernel: registers, bytes spilled, shared memory, matrix instructions, counts."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {**TYPES, **constants.get("types", {})}
    options = {k: v for k, v in constants.items() if k in OPTIONS}
    constants = {k: v for k, v in constants.items() if k not in OPTIONS and k != "types"}
    signature = {n: "constexpr" if n in constants else types.get(n, "*fp32") for n in kernel.arg_names}
    aligned = [i for i, n in enumerate(kernel.arg_names) if signature[n].startswith("*") or "stride" in n]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    binary = triton.compile(
        ASTSource(kernel, signature, constants, attributes), target=GPUTarget("cuda", capability, 32), options=options
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = _output("cuobjdump", "--dump-resource-usage", file.name)
        (code,) = functions(_output("cuobjdump", "-sass", file.name)).values()
    code = [i for i in code if i.operation != "NOP"]
    used = {n: int(found[1]) for n in ("REG", "STACK", "LOCAL") if (found := re.search(rf"{n}:(\d+)", usage))}
    ptx = binary.asm["ptx"]
    warps = binary.metadata.num_warps
    instructions = None
    if name.startswith("linear"):
        instructions = tile_instructions(code) * 32 * warps / (constants["BLOCK_N"] * constants["BLOCK_V"])
    elif name.split(",")[0].endswith("_rows") and not name.endswith("filtered"):
        instructions = row_instructions(code) * 32 * warps / constants["BLOCK"]
    return {
        "registers": used["REG"], "spilled": used["STACK"] + used["LOCAL"], "shared": binary.metadata.shared,
        "warps": warps, "matrix": [n for n in MATRIX if n in ptx], "bulk": ptx.count("cp.async.bulk.tensor"),
        "shapes": sorted(set(re.findall(r"(?:wgmma\S*|mma\.sync\.aligned)\.(m\d+n\d+k\d+)", ptx))),
        "instructions": instructions,
    }  # fmt: skip


def every_kernel(capability: int) -> dict[str, dict[str, Any]]:
    """All kernels for one architecture, by the installed Triton."""
    return {name: compiled(name, kernel, c, capability) for name, kernel, c in cases(capability)}


def every_variant(capability: int) -> dict[str, dict[str, Any]]:
    """The same of what other calls launch; their instructions are not counted."""
    return {name: compiled(f"({name})", kernel, c, capability) for name, kernel, c in variants(capability)}


# --- other Tritons ----------------------------------------------------------------------------------------------------


def folder_of(version: str) -> Path:
    """Where this version of Triton is, alone; installed at need (some hundred megabytes)."""
    folder = ROOT / "build" / "triton" / version
    if not (folder / "triton").is_dir():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        subprocess.run([*pip, f"triton=={version}"], check=True)
    return folder


def by_version(version: str, capability: int, *more: str) -> dict[str, dict[str, Any]]:
    """As `every_kernel`, in a process of its own that finds this version of Triton first."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if version != metadata.version("triton"):
        environment["PYTHONPATH"] = str(folder_of(version))
    command = [sys.executable, __file__, "--json", str(capability), *more]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"Triton {version} does not compile for sm_{capability}:\n{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    assert found.pop("triton") == version
    return found


# --- tables -----------------------------------------------------------------------------------------------------------


def cell(used: dict[str, Any] | None) -> str:
    """One kernel on one architecture in the first table."""
    if used is None:
        return ""
    count = "" if used["instructions"] is None else f"{used['instructions']:.1f}; "
    return f"{count}{used['registers']} / {used['spilled']}; {used['shared'] / 1024:.1f}"


def tables(found: dict[int, dict[str, dict[str, Any]]], version: str) -> str:
    """The installed Triton's table: {architecture: every_kernel}."""
    names = list(dict.fromkeys(name for kernels in found.values() for name in kernels))
    lines = [
        f"By Triton {version}: instructions a logit (of a fused head those beside its product, of a row kernel all its",
        "passes); registers a thread / bytes spilled; KiB of shared memory.",
        "",
        "|" + "|".join([" kernel ", *(f" sm_{a} " for a in found)]) + "| on sm_90 |",
        "|---|" + "---|" * (len(found) + 1),
    ]
    for name in names:
        used = found[90].get(name, {})
        what = [*used.get("shapes", []), *(["bulk copies"] if used.get("bulk") else [])]
        cells = [cell(kernels.get(name)) for kernels in found.values()]
        lines.append(f"| {name} | {' | '.join(cells)} | {', '.join(what)} |")
    return "\n".join(lines) + "\n"


def version_table(found: dict[str, dict[int, dict[str, dict[str, Any]]]], today: str) -> str:
    """{version: {architecture: every_kernel}}: that all compile, what spills, what a fused head costs."""
    lines = [
        f"Compiled on {today}. In each place: kernels compiled; bytes spilled a thread, of all",
        "kernels together; instructions a logit beside the product of linear_logprobs and linear_sample at 64 rows.",
        "",
        "| Triton |" + "".join(f" sm_{a} |" for a in ARCHITECTURES),
        "|---|" + "---|" * len(ARCHITECTURES),
    ]
    for version, by_architecture in found.items():
        cells = []
        for kernels in by_architecture.values():
            spilled = sum(used["spilled"] for used in kernels.values())
            heads = [kernels[f"{n}, 64 rows"]["instructions"] for n in ("linear_logprobs", "linear_sample")]
            cells.append(f"{len(kernels)}; {spilled}; {heads[0]:.0f}, {heads[1]:.0f}")
        lines.append(f"| {version} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def recorded(begin: str = BEGIN, end: str = END) -> str:
    """A table of docs/building.md."""
    return BUILDING.read_text().partition(begin)[2].partition(end)[0]


def write(text: str, begin: str, end: str) -> None:
    """Put a table into docs/building.md, between its marks."""
    before, mark, rest = BUILDING.read_text().partition(begin)
    if not mark:
        sys.exit(f"docs/building.md has no place for it: {begin.strip()}")
    BUILDING.write_text(before + begin + text + end + rest.partition(end)[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into docs/building.md")
    parser.add_argument("--json", type=int, metavar="ARCHITECTURE", help="one architecture, by the installed Triton")
    parser.add_argument("--variants", action="store_true", help="with --json: what other calls launch instead")
    parser.add_argument("--versions", nargs="+", metavar="VERSION", help="compile with these versions of Triton")
    options = parser.parse_args()
    if options.versions:
        found = {v: {a: by_version(v, a) for a in ARCHITECTURES} for v in options.versions}
        text, begin, end = version_table(found, date.today().isoformat()), VERSIONS_BEGIN, VERSIONS_END
    else:
        import triton

        if options.json:
            made = every_variant(options.json) if options.variants else every_kernel(options.json)
            print(json.dumps({"triton": triton.__version__, **made}))
            return
        text, begin, end = tables({a: every_kernel(a) for a in ARCHITECTURES}, triton.__version__), BEGIN, END
    if options.write:
        write(text, begin, end)
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
