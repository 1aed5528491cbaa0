"""Compiles every Triton kernel ahead of time for one architecture and prints what came out, as JSON. Needs no GPU.

python tests/triton_compile.py 90
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
from bandit_rft.kernels import head_tile, linear_logprobs, linear_sample, policy_rows, sample_rows
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TYPES = {
    "hidden": "*bf16", "weight": "*bf16", "logits": "*fp32", "gradient": "*fp32", "winning_token": "*i32",
    **dict.fromkeys(["targets", "target", "seed", "sequences", "positions", "token", "tokens"], "*i64"),
    **dict.fromkeys(["rows", "vocabulary", "tiles", "stride", "hidden_stride", "weight_stride"], "i32"),
    "gradient_stride": "i32",
    **dict.fromkeys(["logit_scale", "softcap", "temperature", "low", "high", "dual_clip", "kl_coef"], "fp32"),
    **dict.fromkeys(["entropy_coef", "top_k", "top_p", "min_p"], "fp32"),
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


def cases(capability: int) -> list[tuple[str, Any, dict[str, Any]]]:
    head = {"H": 4096, "SOFTCAP": False, "WIDEN": False, "bias": None, "temperatures": None}
    block, warps = policy_rows.block_of(151936)
    row = {"temperatures": None, "SOFTCAP": False, "BLOCK": block, "num_warps": warps, "enable_fp_fusion": False}
    policy = {**row, "given_logprob": None, "given_entropy": None, "reference": None, "KIND": 3, "KL": 0}
    draw = {**row, "TOP_K": False, "TOP_P": False, "MIN_P": False}
    filtered = {**row, **sample_rows.filtered_block(151936), "TOP_K": True, "TOP_P": True, "MIN_P": True}
    found: list[tuple[str, Any, dict[str, Any]]] = []
    for rows in (1, 8192):
        tile = head_tile.configuration(rows, torch.bfloat16, capability)._asdict()
        found.append((f"linear_logprobs, {rows} rows", linear_logprobs.score_tiles, {**head, **tile}))
        found.append((f"linear_sample, {rows} rows", linear_sample.draw_tiles, {**head, **tile}))
    no_draw = {"winners": None, "winning_token": None, "token": None}
    found.append(("merge_tiles", head_tile.merge_tiles, {**no_draw, **head_tile.MERGE}))
    found.append(("policy_rows", policy_rows.visit_rows, policy))
    found.append(("sample_rows", sample_rows.draw_rows, draw))
    found.append(("sample_rows, filtered", sample_rows.draw_rows, filtered))
    return found


def compiled(kernel: Any, constants: dict[str, Any], capability: int) -> dict[str, Any]:
    options = {k: v for k, v in constants.items() if k in OPTIONS}
    constants = {k: v for k, v in constants.items() if k not in OPTIONS}
    signature = {n: "constexpr" if n in constants else TYPES.get(n, "*fp32") for n in kernel.arg_names}
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
    ptx = binary.asm["ptx"]
    matrix = [name for name in ("wgmma.mma_async", "tcgen05.mma", "mma.sync") if name in ptx]
    counts = {name.lower(): int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL")}  # type: ignore[index]
    return {**counts, "shared": binary.metadata.shared, "matrix": matrix}


if __name__ == "__main__":
    architecture = int(sys.argv[1])
    print(json.dumps({name: compiled(kernel, c, architecture) for name, kernel, c in cases(architecture)}))
