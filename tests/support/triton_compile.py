"""Compiles every Triton kernel ahead of time for one architecture and prints what came out, as JSON. Needs no GPU.

python tests/support/triton_compile.py 90 [linear_sample]
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from typing import Any

import torch
import triton
from bandit_rft.kernels import head_tile, linear_logprobs, linear_sample, policy_rows, sample_rows, scale_gradient
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TYPES = {
    "hidden": "*bf16", "weight": "*bf16", "logits": "*fp32", "gradient": "*fp32", "winning_token": "*i32",
    **dict.fromkeys(["targets", "target", "seed", "sequences", "positions", "token", "tokens"], "*i64"),
    **dict.fromkeys(["rows", "vocabulary", "tiles", "stride", "hidden_stride", "weight_stride"], "i32"),
    "gradient_stride": "i32", "count": "i64",
    **dict.fromkeys(["logit_scale", "softcap", "temperature", "low", "high", "dual_clip", "kl_coef"], "fp32"),
    **dict.fromkeys(["entropy_coef", "top_k", "top_p", "min_p"], "fp32"),
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")


#: Rows of a batch (or a chunk of tokens): fewest, as many as one tile has, more.
DRAWS, SCORES = (8, 64, 256), (8, 8192)


def head_case(capability: int, rows: int, draws: bool, described: bool) -> dict[str, Any]:
    tile = head_tile.configuration(rows, torch.bfloat16, capability, draws)
    types = {}
    if described:
        types = {
            "hidden": f"tensordesc<bf16[{tile.BLOCK_N}, {tile.BLOCK_H}]>",
            "weight": f"tensordesc<bf16[{tile.BLOCK_V}, {tile.BLOCK_H}]>",
        }
    constants = {"H": 4096, "SOFTCAP": False, "WIDEN": False, "bias": None, "temperatures": None}
    return {**constants, "DESCRIBED": described, **tile._asdict(), "types": types}


def cases(capability: int) -> list[tuple[str, Any, dict[str, Any]]]:
    block, warps = policy_rows.block_of(151936)
    row = {"temperatures": None, "SOFTCAP": False, "BLOCK": block, "num_warps": warps, "enable_fp_fusion": False}
    policy = {**row, "given_logprob": None, "given_entropy": None, "reference": None, "KIND": 3, "KL": 0}
    draw = {**row, "TOP_K": False, "TOP_P": False, "MIN_P": False}
    filtered = {**row, **sample_rows.filtered_block(151936), "TOP_K": True, "TOP_P": True, "MIN_P": True}
    found: list[tuple[str, Any, dict[str, Any]]] = []
    described = capability >= 90
    heads = [("linear_logprobs", rows, False, described) for rows in SCORES]
    heads += [("linear_sample", rows, True, described) for rows in DRAWS]
    if described:  # where rows are not aligned to 16 bytes
        heads.append(("linear_logprobs, pointers", 8192, False, False))
    tiles = set()
    for name, rows, draws, bulk in heads:
        constants = head_case(capability, rows, draws, bulk)
        kernel = linear_sample.draw_tiles if draws else linear_logprobs.score_tiles
        if (draws, bulk, constants["BLOCK_N"]) not in tiles:
            tiles.add((draws, bulk, constants["BLOCK_N"]))
            found.append((f"{name}, {rows} rows", kernel, constants))
    outputs = {"sampling_logprobs": None, "kept_mass": None}
    no_draw = {"winners": None, "winning_token": None, "token": None, **outputs}
    found.append(("merge_tiles", head_tile.merge_tiles, {**no_draw, **head_tile.MERGE}))
    found.append(("policy_rows", policy_rows.visit_rows, policy))
    found.append(("sample_rows", sample_rows.draw_rows, draw))
    found.append(("sample_rows, filtered", sample_rows.draw_rows, filtered))
    found.append(("scale_gradient", scale_gradient.scale_all, {"BLOCK": scale_gradient.BLOCK}))
    return found


def compiled(kernel: Any, constants: dict[str, Any], capability: int) -> dict[str, Any]:
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
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    ptx, ttgir = binary.asm["ptx"], binary.asm["ttgir"]
    matrix = [name for name in ("wgmma.mma_async", "tcgen05.mma", "mma.sync") if name in ptx]
    counts = {name.lower(): int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL")}  # type: ignore[index]
    return {
        **counts, "shared": binary.metadata.shared, "matrix": matrix, "bulk": ptx.count("cp.async.bulk.tensor"),
        "shapes": sorted(set(re.findall(r"(?:wgmma\S*|mma\.sync\.aligned)\.(m\d+n\d+k\d+)", ptx))),
        "warps": sorted(set(re.findall(r"nvidia_mma<\{.*?warpsPerCTA = (\[[\d, ]+\])", ttgir))),
    }  # fmt: skip


if __name__ == "__main__":
    architecture = int(sys.argv[1])
    only = sys.argv[2] if len(sys.argv) > 2 else ""
    found = [(name, kernel, constants) for name, kernel, constants in cases(architecture) if only in name]
    print(json.dumps({name: compiled(kernel, constants, architecture) for name, kernel, constants in found}))
