# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped,import-not-found"
"""Gumbel noise of (seed, sequence, position, token id): csrc/philox.h and bandit_rft/ops/philox.py, word for word.

    key = seed; counter = (token id / 4, position, sequence id low, sequence id high); word j belongs to token 4k + j
    u = float32(word) * 2^-32 + 2^-33, at most 1 - 2^-24;  g = -log(-log1p(-u))

Nothing exists in memory: words are made in registers, four to a counter. The words are equal on every backend; g is
within a few units in the last place of float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .row_math import log1p


@triton.jit
def random_words(seed, sequence, position, first, ROWS: tl.constexpr, TOKENS: tl.constexpr):
    """uint32 [ROWS, TOKENS]: the words of token ids first ... first + TOKENS - 1 (both multiples of 4).

    seed is a scalar int64; sequence and position are int64 [ROWS].
    """
    quad = (first // 4 + tl.arange(0, TOKENS // 4))[None, :].to(tl.uint32)
    zero = tl.zeros((ROWS, TOKENS // 4), tl.uint32)
    low = (sequence & 0xFFFFFFFF).to(tl.uint32)[:, None]
    high = ((sequence >> 32) & 0xFFFFFFFF).to(tl.uint32)[:, None]
    place = (position & 0xFFFFFFFF).to(tl.uint32)[:, None]
    w0, w1, w2, w3 = tl.philox(seed, zero + quad, zero + place, zero + low, zero + high)
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))


@triton.jit
def gumbel_noise(word):
    """Standard Gumbel noise, float32, of uint32 words."""
    # uint32 -> float32 rounds to nearest; the sum is exact or rounded once.
    u = tl.minimum(word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10, 0.99999994039535522)
    return -tl.log(-log1p(-u))
