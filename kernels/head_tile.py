# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped,import-not-found"
"""What the two fused heads share: the tile of logits, its softmax state, how states merge, and which kernel serves.

    tile[n, v] = sum_h hidden[n, h] weight[v, h] + bias[v], in float32; h ascending in one accumulator
    state of 128 logits (64 in float32) = (m, s, t) of each row n;  states merge number by number, then 1,024 at once

Rows lie along the product's M, the vocabulary along N: there a thread has 32 of 128 logits of a row, the other 96 are
its three neighbours', so a row is reduced in registers and by two shuffles, without a barrier. (The other way round, 64
threads in 8 warps share a row, and reducing takes more instructions than all the rest.) Few rows are padded to 16, 32
or 64, whose softmax and noise the multiprocessor computes while other programs load the weight. Programs of many rows
are persistent: each computes many tiles, loading the next while it reduces the last. In which order sums are taken does
not depend on the tile: halves of a row's logits are added to one another, element by element, down to 16. One hidden
state gets the same bits alone (a decoding step) and among thousands (scoring a batch). Of a row of logits only states
exist in memory: 12 bytes each, 1-2% of float32 logits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .row_math import LOWEST, fast_exp

REGISTERS = 65536  # of a multiprocessor
INTERPRETED_PROGRAMS = 3  # fewer than tiles, so that the interpreter also goes around the loop


class Tile(NamedTuple):
    """BLOCK_V logits of each of BLOCK_N rows, BLOCK_H of the hidden size at a time; and how Triton compiles it."""

    BLOCK_N: int
    BLOCK_V: int
    BLOCK_H: int
    num_warps: int
    num_stages: int
    #: Registers of a thread at most: what is above is spilled, and more programs share a multiprocessor.
    maxnreg: int | None = None
    #: Whether a * b + c becomes one instruction would be decided for each kernel anew, and change bits between them.
    enable_fp_fusion: bool = False


#: What draws on sm_90: rows up to which, the tile, and whether programs of one block of rows are persistent.
DRAWING = [
    (16, Tile(16, 128, 128, 4, 3, 128), False),
    (32, Tile(32, 128, 128, 4, 2, 168), True),
    (1 << 31, Tile(64, 128, 64, 4, 4), False),
]


def state_width(dtype: torch.dtype) -> int:
    """Logits of a row that have a state of their own, for scoring and drawing alike."""
    return 64 if dtype == torch.float32 else 128


def configuration(rows: int, dtype: torch.dtype, capability: int, draws: bool = False) -> Tile:
    """Which kernel serves: the tile for this many rows on sm_80, sm_90 or sm_100, for scoring or for drawing.

    The vendor's product with the CUDA row kernel might score about as fast (nobody measured it), but sums in an order
    of its own for every shape; these two give a drawn token the same bits when it is scored.

    Few rows: reading an entry of the weight, 2 H bytes, takes H / 2100 ns at 4.2 TB/s: 426 ps where H = 896. Softmax
    and noise of 64 rows, padding included, are 64 x 46 instructions, which at the third of the issue slots that 8 warps
    a multiprocessor fill (measured on an H200) take 270 ps: little of it hides behind the loads. So 16 and 32 rows have
    tiles of their own, with less to pad and three programs a multiprocessor or more. Their products are those of single
    warps (mma), and gave the same bits as a warpgroup's (wgmma) wherever the two were compared. They load 128 of the
    hidden size at a time: 64 took 90 us for a row at H = 896 where 128 takes 88, and 304 against 297 at H = 4096 (the
    bare products: 75 and 296). In the tile of 64, three programs (168 registers, spilled) and 128 of the hidden size
    at a time were slower there than two programs of 4 warps; tiles of 8 warps were no faster on an H100.
    Many rows: a tile of N x V reads (N + V) 2 H bytes for 2 N V H FLOP; 128 x 256 has 85 FLOP a byte from L2, 64 x 128
    has 43. Scoring takes the former. A draw has as much to compute as to multiply, and keeps to two programs side by
    side. On sm_80 and sm_100 larger tiles than 64 x 128 spill.
    Stages fill the shared memory (164 KiB a multiprocessor on sm_80, 228 KiB from sm_90 on) with loads in flight. What
    the compiler makes of each tile stands in docs/building.md.
    """
    if dtype == torch.float32:  # exact products on the ordinary arithmetic units
        return Tile(32, 64, 32, 4, 3)
    if capability < 90:
        return Tile(64, 128, 64, 8, 3)
    if capability >= 100:
        return Tile(64, 128, 64, 8, 4)
    if draws:
        return next(tile for most, tile, _ in DRAWING if rows <= most)
    return Tile(64, 128, 64, 4, 4) if rows <= 64 else Tile(128, 256, 64, 8, 4)


def persistent_draws(rows: int, tile: Tile) -> bool:
    """Whether a draw of so many rows has persistent programs; see `programs_for`."""
    return rows > tile.BLOCK_N or any(persistent and tile is one for _, one, persistent in DRAWING)


def capability_of(tensor: Tensor) -> int:
    """90 for sm_90; in the interpreter, which has no architecture, as on sm_90."""
    if tensor.device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor


def programs_for(rows: int, vocabulary: int, tile: Tile, tensor: Tensor, persistent: bool = True) -> int:
    """Persistent programs: as many as reside on the GPU at once, by their registers (65,536 a multiprocessor).

    Otherwise one a tile: multiprocessors do not read equally fast, and the hardware gives the next tile to whichever is
    ready. On an H200 a draw of 64 rows at H = 896 took 118 us that way and 136 us in persistent programs, which in turn
    were faster in the tile of 32 rows (97 and 103 us) and where several blocks of rows share a tile of the weight (256
    rows: 244 and 264 us).
    """
    tiles: int = triton.cdiv(rows, tile.BLOCK_N) * triton.cdiv(vocabulary, tile.BLOCK_V)
    if not tensor.is_cuda:
        return min(tiles, INTERPRETED_PROGRAMS)
    if not persistent:
        return tiles
    multiprocessors: int = torch.cuda.get_device_properties(tensor.device).multi_processor_count
    return min(tiles, multiprocessors * (REGISTERS // (32 * tile.num_warps * (tile.maxnreg or 256))))


def describable(matrix: Tensor, capability: int) -> bool:
    """Whether a tensor memory accelerator (sm_90 on) can copy tiles of it: 16-bit, rows and start aligned to 16 bytes.

    A matrix of one row, or with rows on top of each other (expanded), has no row stride that counts.
    """
    aligned = matrix.data_ptr() % 16 == 0 and matrix.stride(0) * matrix.element_size() % 16 == 0
    return capability >= 90 and matrix.element_size() == 2 and aligned and matrix.stride(0) >= matrix.shape[1] > 0


def operands(hidden: Tensor, weight: Tensor, tile: Tile, capability: int) -> tuple[Any, Any, bool]:
    """(hidden, weight, whether they are descriptors) as the kernels take them."""
    if len(hidden) == 0 or not (describable(hidden, capability) and describable(weight, capability)):
        return hidden, weight, False
    from triton.tools.tensor_descriptor import TensorDescriptor

    def described(matrix: Tensor, rows: int) -> Any:
        return TensorDescriptor(matrix, list(matrix.shape), [matrix.stride(0), 1], [rows, tile.BLOCK_H])

    return described(hidden, tile.BLOCK_N), described(weight, tile.BLOCK_V), True


@triton.jit
def place(index, rows, vocabulary, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr):
    """(block of rows, tile of the vocabulary) number `index`, int32 both.

    2048 rows at a time walk through the vocabulary together: their hidden states stay in the L2 cache and every tile of
    the weight is read once for all of them.
    """
    row_blocks = tl.cdiv(rows, BLOCK_N)
    together = min(row_blocks, 2048 // BLOCK_N)
    tiles = tl.cdiv(vocabulary, BLOCK_V)
    group = index // (together * tiles)
    inside = index % (together * tiles)
    size = min(row_blocks - group * together, together)
    return group * together + inside % size, inside // size


@triton.jit
def logits_tile(
    hidden, weight, bias, first_row, first_column, rows, vocabulary, hidden_stride, weight_stride,
    H: tl.constexpr, DESCRIBED: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Raw logits float32 [BLOCK_N, BLOCK_V] from row first_row and vocabulary entry first_column on, int32 both.

    DESCRIBED: hidden and weight are tensor descriptors, whose loads are bulk copies and give zeros past the end; else
    pointers. WIDEN makes float32 of the operands: Triton's interpreter multiplies bfloat16 as the integers that encode
    it (the products are the same).
    """
    tile = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    column = first_column + tl.arange(0, BLOCK_V)
    if DESCRIBED:
        for start in range(0, H, BLOCK_H):
            x = hidden.load([first_row, start])
            w = weight.load([first_column, start])
            if WIDEN:
                x = x.to(tl.float32)
                w = w.to(tl.float32)
            tile = tl.dot(x, tl.trans(w), tile, input_precision="ieee")
    else:
        h = tl.arange(0, BLOCK_H)
        row = first_row + tl.arange(0, BLOCK_N)
        hiddens = hidden + row.to(tl.int64)[:, None] * hidden_stride + h[None, :]
        weights = weight + column.to(tl.int64)[None, :] * weight_stride + h[:, None]
        row_exists = (row < rows)[:, None]
        column_exists = (column < vocabulary)[None, :]
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
def halves(z):
    """The left and the right half of z [n, v]: registers change names, nothing moves."""
    return tl.split(tl.permute(tl.reshape(z, (z.shape[0], 2, z.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def piece_of(z, number: tl.constexpr, PIECES: tl.constexpr):
    """Piece `number` of z [n, v] cut into PIECES (1, 2 or 4) of v / PIECES columns each.

    What a reduction keeps beside the tile must fit the registers.
    """
    if PIECES > 1:
        left, right = halves(z)
        z = left if number < PIECES // 2 else right
        if PIECES > 2:
            left, right = halves(z)
            z = left if (number == 0) | (number == 2) else right
    return z


@triton.jit
def largest(z):
    """The maximum of each row of z [n, 128] or [n, 64]; a NaN is passed over."""
    left, right = halves(z)
    z = tl.maximum(left, right)
    if z.shape[1] > 32:
        left, right = halves(z)
        z = tl.maximum(left, right)
    return tl.max(z, 1)


@triton.jit
def relative(z, m, FAST: tl.constexpr):
    """z - m and p = exp(z - m) of z [n, v].

    A logit of -inf has p = 0, and -inf * 0 must not become NaN; a NaN has p = NaN and stays one.
    """
    d = z - m[:, None]
    return tl.maximum(d, LOWEST), fast_exp(d, FAST)


@triton.jit
def added(x):
    """The sum of each row of x [n, 32]: left and right half added, down to one column, wherever threads have them."""
    n: tl.constexpr = x.shape[0]
    x = tl.sum(tl.reshape(x, (n, 2, 16)), 1)
    x = tl.sum(tl.reshape(x, (n, 2, 8)), 1)
    x = tl.sum(tl.reshape(x, (n, 2, 4)), 1)
    x = tl.sum(tl.reshape(x, (n, 2, 2)), 1)
    return tl.sum(x, 1)


@triton.jit
def sums(z, m, FAST: tl.constexpr):
    """sum p and sum (z - m) p of each row of z [n, 128] or [n, 64]: quarters (halves) one after another, then halves.

    Written so that few numbers are alive at a time.
    """
    left, right = halves(z)
    if z.shape[1] == 128:
        left, second = halves(left)
        third, right = halves(right)
        d, s = relative(second, m, FAST)
        t = d * s
        d, p = relative(third, m, FAST)
        s += p
        t = tl.fma(d, p, t)
        d, p = relative(left, m, FAST)
        s += p
        t = tl.fma(d, p, t)
    else:
        d, s = relative(left, m, FAST)
        t = d * s
    d, p = relative(right, m, FAST)
    return added(s + p), added(tl.fma(d, p, t))


@triton.jit
def without_past_end(z, first, vocabulary):
    """z [n, v] of vocabulary entries from `first` on, -inf where there are none: only the last tile is looked at."""
    if vocabulary - first < z.shape[1]:
        z = tl.where((first + tl.arange(0, z.shape[1]) < vocabulary)[None, :], z, -float("inf"))
    return z


@triton.jit
def store_state(z, states, tile, tiles, row, rows, FAST: tl.constexpr):
    """The state of z [n, v] (-inf past the end) into states [3, tiles, rows], if the tile exists; row int64 [n]."""
    m = tl.maximum(largest(z), LOWEST)
    s, t = sums(z, m, FAST)
    plane = tiles.to(tl.int64) * rows
    at = states + tile.to(tl.int64) * rows + row
    inside = row < tl.where(tile < tiles, rows, 0)
    tl.store(at, m, mask=inside)
    tl.store(at + plane, s, mask=inside)
    tl.store(at + 2 * plane, t, mask=inside)


@triton.jit
def moved(m, s, t, top):
    """s and t of a state (m, s, t) for a maximum `top` >= m. exp is 0 long before -1e4, and -inf * 0 would be NaN."""
    d = tl.maximum(m - top, -1e4)
    w = tl.exp(d)
    return s * w, (t + d * s) * w


@triton.jit(do_not_specialize=["vocabulary", "tiles", "rows"])
def merge_tiles(
    states, chosen_logit, targets, winners, winning_token, token, logprobs, entropy, sampling_logprobs, kept_mass,
    vocabulary, tiles, rows,
    BLOCK_TILES: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Merge the states [3, tiles, rows] of each row into its log-probability and entropy.

    The chosen logit is read from chosen_logit [rows] (a target outside the vocabulary has none, and gets NaN), or,
    where there are winners [2, tiles, rows] (the best perturbed logit of each tile, and its logit) and winning_token
    [tiles, rows], it is that of the best tile (the lowest on a tie), whose token is written to token [rows]; nothing
    was filtered, so sampling_logprobs are the log-probabilities and kept_mass is 1.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    plane = tiles.to(tl.int64) * rows
    # A state for each of BLOCK_TILES places, and no reduction in the loop: it would be a barrier a turn.
    m = tl.full((BLOCK_TILES, BLOCK_N), LOWEST, tl.float32)
    s = tl.zeros((BLOCK_TILES, BLOCK_N), tl.float32)
    t = tl.zeros((BLOCK_TILES, BLOCK_N), tl.float32)
    best = tl.full((BLOCK_TILES, BLOCK_N), -float("inf"), tl.float32)
    best_tile = tl.zeros((BLOCK_TILES, BLOCK_N), tl.int32)
    for start in range(0, tiles, BLOCK_TILES):
        tile = start + tl.arange(0, BLOCK_TILES)[:, None]
        mask = (tile < tiles) & (row < rows)[None, :]
        at = tile.to(tl.int64) * rows + row[None, :]
        ms = tl.load(states + at, mask=mask, other=LOWEST)
        ss = tl.load(states + plane + at, mask=mask, other=0.0)
        ts = tl.load(states + 2 * plane + at, mask=mask, other=0.0)
        top = tl.maximum(m, ms)
        s_old, t_old = moved(m, s, t, top)
        s_new, t_new = moved(ms, ss, ts, top)
        m = top
        s = s_old + s_new
        t = t_old + t_new
        if winners is not None:
            perturbed = tl.load(winners + at, mask=mask, other=-float("inf"))
            best_tile = tl.where(perturbed > best, tile, best_tile)
            best = tl.maximum(best, perturbed)
    top = tl.max(m, 0)
    s, t = moved(m, s, t, top[None, :])
    m = top
    s = tl.sum(s, 0)
    t = tl.sum(t, 0)
    inside = row < rows
    if winners is not None:
        winning_tile = tl.min(tl.where(best == tl.max(best, 0)[None, :], best_tile, 2147483647), 0)
        at = winning_tile.to(tl.int64) * rows + row
        z = tl.load(winners + plane + at, mask=inside, other=0.0)
        tl.store(token + row, tl.load(winning_token + at, mask=inside, other=0).to(tl.int64), mask=inside)
    else:
        target = tl.load(targets + row, mask=inside, other=0)
        exists = (target >= 0) & (target < vocabulary)
        z = tl.where(exists, tl.load(chosen_logit + row, mask=inside & exists, other=0.0), float("nan"))
    log_s = tl.log(s)
    logp = (z - m) - log_s
    tl.store(logprobs + row, logp, mask=inside)
    tl.store(entropy + row, log_s - tl.div_rn(t, s), mask=inside)
    if winners is not None:
        tl.store(sampling_logprobs + row, logp, mask=inside)
        tl.store(kept_mass + row, 1.0, mask=inside)


MERGE: dict[str, Any] = {"BLOCK_TILES": 1024, "BLOCK_N": 4, "num_warps": 8, "enable_fp_fusion": False}


def launch_merge(
    states: Tensor, vocabulary: int, logprobs: Tensor, entropy: Tensor, *, chosen_logit: Tensor | None = None,
    targets: Tensor | None = None, winners: Tensor | None = None, winning_token: Tensor | None = None,
    token: Tensor | None = None, sampling_logprobs: Tensor | None = None, kept_mass: Tensor | None = None,
) -> None:  # fmt: skip
    """Called where the states' device is the current one."""
    _, tiles, rows = states.shape
    merge_tiles[(triton.cdiv(rows, MERGE["BLOCK_N"]),)](
        states, chosen_logit, targets, winners, winning_token, token, logprobs, entropy, sampling_logprobs, kept_mass,
        vocabulary, tiles, rows, **MERGE,
    )  # fmt: skip


def row_chunks(rows: int, tiles: int, bytes_a_tile: int, workspace: int) -> range:
    """Starts (and, as its step, the size) of stretches of rows whose states fit the workspace."""
    return range(0, rows, max(256, workspace // (tiles * bytes_a_tile) // 256 * 256))
