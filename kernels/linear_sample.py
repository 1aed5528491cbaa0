# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped,import-not-found"
"""The LM head fused with the draw: token, log-probability and entropy from one pass over the weight.

    z = softcap(logit_scale (hidden . weight^T + bias)) / temperature
    token = argmax_j z_j + g_j;  logp = z_token - logsumexp(z);  entropy = logsumexp(z) - sum_j p_j z_j

Neither logits nor noise are ever in memory; of each row 24 bytes a tile of 128 logits are. The vocabulary is cut into
tiles whatever the batch, so that one row fills the GPU; a second kernel merges the tiles. The tile and the merge are
those of linear_logprobs.py: sampling and scoring a hidden state give the same log-probability, bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import on_device_of, rows_contiguous
from .head_tile import (
    capability_of,
    configuration,
    launch_merge,
    logits_tile,
    operands,
    piece_of,
    place,
    programs_for,
    row_chunks,
    store_state,
)
from .philox import approximate_noise, gumbel_noise, words_of
from .row_math import scaled

#: How far `approximate_noise` may be from `gumbel_noise` (see there), with the roundings of adding either to a logit of
#: size a: MARGIN + 2^-22 a. Two perturbed logits further apart than twice that are in the order of the exact ones.
MARGIN = tl.constexpr(2.0**-15)


@triton.jit
def quarters(z):
    """Rows 4k, 4k + 1, 4k + 2 and 4k + 3 of z [v, n], [v / 4, n] each: the tokens whose words one counter gives."""
    z = tl.permute(tl.reshape(z, (z.shape[0] // 4, 2, 2, z.shape[1])), (0, 3, 1, 2))
    even, odd = tl.split(z)
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def better_of(best, which, value, number):
    """The better of two perturbed logits and whose it is; the first on a tie."""
    return tl.maximum(best, value), tl.where(value > best, number, which)


@triton.jit
def exact_best(z0, z1, z2, z3, w0, w1, w2, w3):
    """(best perturbed logit, its token within the tile) of each column; the lowest token on a tie."""
    best = z0 + gumbel_noise(w0)
    which = tl.zeros_like(w0).to(tl.int32)
    best, which = better_of(best, which, z1 + gumbel_noise(w1), 1)
    best, which = better_of(best, which, z2 + gumbel_noise(w2), 2)
    best, which = better_of(best, which, z3 + gumbel_noise(w3), 3)
    value, quad = tl.max(best, 0, return_indices=True, return_indices_tie_break_left=True)
    here = tl.arange(0, z0.shape[0])[:, None] == quad[None, :]
    return value, 4 * quad + tl.sum(tl.where(here, which, 0), 0)


@triton.jit
def draw_from_tile(z, seed, sequence, position, first, FAST: tl.constexpr):
    """(perturbed logit, logit, token within the tile) of the best token in each column of z [BLOCK_V, BLOCK_N].

    Approximate noise finds the winner, whose perturbed logit alone is computed exactly. Where another one comes within
    the margin (a column in 16,000 or so), the whole tile is computed exactly: the draw is the exact one, always.
    `first`, a multiple of 4, is the tile's first token.
    """
    z0, z1, z2, z3 = quarters(z)
    quad = first // 4 + tl.arange(0, z0.shape[0])
    w0, w1, w2, w3 = words_of(seed, sequence[None, :], position[None, :], quad[:, None])
    a0 = z0 + approximate_noise(w0, FAST)
    a1 = z1 + approximate_noise(w1, FAST)
    a2 = z2 + approximate_noise(w2, FAST)
    a3 = z3 + approximate_noise(w3, FAST)
    best = a0
    which = tl.zeros_like(w0).to(tl.int32)
    best, which = better_of(best, which, a1, 1)
    best, which = better_of(best, which, a2, 2)
    best, which = better_of(best, which, a3, 3)
    value, index = tl.max(best, 0, return_indices=True, return_indices_tie_break_left=True)
    near = (value - 2.0 * (MARGIN + 2.0**-22 * tl.abs(value)))[None, :]
    close = (a0 >= near).to(tl.int32) + (a1 >= near).to(tl.int32) + (a2 >= near).to(tl.int32)
    rivals = tl.sum(close + (a3 >= near).to(tl.int32), 0)
    here = tl.arange(0, z0.shape[0])[:, None] == index[None, :]
    token = 4 * index + tl.sum(tl.where(here, which, 0), 0)
    if tl.max(rivals, 0) > 1:
        _, token = exact_best(z0, z1, z2, z3, w0, w1, w2, w3)
    z_best = tl.sum(tl.where(tl.arange(0, z.shape[0])[:, None] == token[None, :], z, 0.0), 0)
    v0, v1, v2, v3 = words_of(seed, sequence, position, first // 4 + token // 4)
    last = token % 4
    word = tl.where(last < 2, tl.where(last == 0, v0, v1), tl.where(last == 2, v2, v3))
    return z_best + gumbel_noise(word), z_best, token


@triton.jit(do_not_specialize=["rows", "vocabulary"])
def draw_tiles(
    hidden, weight, bias, seed, sequences, positions, temperatures, states, winners, winning_token, rows, vocabulary,
    hidden_stride, weight_stride, logit_scale, softcap, temperature,
    H: tl.constexpr, SOFTCAP: tl.constexpr, DESCRIBED: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """States [3, tiles, rows] of every tile, and its winner: perturbed logit and logit [2, tiles, rows], token."""
    tiles = tl.cdiv(vocabulary, BLOCK_V)
    number = tl.load(seed)
    for index in tl.range(tl.program_id(0), tl.cdiv(rows, BLOCK_N) * tiles, tl.num_programs(0), flatten=True):
        row_block, tile = place(index, rows, vocabulary, BLOCK_N, BLOCK_V)
        x = logits_tile(
            hidden, weight, bias, row_block * BLOCK_N, tile * BLOCK_V, rows, vocabulary, hidden_stride, weight_stride,
            H, DESCRIBED, WIDEN, BLOCK_V, BLOCK_N, BLOCK_H,
        )  # fmt: skip
        column = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        pieces: tl.constexpr = (BLOCK_N + 15) // 16
        width: tl.constexpr = BLOCK_N // pieces
        for piece in tl.static_range(pieces):
            row = row_block.to(tl.int64) * BLOCK_N + piece * width + tl.arange(0, width)
            inside = row < rows
            divisor = temperature
            if temperatures is not None:
                divisor = tl.load(temperatures + row, mask=inside, other=1.0)[None, :]
            z = scaled(piece_of(x, piece, pieces), logit_scale, softcap, divisor, SOFTCAP)
            z = tl.where((column < vocabulary)[:, None], z, -float("inf"))
            store_state(z, states, tile, tiles, row, rows)
            sequence = tl.load(sequences + row, mask=inside, other=0)
            position = tl.load(positions + row, mask=inside, other=0)
            best, z_best, token = draw_from_tile(z, number, sequence, position, tile * BLOCK_V, not WIDEN)
            at = tile.to(tl.int64) * rows + row
            tl.store(winners + at, best, mask=inside)
            tl.store(winners + tiles.to(tl.int64) * rows + at, z_best, mask=inside)
            tl.store(winning_token + at, tile * BLOCK_V + token, mask=inside)


def linear_sample(
    hidden: Tensor,
    weight: Tensor,
    *,
    seed: Tensor,
    sequence_ids: Tensor,
    positions: Tensor,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    workspace: int = 1 << 30,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(tokens int64, logprobs, sampling_logprobs, entropy, kept_mass float32), [B] each, drawn from the whole softmax.

    hidden [B, H] and weight [V, H] of one dtype, V < 2^31; seed 0-d int64; sequence_ids and positions [B] int64; other
    arguments as `bandit_rft.linear_sample`, checked there. Waits for nothing and can be captured in a CUDA graph.
    """
    rows, vocabulary = len(hidden), len(weight)
    hidden, weight, device = rows_contiguous(hidden), rows_contiguous(weight), hidden.device
    tokens = torch.empty(rows, dtype=torch.int64, device=device)
    logprobs, sampling_logprobs, entropy, kept_mass = torch.empty((4, rows), dtype=torch.float32, device=device)
    temperatures = temperature.contiguous() if isinstance(temperature, Tensor) else None
    sequence_ids, positions = sequence_ids.contiguous(), positions.contiguous()
    bias = None if bias is None else bias.contiguous()
    capability = capability_of(hidden)
    tiles = triton.cdiv(vocabulary, configuration(rows, hidden.dtype, capability).BLOCK_V)
    chunks = row_chunks(rows, tiles, 24, workspace)
    with on_device_of(hidden):
        for start in chunks:
            part = slice(start, min(start + chunks.step, rows))
            h = hidden[part]
            states = torch.empty((3, tiles, len(h)), dtype=torch.float32, device=device)
            winners = torch.empty((2, tiles, len(h)), dtype=torch.float32, device=device)
            winning_token = torch.empty((tiles, len(h)), dtype=torch.int32, device=device)
            tile = configuration(len(h), hidden.dtype, capability, draws=True)
            programs = programs_for(triton.cdiv(len(h), tile.BLOCK_N) * tiles, tile, h)
            hiddens, weights, described = operands(h, weight, tile, capability)
            draw_tiles[(programs,)](
                hiddens, weights, bias, seed, sequence_ids[part], positions[part],
                None if temperatures is None else temperatures[part], states, winners, winning_token, len(h),
                vocabulary, h.stride(0), weight.stride(0), logit_scale, softcap or 0.0,
                1.0 if temperatures is not None else temperature, weight.shape[1], softcap is not None, described,
                not h.is_cuda, **tile._asdict(),
            )  # fmt: skip
            launch_merge(
                states, vocabulary, logprobs[part], entropy[part], winners=winners, winning_token=winning_token,
                token=tokens[part], sampling_logprobs=sampling_logprobs[part], kept_mass=kept_mass[part],
            )  # fmt: skip
    return tokens, logprobs, sampling_logprobs, entropy, kept_mass
