# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped,import-not-found"
"""The LM head fused with the online softmax: log-probability and entropy of given tokens.

    z = softcap(logit_scale (hidden . weight^T + bias)) / temperature
    logp = z_target - logsumexp(z);  entropy = logsumexp(z) - sum_j p_j z_j

No logit is ever in memory; of each row 12 bytes for 128 logits are (head_tile.py). Products of bfloat16 and
float16 accumulate in float32 (float32 products are exact, without TF32), and so does everything after them: the error
is that of a float32 softmax over unrounded logits. 2NHV FLOP.
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
    state_width,
    store_state,
    without_past_end,
)
from .row_math import scaled


@triton.jit(do_not_specialize=["rows", "vocabulary"])
def score_tiles(
    hidden, weight, bias, targets, temperatures, states, target_logit, rows, vocabulary, hidden_stride, weight_stride,
    logit_scale, softcap, temperature, H: tl.constexpr, SOFTCAP: tl.constexpr, DESCRIBED: tl.constexpr,
    WIDEN: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """States [3, tiles, rows] of every WIDTH logits, and the target's logit [rows] from where it is."""
    tiles = tl.cdiv(vocabulary, WIDTH)
    blocks = tl.cdiv(rows, BLOCK_N) * tl.cdiv(vocabulary, BLOCK_V)
    for index in tl.range(tl.program_id(0), blocks, tl.num_programs(0), flatten=True):
        row_block, tile = place(index, rows, vocabulary, BLOCK_N, BLOCK_V)
        x = logits_tile(
            hidden, weight, bias, row_block * BLOCK_N, tile * BLOCK_V, rows, vocabulary, hidden_stride, weight_stride,
            H, DESCRIBED, WIDEN, BLOCK_N, BLOCK_V, BLOCK_H,
        )  # fmt: skip
        row = row_block.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        divisor = temperature
        if temperatures is not None:
            divisor = tl.load(temperatures + row, mask=row < rows, other=1.0)[:, None]
        target = tl.load(targets + row, mask=row < rows, other=-1)
        for part in tl.static_range(BLOCK_V // WIDTH):
            first = tile * BLOCK_V + part * WIDTH
            column = first + tl.arange(0, WIDTH)
            z = scaled(piece_of(x, part, BLOCK_V // WIDTH), logit_scale, softcap, divisor, SOFTCAP)
            z = without_past_end(z, first, vocabulary)
            # Whoever holds the target's logit gives it; few tiles have any row's.
            here = (target >= first) & (target < tl.minimum(first + WIDTH, vocabulary))
            if tl.max(here.to(tl.int32), 0) > 0:
                chosen = tl.where(column[None, :] == target[:, None], z, -float("inf"))
                tl.store(target_logit + row, tl.max(chosen, 1), mask=here)
            store_state(z, states, first // WIDTH, tiles, row, rows, not WIDEN)


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    workspace: int = 1 << 30,
) -> tuple[Tensor, Tensor]:
    """(logprobs [N], entropy [N]) float32 of targets [N] int64; hidden [N, H] and weight [V, H] of one dtype.

    Arguments are those of `bandit_rft.linear_logprobs`, checked there; `workspace` bounds the states, in bytes. A
    target outside [0, V) gets NaN. Launches two kernels for each stretch of rows on the current stream and waits for
    nothing.
    """
    rows, vocabulary = len(hidden), len(weight)
    hidden, weight, targets = rows_contiguous(hidden), rows_contiguous(weight), targets.contiguous()
    out = torch.empty((2, rows), dtype=torch.float32, device=hidden.device)
    chosen = torch.empty(rows, dtype=torch.float32, device=hidden.device)
    temperatures = temperature.contiguous() if isinstance(temperature, Tensor) else None
    bias = None if bias is None else bias.contiguous()
    capability = capability_of(hidden)
    width = state_width(hidden.dtype)
    tiles = triton.cdiv(vocabulary, width)
    chunks = row_chunks(rows, tiles, 12, workspace)
    with on_device_of(hidden):
        for start in chunks:
            part = slice(start, min(start + chunks.step, rows))
            h = hidden[part]
            states = torch.empty((3, tiles, len(h)), dtype=torch.float32, device=hidden.device)
            tile = configuration(len(h), hidden.dtype, capability)
            programs = programs_for(len(h), vocabulary, tile, h)
            hiddens, weights, described = operands(h, weight, tile, capability)
            score_tiles[(programs,)](
                hiddens, weights, bias, targets[part], None if temperatures is None else temperatures[part], states,
                chosen[part], len(h), vocabulary, h.stride(0), weight.stride(0), logit_scale, softcap or 0.0,
                1.0 if temperatures is not None else temperature, weight.shape[1], softcap is not None, described,
                not h.is_cuda, width, **tile._asdict(),
            )  # fmt: skip
            launch_merge(
                states, vocabulary, out[0, part], out[1, part], chosen_logit=chosen[part], targets=targets[part]
            )
    return out[0], out[1]
