# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped,import-not-found"
"""Rows of logits: one draw each, after top-k, top-p and min-p, with everything known of it.

    token = argmax over kept j of z_j + g_j;  logp = z_token - logsumexp(z);  entropy = logsumexp(z) - sum_j p_j z_j
    kept = the first tokens by logit, ties by the lower id: all with key(z) > key and the first `ties` with key(z) = key

The row is never sorted and neither noise nor probabilities are in memory. One block has a row: it reads it once without
filters; top-k and top-p each find their last key four bits at a time, in 8 readings of 15 comparisons a logit, from the
cache where it holds the row. float32; top-p's cumulative probability may differ from the definition's (float64) by
rounding, which matters where it lies within 1e-6 of top_p.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import on_device_of, rows_contiguous
from .philox import gumbel_noise, random_words
from .policy_rows import block_of, row_state
from .row_math import scaled


@triton.jit
def key_of(z):
    """uint32 keys in the order of float32 z (the least for NaN and -inf); both zeros have one key."""
    bits = (z + 0.0).to(tl.uint32, bitcast=True)
    key = tl.where((bits >> 31) != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    return tl.where(z == z, key, 0)


@triton.jit
def load_scaled(logits, at, vocabulary, logit_scale, softcap, temperature, SOFTCAP: tl.constexpr):
    """z of the row's logits `at`; -inf past the end."""
    x = tl.load(logits + at, mask=at < vocabulary, other=0.0).to(tl.float32)
    return tl.where(at < vocabulary, scaled(x, logit_scale, softcap, temperature, SOFTCAP), -float("inf"))


@triton.jit
def last_key(
    logits, vocabulary, logit_scale, softcap, temperature, m, goal, above_key, ties, tie_weight,
    MASS: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(key, weight above it): the greatest key such that logits with that key or a greater one weigh `goal` or more.

    A logit weighs 1, or with MASS exp(z - m). With MASS only what top-k left counts: logits above `above_key`, and
    `ties` of those at it (`tie_weight` each).
    """
    key = tl.full((), 0, tl.uint32)
    above = tl.full((), 0.0, tl.float32)
    digit = tl.arange(0, 16)
    column = tl.arange(0, BLOCK)
    shift = tl.full((), 28, tl.uint32)
    for _step in range(0, 8):
        candidates = key + (digit.to(tl.uint32) << shift)
        weight = tl.zeros((16,), tl.float32)
        for start in range(0, vocabulary, BLOCK):
            z = load_scaled(logits, start + column, vocabulary, logit_scale, softcap, temperature, SOFTCAP)
            k = key_of(z)
            counts = start + column < vocabulary
            w = tl.where(counts, 1.0, 0.0)
            if MASS:
                w = tl.where(counts & (k > above_key), tl.exp(z - m), 0.0)
            weight += tl.sum(tl.where(k[None, :] >= candidates[:, None], w[None, :], 0.0), 1)
        if MASS:
            weight += tl.where(candidates <= above_key, ties * tie_weight, 0.0)
        # Weights fall as candidates rise; digit 0 always reaches the goal.
        chosen = tl.max(tl.where((weight >= goal) | (digit == 0), digit, 0), 0)
        above = tl.where(chosen < 15, tl.sum(tl.where(digit == chosen + 1, weight, 0.0), 0), above)
        key = key + (chosen.to(tl.uint32) << shift)
        shift -= 4
    return key, above


@triton.jit
def value_of(key):
    """The float32 whose key this is."""
    return tl.where((key >> 31) != 0, key ^ 0x80000000, key ^ 0xFFFFFFFF).to(tl.float32, bitcast=True)


@triton.jit
def draw_rows(
    logits, seed, sequences, positions, temperatures, tokens, logprobs, sampling_logprobs, entropy, kept_mass,
    vocabulary, stride, logit_scale, softcap, temperature, top_k, top_p, min_p,
    TOP_K: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row a program."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    if temperatures is not None:
        temperature = tl.load(temperatures + row)
    m, s, t = row_state(logits, vocabulary, logit_scale, softcap, temperature, SOFTCAP, BLOCK)

    key = tl.full((), 0, tl.uint32)
    ties = tl.full((), 0.0, tl.float32)  # how many of the tokens at `key` are kept
    if TOP_K:
        zero = tl.full((), 0, tl.uint32)
        key, above = last_key(
            logits, vocabulary, logit_scale, softcap, temperature, m, top_k, zero, 0.0, 0.0, False, SOFTCAP, BLOCK
        )
        ties = top_k - above
    if TOP_P:
        total = s
        tie_weight = tl.exp(value_of(key) - m)
        tie_weight = tl.where(tie_weight == tie_weight, tie_weight, 0.0)
        if TOP_K:
            total = tl.full((), 0.0, tl.float32)
            lanes = tl.zeros((BLOCK,), tl.float32)
            for start in range(0, vocabulary, BLOCK):
                z = load_scaled(
                    logits, start + tl.arange(0, BLOCK), vocabulary, logit_scale, softcap, temperature, SOFTCAP
                )
                lanes += tl.where(key_of(z) > key, tl.exp(z - m), 0.0)
            total = tl.sum(lanes, 0) + ties * tie_weight
        goal = top_p * total
        k_key = key
        k_ties = ties
        key, above = last_key(
            logits, vocabulary, logit_scale, softcap, temperature, m, goal, k_key, k_ties, tie_weight,
            True, SOFTCAP, BLOCK,
        )  # fmt: skip
        # A tie is kept as long as what comes before it weighs less than the goal.
        wanted = tl.maximum(tl.ceil(tl.div_rn(goal - above, tl.exp(value_of(key) - m))), 1.0)
        ties = tl.where(wanted == wanted, wanted, 1.0)
        if TOP_K:
            ties = tl.where(key == k_key, tl.minimum(ties, k_ties), ties)

    sequence = tl.load(sequences + row)
    position = tl.load(positions + row)
    one = tl.zeros((1,), tl.int64)
    number = tl.load(seed)
    column = tl.arange(0, BLOCK)
    best = tl.full((), -float("inf"), tl.float32)
    token = tl.full((), 0, tl.int64)
    z_token = tl.full((), -float("inf"), tl.float32)
    seen = tl.full((), 0.0, tl.float32)
    kept_sum = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        z = load_scaled(logits, start + column, vocabulary, logit_scale, softcap, temperature, SOFTCAP)
        if TOP_K or TOP_P:
            k = key_of(z)
            tie = tl.where((k == key) & (start + column < vocabulary), 1.0, 0.0)
            before = seen + tl.cumsum(tie, 0) - tie
            z = tl.where((k > key) | ((k == key) & (before < ties)), z, -float("inf"))
            seen += tl.sum(tie, 0)
        if MIN_P:
            z = tl.where(tl.exp(z - m) >= min_p, z, -float("inf"))
        kept_sum += tl.exp(z - m)
        word = random_words(number, one + sequence, one + position, start, 1, BLOCK)
        perturbed = z + tl.reshape(gumbel_noise(word), (BLOCK,))
        value, index = tl.max(perturbed, 0, return_indices=True, return_indices_tie_break_left=True)
        z_here = tl.sum(tl.where(column == index, z, 0.0), 0)
        better = value > best
        token = tl.where(better, start + index, token)
        z_token = tl.where(better, z_here, z_token)
        best = tl.where(better, value, best)
    log_s = tl.log(s)
    kept = tl.sum(kept_sum, 0)
    logp = (z_token - m) - log_s
    tl.store(tokens + row, token)
    tl.store(logprobs + row, logp)
    tl.store(entropy + row, log_s - tl.div_rn(t, s))
    if TOP_K or TOP_P or MIN_P:
        tl.store(sampling_logprobs + row, (z_token - m) - tl.log(kept))
        tl.store(kept_mass + row, tl.div_rn(kept, s))
    else:
        tl.store(sampling_logprobs + row, logp)
        tl.store(kept_mass + row, 1.0)


def filtered_block(vocabulary: int) -> dict[str, Any]:
    """The block where top-k or top-p search the row: 16 candidates are compared with each of its logits at once.

    Eight logits a thread: with four, sm_80 runs out of registers.
    """
    block = min(2048, block_of(vocabulary)[0])
    return {"BLOCK": block, "num_warps": max(1, block // 256)}


def sample_rows(
    logits: Tensor, temperature: float, temperatures: Tensor | None, softcap: float | None, logit_scale: float,
    seed: Tensor, sequence_ids: Tensor, positions: Tensor, top_k: int, top_p: float, min_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(tokens int64, logprobs, sampling_logprobs, entropy, kept_mass float32), [B] each, of logits [B, V].

    seed is 0-d int64, sequence_ids and positions are int64 [B]; filters as `bandit_rft.sample_from_logits`.
    """
    rows, vocabulary = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    out = torch.empty((4, rows), dtype=torch.float32, device=logits.device)
    if rows:
        block, warps = block_of(vocabulary)
        shape: dict[str, Any] = {"BLOCK": block, "num_warps": warps}
        if 0 < top_k < vocabulary or top_p < 1:
            shape = filtered_block(vocabulary)
        logits = rows_contiguous(logits)
        with on_device_of(logits):
            draw_rows[(rows,)](
                logits, seed, sequence_ids.contiguous(), positions.contiguous(),
                None if temperatures is None else temperatures.contiguous(), tokens, *out, vocabulary,
                logits.stride(0), logit_scale, softcap or 0.0, temperature, float(min(top_k, vocabulary)), top_p, min_p,
                TOP_K=0 < top_k < vocabulary, TOP_P=top_p < 1, MIN_P=min_p > 0, SOFTCAP=softcap is not None,
                enable_fp_fusion=False, **shape,
            )  # fmt: skip
    return tokens, out[0], out[1], out[2], out[3]
