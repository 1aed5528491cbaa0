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
from .head_tile import capability_of, configuration, launch_merge, logits_tile, place, row_chunks, store_state
from .philox import gumbel_noise, random_words
from .row_math import scaled


@triton.jit
def halves(z):
    """The left and the right half of z [n, v]."""
    return tl.split(tl.permute(tl.reshape(z, (z.shape[0], 2, z.shape[1] // 2)), (0, 2, 1)))


@triton.jit(do_not_specialize=["rows", "vocabulary"])
def draw_tiles(
    hidden, weight, bias, seed, sequences, positions, temperatures, states, winners, winning_token, rows, vocabulary,
    hidden_stride, weight_stride, logit_scale, softcap, temperature,
    H: tl.constexpr, SOFTCAP: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """States [3, tiles, rows] of every tile, and its winner: perturbed logit and logit [2, tiles, rows], token."""
    row_block, tile = place(rows, vocabulary, BLOCK_N, BLOCK_V)
    row = row_block * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    x = logits_tile(
        hidden, weight, bias, row, column, rows, vocabulary, hidden_stride, weight_stride,
        H, WIDEN, BLOCK_N, BLOCK_V, BLOCK_H,
    )  # fmt: skip
    if temperatures is not None:
        temperature = tl.load(temperatures + row, mask=row < rows, other=1.0)[:, None]
    z = scaled(x, logit_scale, softcap, temperature, SOFTCAP)
    z = tl.where((column < vocabulary)[None, :], z, -float("inf"))
    tiles = tl.cdiv(vocabulary, BLOCK_V)
    store_state(z, states, tile, tiles, row, rows)
    inside = row < rows
    sequence = tl.load(sequences + row, mask=inside, other=0)
    position = tl.load(positions + row, mask=inside, other=0)
    number = tl.load(seed)
    best = tl.full((BLOCK_N,), -float("inf"), tl.float32)
    z_best = best
    token = tile * BLOCK_V + tl.zeros((BLOCK_N,), tl.int64)
    # A quarter at a time: the noise of the whole tile would not fit the registers beside the tile.
    left, right = halves(z)
    for quarter in tl.static_range(4):
        first, second = halves(left if quarter < 2 else right)
        part = first if quarter % 2 == 0 else second
        start = tile * BLOCK_V + quarter * (BLOCK_V // 4)
        noise = gumbel_noise(random_words(number, sequence, position, start, BLOCK_N, BLOCK_V // 4))
        value, index = tl.max(part + noise, 1, return_indices=True, return_indices_tie_break_left=True)
        z_here = tl.sum(tl.where(tl.arange(0, BLOCK_V // 4)[None, :] == index[:, None], part, 0.0), 1)
        better = value > best
        token = tl.where(better, start + index, token)
        z_best = tl.where(better, z_here, z_best)
        best = tl.where(better, value, best)
    at = tile * rows + row
    tl.store(winners + at, best, mask=inside)
    tl.store(winners + tiles.to(tl.int64) * rows + at, z_best, mask=inside)
    tl.store(winning_token + at, token.to(tl.int32), mask=inside)


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
) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens [B] int64, logprobs [B] float32, entropy [B] float32) drawn from the whole softmax of each row.

    hidden [B, H] and weight [V, H] of one dtype, V < 2^31; seed 0-d int64; sequence_ids and positions [B] int64; other
    arguments as `bandit_rft.linear_sample`, checked there. Waits for nothing and can be captured in a CUDA graph.
    """
    rows, vocabulary = len(hidden), len(weight)
    hidden, weight, device = rows_contiguous(hidden), rows_contiguous(weight), hidden.device
    tokens = torch.empty(rows, dtype=torch.int64, device=device)
    out = torch.empty((2, rows), dtype=torch.float32, device=device)
    temperatures = temperature.contiguous() if isinstance(temperature, Tensor) else None
    sequence_ids, positions = sequence_ids.contiguous(), positions.contiguous()
    capability = capability_of(hidden)
    block_v = configuration(rows, hidden.dtype, capability).BLOCK_V
    chunks = row_chunks(rows, vocabulary, block_v, 24, workspace)
    with on_device_of(hidden):
        for start in chunks:
            part = slice(start, min(start + chunks.step, rows))
            h, tiles = hidden[part], triton.cdiv(vocabulary, block_v)
            states = torch.empty((3, tiles, len(h)), dtype=torch.float32, device=device)
            winners = torch.empty((2, tiles, len(h)), dtype=torch.float32, device=device)
            winning_token = torch.empty((tiles, len(h)), dtype=torch.int32, device=device)
            config = configuration(len(h), hidden.dtype, capability)
            draw_tiles[(triton.cdiv(len(h), config.BLOCK_N) * tiles,)](
                h, weight, None if bias is None else bias.contiguous(), seed, sequence_ids[part], positions[part],
                None if temperatures is None else temperatures[part], states, winners, winning_token, len(h),
                vocabulary,
                h.stride(0), weight.stride(0), logit_scale, softcap or 0.0,
                1.0 if temperatures is not None else temperature, weight.shape[1], softcap is not None, not h.is_cuda,
                **config._asdict(),
            )  # fmt: skip
            launch_merge(
                states, out[0, part], out[1, part],
                winners=winners, winning_token=winning_token, token=tokens[part],
            )  # fmt: skip
    return tokens, out[0], out[1]
