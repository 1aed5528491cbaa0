# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped,import-not-found"
"""What the two fused heads share: the tile of logits, its softmax state, how states merge, and how big tiles are.

    tile[n, v] = sum_h hidden[n, h] weight[v, h] + bias[v], in float32; h ascending in one accumulator
    state of a tile = (m, s, t) of each row n;  states merge 512 tiles at a time, tiles ascending (row_math.py)

How many columns a tile has, which instruction multiplies and in which order sums are taken depends on the dtype and the
architecture, never on how many rows there are: one hidden state gets the same bits alone (a decoding step) and among
thousands (scoring a batch). Of a row of logits only states exist in memory: 12 bytes a tile, 1-2% of float32 logits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .row_math import LOWEST, weighted


class Tile(NamedTuple):
    """BLOCK_V logits of each of BLOCK_N rows, BLOCK_H of the hidden size at a time; and how Triton compiles it."""

    BLOCK_N: int
    BLOCK_V: int
    BLOCK_H: int
    num_warps: int
    num_stages: int
    #: Whether a * b + c becomes one instruction would be decided for each kernel anew, and change bits between them.
    enable_fp_fusion: bool = False


def configuration(rows: int, dtype: torch.dtype, capability: int) -> Tile:
    """The tile for this many rows on sm_80, sm_90 or sm_100; all but BLOCK_N and the stages depend on the dtype and the
    architecture alone.

    64 rows are the least that wgmma (sm_90) and tcgen05 (sm_100) take; few rows are padded to that, which costs nothing
    where reading the weight is what takes the time. Stages fill the shared memory (164 KiB a multiprocessor on sm_80,
    228 KiB from sm_90 on) with loads in flight.
    """
    if dtype == torch.float32:  # exact products on the ordinary arithmetic units
        return Tile(32, 64, 32, 4, 3)
    if capability < 90:
        return Tile(64, 128, 64, 4, 3) if rows <= 64 else Tile(128, 128, 64, 8, 3)
    return Tile(64, 128, 64, 4, 4) if rows <= 64 else Tile(128, 128, 64, 8, 4)


def capability_of(tensor: Tensor) -> int:
    """90 for sm_90; in the interpreter, which has no architecture, as on sm_90."""
    if tensor.device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor


@triton.jit
def place(rows, vocabulary, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr):
    """(block of rows, block of the vocabulary) of this program.

    2048 rows at a time walk through the vocabulary together: their hidden states stay in the L2 cache and every tile of
    the weight is read once for all of them.
    """
    row_blocks = tl.cdiv(rows, BLOCK_N)
    together = min(row_blocks, 2048 // BLOCK_N)
    tiles = tl.cdiv(vocabulary, BLOCK_V)
    program = tl.program_id(0).to(tl.int64)
    group = program // (together * tiles)
    inside = program % (together * tiles)
    size = min(row_blocks - group * together, together)
    return group * together + inside % size, inside // size


@triton.jit
def logits_tile(
    hidden, weight, bias, row, column, rows, vocabulary, hidden_stride, weight_stride,
    H: tl.constexpr, WIDEN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Raw logits float32 [BLOCK_N, BLOCK_V] of row [BLOCK_N] and column [BLOCK_V], both int64.

    Rows past the end are not read (a decoding step may have one row of 64). WIDEN makes float32 of the operands:
    Triton's interpreter multiplies bfloat16 as the integers that encode it (the products are the same).
    """
    h = tl.arange(0, BLOCK_H)
    hiddens = hidden + row[:, None] * hidden_stride + h[None, :]
    weights = weight + column[None, :] * weight_stride + h[:, None]
    row_exists = (row < rows)[:, None]
    column_exists = (column < vocabulary)[None, :]
    tile = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for start in range(0, H, BLOCK_H):
        if H % BLOCK_H == 0:
            x = tl.load(hiddens, mask=row_exists, other=0.0)
            w = tl.load(weights, mask=column_exists, other=0.0)
        else:
            x = tl.load(hiddens, mask=row_exists & (h < H - start)[None, :], other=0.0)
            w = tl.load(weights, mask=column_exists & (h < H - start)[:, None], other=0.0)
        if WIDEN:
            x = x.to(tl.float32)
            w = w.to(tl.float32)
        tile = tl.dot(x, w, tile, input_precision="ieee")
        hiddens += BLOCK_H
        weights += BLOCK_H
    if bias is not None:
        tile += tl.load(bias + column, mask=column < vocabulary, other=0.0).to(tl.float32)[None, :]
    return tile


@triton.jit
def store_state(z, states, tile, tiles, row, rows):
    """The state of z [BLOCK_N, BLOCK_V] (-inf past the end) into states [3, tiles, rows]."""
    m = tl.maximum(tl.max(z, 1), LOWEST)
    d = z - m[:, None]
    p = tl.exp(d)
    at = states + tile * rows + row
    inside = row < rows
    tl.store(at, m, mask=inside)
    tl.store(at + tiles.to(tl.int64) * rows, tl.sum(p, 1), mask=inside)
    tl.store(at + 2 * tiles.to(tl.int64) * rows, tl.sum(weighted(d, p), 1), mask=inside)


@triton.jit(do_not_specialize=["tiles", "rows"])
def merge_tiles(
    states, chosen_logit, winners, winning_token, token, logprobs, entropy, tiles, rows,
    BLOCK_TILES: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Merge the states [3, tiles, rows] of each row into its log-probability and entropy.

    The chosen logit is read from chosen_logit [rows], or, where there are winners [2, tiles, rows] (the best perturbed
    logit of each tile, and its logit) and winning_token [tiles, rows], it is that of the best tile (the lowest on a
    tie), whose token is written to token [rows].
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    plane = tiles.to(tl.int64) * rows
    m = tl.full((BLOCK_N,), LOWEST, tl.float32)
    s = tl.zeros((BLOCK_N,), tl.float32)
    t = tl.zeros((BLOCK_N,), tl.float32)
    best = tl.full((BLOCK_N,), -float("inf"), tl.float32)
    best_tile = tl.zeros((BLOCK_N,), tl.int64)
    for start in range(0, tiles, BLOCK_TILES):
        tile = start + tl.arange(0, BLOCK_TILES)
        mask = (tile < tiles)[:, None] & (row < rows)[None, :]
        at = tile.to(tl.int64)[:, None] * rows + row[None, :]
        ms = tl.load(states + at, mask=mask, other=LOWEST)
        ss = tl.load(states + plane + at, mask=mask, other=0.0)
        ts = tl.load(states + 2 * plane + at, mask=mask, other=0.0)
        top = tl.maximum(m, tl.max(ms, 0))
        d = ms - top[None, :]
        w = tl.exp(d)
        old = m - top
        # A part whose sum is 0 (only logits of -inf) has no weight, however far its maximum is; a NaN stays one.
        t = tl.where(s == 0, 0.0, (t + old * s) * tl.exp(old)) + tl.sum(tl.where(ss == 0, 0.0, (ts + d * ss) * w), 0)
        s = tl.where(s == 0, 0.0, s * tl.exp(old)) + tl.sum(tl.where(ss == 0, 0.0, ss * w), 0)
        m = top
        if winners is not None:
            perturbed = tl.load(winners + at, mask=mask, other=-float("inf"))
            value, index = tl.max(perturbed, 0, return_indices=True, return_indices_tie_break_left=True)
            best_tile = tl.where(value > best, start + index, best_tile)
            best = tl.maximum(value, best)
    inside = row < rows
    if winners is not None:
        at = best_tile * rows + row
        z = tl.load(winners + plane + at, mask=inside, other=0.0)
        tl.store(token + row, tl.load(winning_token + at, mask=inside, other=0).to(tl.int64), mask=inside)
    else:
        z = tl.load(chosen_logit + row, mask=inside, other=0.0)
    log_s = tl.log(s)
    tl.store(logprobs + row, (z - m) - log_s, mask=inside)
    tl.store(entropy + row, log_s - tl.div_rn(t, s), mask=inside)


MERGE: dict[str, Any] = {"BLOCK_TILES": 512, "BLOCK_N": 8, "num_warps": 8, "enable_fp_fusion": False}


def launch_merge(
    states: Tensor, logprobs: Tensor, entropy: Tensor, *, chosen_logit: Tensor | None = None,
    winners: Tensor | None = None, winning_token: Tensor | None = None, token: Tensor | None = None,
) -> None:  # fmt: skip
    """Called where the states' device is the current one."""
    _, tiles, rows = states.shape
    merge_tiles[(triton.cdiv(rows, MERGE["BLOCK_N"]),)](
        states, chosen_logit, winners, winning_token, token, logprobs, entropy, tiles, rows, **MERGE
    )


def row_chunks(rows: int, vocabulary: int, block_v: int, bytes_a_tile: int, workspace: int) -> range:
    """Starts (and, as its step, the size) of stretches of rows whose states fit the workspace."""
    most = workspace // (triton.cdiv(vocabulary, block_v) * bytes_a_tile)
    return range(0, rows, max(256, most // 256 * 256))
