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
from triton.language.extra import libdevice

from .row_math import log1p


@triton.jit
def low_word(x):
    """The lower 32 bits of x, uint32."""
    return (x & 0xFFFFFFFF).to(tl.uint32)


@triton.jit
def words_of(seed, sequence, position, quad):
    """The words of token ids 4 quad ... 4 quad + 3, uint32 each.

    seed is a scalar int64; sequence and position are int64, quad an integer; all broadcast against one another.

    Here and not tl.philox, whose products are two instructions each, one for either half.
    """
    c0 = quad.to(tl.uint32)
    c1 = low_word(position)
    c2 = low_word(sequence)
    c3 = low_word(sequence >> 32)
    k0 = low_word(seed)
    k1 = low_word(seed >> 32)
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = low_word(p1)
        c3 = low_word(p0)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def random_words(seed, sequence, position, first, ROWS: tl.constexpr, TOKENS: tl.constexpr):
    """uint32 [ROWS, TOKENS]: the words of token ids first ... first + TOKENS - 1 (both multiples of 4).

    seed is a scalar int64; sequence and position are int64 [ROWS].
    """
    quad = first // 4 + tl.arange(0, TOKENS // 4)
    w0, w1, w2, w3 = words_of(seed, sequence[:, None], position[:, None], quad[None, :])
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))


@triton.jit
def fast_log2(x, FAST: tl.constexpr):
    """log2 x by the special function unit: within 2^-22 for x in [0.5, 2], within 2^-22 of itself elsewhere.

    Without FAST (Triton's interpreter has no such unit) the ordinary logarithm.
    """
    if FAST:
        return libdevice.fast_log2f(x)
    return tl.log2(x)


@triton.jit
def nearly_perturbed(z, word, FAST: tl.constexpr):
    """z plus Gumbel noise plus log log 2, within 2^-14 + 2^-22 |z| of that, for a fourth of the instructions.

    E = -log1p(-u), g = -log E; here E / log 2, so g comes out as -log 2 log2(E / log 2) = g + log log 2: what is the
    same for all tokens decides nothing. Small u, where 1 - u would round u away: E = u + u^2/2, off by u^2/3 of itself,
    at most 2.1e-5 below u = 1/128. Larger u: -log2(1 - u), off by 2^-22 + 2^-25 / log 2 in E / log 2 >= 1/88.4 (the
    rest of E's range by 2^-22 of itself): 2.5e-5 of itself. The last logarithm, of E / log 2 in [2^-32.5, 24], is off
    by at most 2^-22 x 22.6 = 5.4e-6, roundings add 1.4e-6, and `gumbel_noise` itself is within 4 units in the last
    place of 22.9, 7.6e-6, and its sum with z is rounded, 1.4e-6: in all less than 4.2e-5 < 2^-14.
    """
    u = tl.minimum(tl.fma(word.to(tl.float32), 2.3283064365386963e-10, 1.1641532182693481e-10), 0.99999994039535522)
    series = u * tl.fma(u, 0.7213475, 1.442695)  # 1 / log 2 times 1 and 1/2
    return tl.fma(fast_log2(tl.where(u < 0.0078125, series, -fast_log2(1.0 - u, FAST)), FAST), -0.6931472, z)


@triton.jit
def gumbel_noise(word):
    """Standard Gumbel noise, float32, of uint32 words."""
    # uint32 -> float32 rounds to nearest; the sum is exact or rounded once.
    u = tl.minimum(word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10, 0.99999994039535522)
    return -tl.log(-log1p(-u))
