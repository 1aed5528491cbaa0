# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped,import-not-found"
"""The LM head fused with the draw: token, log-probability and entropy from one pass over the weight.

    z = softcap(logit_scale (hidden . weight^T + bias)) / temperature
    token = argmax_j z_j + g_j;  logp = z_token - logsumexp(z);  entropy = logsumexp(z) - sum_j p_j z_j

Neither logits nor noise are ever in memory; of each row 24 bytes for 128 logits are. The vocabulary is cut into tiles
whatever the batch, so that one row fills the GPU; a second kernel merges the tiles. The tile and the merge are those of
linear_logprobs.py: sampling and scoring a hidden state give the same log-probability, bit for bit.

Why a second kernel, and not the first one's last block: between two kernels of a CUDA graph lies about a microsecond,
against 63 (H = 896) or 290 (H = 4096) that reading the weight takes. But V / 128 tiles of 24 bytes are 1.8 MB for 64
rows, which one block alone would read for some ten microseconds, where sixteen share them; and the counter that
finds the last block, left dirty by an aborted launch, would make later draws silently wrong.
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
    persistent_draws,
    piece_of,
    place,
    programs_for,
    row_chunks,
    state_width,
    store_state,
    without_past_end,
)
from .philox import gumbel_noise, nearly_perturbed, words_of
from .row_math import scaled

#: How far `nearly_perturbed` may be off (see there), with the roundings of adding the exact noise to a logit of size a:
#: MARGIN + 2^-22 a. Two perturbed logits further apart than twice that are in the order of the exact ones.
MARGIN = tl.constexpr(2.0**-14)


@triton.jit
def quarters(z):
    """Columns 4k, 4k + 1, 4k + 2 and 4k + 3 of z [n, v], [n, v / 4] each: the tokens whose words one counter gives."""
    z = tl.reshape(z, (z.shape[0], z.shape[1] // 4, 2, 2))
    even, odd = tl.split(z)
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def perturbed_by(z, word, APPROXIMATE: tl.constexpr, FAST: tl.constexpr):
    """z plus its Gumbel noise, as it is, or within MARGIN of it but for a constant."""
    if APPROXIMATE:
        return nearly_perturbed(z, word, FAST)
    return z + gumbel_noise(word)


@triton.jit
def offer(best, second, z_best, which, z, word, number, APPROXIMATE: tl.constexpr, FAST: tl.constexpr):
    """One more token in each place: the best and second-best perturbed logit so far, the best's logit and number."""
    perturbed = perturbed_by(z, word, APPROXIMATE, FAST)
    better = perturbed > best
    second = tl.maximum(second, tl.minimum(best, perturbed))
    return tl.maximum(best, perturbed), second, tl.where(better, z, z_best), tl.where(better, number, which)


@triton.jit
def best_of_tile(
    z, seed, sequence, position, first, APPROXIMATE: tl.constexpr, FAST: tl.constexpr, PIECE: tl.constexpr
):
    """(logit, token within the tile, how many come near it) of the best perturbed logit in each row of z [n, v].

    Of equal ones the lowest token. `first`, a multiple of 4, is the tile's first token.
    """
    none = tl.full((z.shape[0], PIECE // 4), -float("inf"), tl.float32)
    best = none
    second = none
    z_best = none
    which = tl.zeros((z.shape[0], PIECE // 4), tl.int32)
    for piece in tl.static_range(z.shape[1] // PIECE):
        z0, z1, z2, z3 = quarters(piece_of(z, piece, z.shape[1] // PIECE))
        quad = first // 4 + piece * (PIECE // 4) + tl.arange(0, PIECE // 4)
        w0, w1, w2, w3 = words_of(seed, sequence[:, None], position[:, None], quad[None, :])
        best, second, z_best, which = offer(best, second, z_best, which, z0, w0, piece * PIECE, APPROXIMATE, FAST)
        best, second, z_best, which = offer(best, second, z_best, which, z1, w1, piece * PIECE + 1, APPROXIMATE, FAST)
        best, second, z_best, which = offer(best, second, z_best, which, z2, w2, piece * PIECE + 2, APPROXIMATE, FAST)
        best, second, z_best, which = offer(best, second, z_best, which, z3, w3, piece * PIECE + 3, APPROXIMATE, FAST)
    value = tl.max(best, 1)
    at_best = best == value[:, None]
    token = tl.min(tl.where(at_best, which + 4 * tl.arange(0, PIECE // 4)[None, :], z.shape[1] - 1), 1)
    chosen = at_best & (which + 4 * tl.arange(0, PIECE // 4)[None, :] == token[:, None])
    near = (value - 2.0 * (MARGIN + 2.0**-22 * tl.abs(value)))[:, None]
    rivals = tl.sum((best >= near).to(tl.int32) + (second >= near).to(tl.int32), 1)
    return tl.max(tl.where(chosen, z_best, -float("inf")), 1), token, rivals


@triton.jit
def draw_from_tile(z, exists, seed, sequence, position, first, FAST: tl.constexpr, PIECE: tl.constexpr):
    """(perturbed logit, logit, token within the tile) of the best token in each row of z [n, v] that exists [n].

    Approximate noise finds the winner, whose perturbed logit alone is computed exactly. Where another one comes within
    the margin (a row in 8,000 or so), the whole tile is computed exactly: the draw is the exact one, always.
    """
    z_best, token, rivals = best_of_tile(z, seed, sequence, position, first, True, FAST, PIECE)
    if tl.max(tl.where(exists, rivals, 0), 0) > 1:
        z_best, token, rivals = best_of_tile(z, seed, sequence, position, first, False, FAST, PIECE)
    w0, w1, w2, w3 = words_of(seed, sequence, position, first // 4 + token // 4)
    last = token % 4
    word = tl.where(last < 2, tl.where(last == 0, w0, w1), tl.where(last == 2, w2, w3))
    return z_best + gumbel_noise(word), z_best, token


@triton.jit(do_not_specialize=["rows", "vocabulary"])
def draw_tiles(
    hidden, weight, bias, seed, sequences, positions, temperatures, states, winners, winning_token, rows, vocabulary,
    hidden_stride, weight_stride, logit_scale, softcap, temperature,
    H: tl.constexpr, SOFTCAP: tl.constexpr, DESCRIBED: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """States [3, tiles, rows] of every tile, and its winner: perturbed logit and logit [2, tiles, rows], token."""
    tiles = tl.cdiv(vocabulary, BLOCK_V)
    number = tl.load(seed)
    for index in tl.range(tl.program_id(0), tl.cdiv(rows, BLOCK_N) * tiles, tl.num_programs(0), flatten=True):
        row_block, tile = place(index, rows, vocabulary, BLOCK_N, BLOCK_V)
        x = logits_tile(
            hidden, weight, bias, row_block * BLOCK_N, tile * BLOCK_V, rows, vocabulary, hidden_stride, weight_stride,
            H, DESCRIBED, WIDEN, BLOCK_N, BLOCK_V, BLOCK_H,
        )  # fmt: skip
        row = row_block.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = row < rows
        divisor = temperature
        if temperatures is not None:
            divisor = tl.load(temperatures + row, mask=inside, other=1.0)[:, None]
        z = scaled(x, logit_scale, softcap, divisor, SOFTCAP)
        z = without_past_end(z, tile * BLOCK_V, vocabulary)
        store_state(z, states, tile, tiles, row, rows, not WIDEN)
        sequence = tl.load(sequences + row, mask=inside, other=0)
        position = tl.load(positions + row, mask=inside, other=0)
        best, z_best, token = draw_from_tile(z, inside, number, sequence, position, tile * BLOCK_V, not WIDEN, 32)
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
    tiles = triton.cdiv(vocabulary, state_width(hidden.dtype))
    chunks = row_chunks(rows, tiles, 24, workspace)
    with on_device_of(hidden):
        for start in chunks:
            part = slice(start, min(start + chunks.step, rows))
            h = hidden[part]
            states = torch.empty((3, tiles, len(h)), dtype=torch.float32, device=device)
            winners = torch.empty((2, tiles, len(h)), dtype=torch.float32, device=device)
            winning_token = torch.empty((tiles, len(h)), dtype=torch.int32, device=device)
            tile = configuration(len(h), hidden.dtype, capability, draws=True)
            programs = programs_for(len(h), vocabulary, tile, h, persistent_draws(len(h), tile))
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
