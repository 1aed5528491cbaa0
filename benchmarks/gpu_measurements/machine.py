"""A small model of the machine: what each ratio of gpu-check should be, from a few rates and instruction counts.

    time = max(bytes / copy bandwidth, logits x instructions a logit / instruction rate, FLOP / product rate), by stage

A prediction is not a measurement and is never shown as one: it stands in a column of its own, so that the difference
tells what the model (or the kernel) has wrong. The bandwidth and the product rate are replaced by what the limits
section measured; the others are assumptions.
"""

from __future__ import annotations

import math
from typing import NamedTuple


class Machine(NamedTuple):
    copy: float  # bytes a second, read and written together
    product: float  # FLOP a second of a large bfloat16 product
    instructions: float  # lane instructions a second: multiprocessors x 128 lanes x clock x the share that issues
    multiprocessors: int = 132


#: Of the lane instructions that could be issued. Of draws it is what the two GPUs of 2026-11-27 showed.
ISSUED, ISSUED_DRAWING_ROWS, ISSUED_DRAWING = 0.65, 0.58, 0.40
H200 = Machine(4.3e12, 790e12, ISSUED * 132 * 128 * 1.98e9)
#: The H200's multiprocessors and clock; its copy bandwidth scaled by the data sheets' 3.35 / 4.8 TB/s.
H100 = H200._replace(copy=H200.copy * 3.35 / 4.8)

#: Instructions a logit of the row kernels on sm_90, plain scaling, float32 in (policy rows: bfloat16 out, as in the
#: loss): docs/building.md's counts. A draw's are without the exact noise of what may win, by estimate EXACT_NOISE more.
INSTRUCTIONS = {"logprob": 8.8, "policy": 18.8, "sample": 27.5}
EXACT_NOISE = 3
#: Instructions a logit of the fused heads beside their product, on sm_90: docs/building.md's counts of the kernels for
#: 8192 rows (scoring), and for drawing by the rows of a tile.
SCORE, DRAW = 11.8, {16: 63.9, 32: 55.4, 64: 45.8}
#: Bytes a logit: policy rows read float32 and write it (the copy's traffic); in the loss they write bfloat16.
BYTES = {"logprob": 4, "policy": 8, "sample": 4}
CHUNK = 2048  # rows of logits at a time in the loss and, unfused, in scoring
#: Of the shorter of loading and computing, what shows: policy rows wait for their cluster between the two. As measured
#: on the two GPUs (0.4 and 0.75); all of it where a draw follows its product.
SHOWN = {"policy": 0.6}


def machine_of(name: str, limits: dict[str, float]) -> Machine | None:
    """The model of the GPU with this name, with measured limits where there are some; None for an unknown one."""
    found = H200 if "H200" in name else H100 if "H100" in name else None
    if found is None:
        return None
    copy = limits.get("copy GB/s", found.copy / 1e9) * 1e9
    return found._replace(copy=copy, product=limits.get("bfloat16 product TFLOP/s", found.product / 1e12) * 1e12)


def wave_efficiency(tiles: int, multiprocessors: int) -> float:
    """The share of the multiprocessors at work: the last wave of tiles is rarely full."""
    return tiles / (math.ceil(tiles / multiprocessors) * multiprocessors)


def products(machine: Machine, n: int, h: int, v: int, count: int) -> float:
    return count * 2 * n * h * v / machine.product


def rows(machine: Machine, kind: str, count: float, bytes_a_logit: float | None = None) -> float:
    """Seconds of a row kernel over `count` logits."""
    traffic = count * (bytes_a_logit or BYTES[kind]) / machine.copy
    instructions = INSTRUCTIONS[kind] + (EXACT_NOISE if kind == "sample" else 0)
    issued = machine.instructions * (ISSUED_DRAWING_ROWS / ISSUED if kind == "sample" else 1)
    computing = count * instructions / issued
    return max(traffic, computing) + SHOWN.get(kind, 0.0) * min(traffic, computing)


def row_share(machine: Machine, kind: str) -> float:
    """The share of the copy bandwidth that rows reach."""
    return BYTES[kind] / machine.copy / rows(machine, kind, 1)


def loss_seconds(machine: Machine, n: int, h: int, v: int) -> float:
    """linear_policy_loss, both ways: waves, rows (4 bytes read, 2 written), dW read again for each chunk."""
    seconds = rows(machine, "policy", n * v, 6) + (math.ceil(n / CHUNK) - 1) * 2 * h * v / machine.copy
    for first in range(0, n, CHUNK):
        some = min(CHUNK, n - first)
        of_hidden = wave_efficiency(math.ceil(some / 128) * math.ceil(h / 256), machine.multiprocessors)
        seconds += products(machine, some, h, v, 2) + products(machine, some, h, v, 1) / of_hidden
    return seconds


def loss_ratio(machine: Machine, n: int, h: int, v: int) -> float:
    """linear_policy_loss / its three bare products."""
    return loss_seconds(machine, n, h, v) / products(machine, n, h, v, 3)


def sparse_ratio(machine: Machine, n: int, h: int, v: int) -> float:
    """linear_policy_loss with 70% of the rows at advantage 0 / with none; the rows left are gathered (2 bytes each)."""
    left = round(0.3 * n)
    return (loss_seconds(machine, left, h, v) + left * h * 4 / machine.copy) / loss_seconds(machine, n, h, v)


def loss_memory(machine: Machine, n: int, h: int, v: int) -> float:
    """GiB beyond inputs and gradients: one chunk of float32 logits, over which their bfloat16 gradient is written."""
    return min(CHUNK, n) * v * 4 / 2**30


def logprobs_ratio(machine: Machine, n: int, h: int, v: int) -> float:
    """linear_logprobs, forward / the bare product: the softmax of the fused head after it, none of it hidden."""
    bare = products(machine, n, h, v, 1)
    return (bare + n * v * SCORE / machine.instructions) / bare


def sample_ratio(machine: Machine, b: int, h: int, v: int) -> float:
    """linear_sample / the bare product: softmax and noise, of a batch padded to whole tiles, behind the product.

    With nothing hidden it predicts the draws of 2026-11-27 within a quarter, at H = 896 up to 64 rows within 6%.
    """
    bare = max(products(machine, b, h, v, 1), 2 * h * v / machine.copy)
    tile = next((rows for rows in DRAW if b <= rows), 64)
    computing = math.ceil(b / tile) * tile * v * DRAW[tile] / (machine.instructions * ISSUED_DRAWING / ISSUED)
    return (bare + computing) / bare


#: (N, H, V) of the loss and of scoring; (B, H, V) of sampling: the shapes that have bars.
LOSSES = [(8192, 4096, 151936), (16384, 2048, 151936), (8192, 896, 151936), (8192, 4096, 128256)]
DRAWS = [(b, h, 151936) for h in (896, 4096, 2048) for b in (1, 8, 32, 64, 256)]


def table(machine: Machine) -> list[str]:
    """Markdown: every bar, what is predicted for it, and an empty place for what gpu-check will measure."""
    lines = ["| case | shape | bar | predicted | measured |", "|---|---|---|---|---|"]
    for kind in INSTRUCTIONS:
        lines.append(f"| {kind} rows, share of the copy bandwidth | | >= 0.85 | {row_share(machine, kind):.2f} | |")
    for name, bar, shapes, ratio in (
        ("`linear_policy_loss` / its three bare products", 1.15, LOSSES, loss_ratio),
        ("`linear_logprobs`, forward / the bare product", 1.15, LOSSES, logprobs_ratio),
        ("`linear_sample` / the bare product", 1.10, DRAWS, sample_ratio),
    ):
        for a, h, v in shapes:
            lines.append(f"| {name} | {a} x {h} x {v} | <= {bar:.2f} | {ratio(machine, a, h, v):.2f} | |")
    for n, h, v in LOSSES:
        memory, sparse = loss_memory(machine, n, h, v), sparse_ratio(machine, n, h, v)
        lines.append(f"| memory beyond inputs and gradients, GiB | {n} x {h} x {v} | <= 1.25 | {memory:.2f} | |")
        lines.append(f"| 70% of rows at advantage 0 / none | {n} x {h} x {v} | <= 0.36 | {sparse:.2f} | |")
    return lines


if __name__ == "__main__":
    print("\n".join(table(H200)))
