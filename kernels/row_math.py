# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped,import-not-found"
"""The mathematics of one row of logits on the device: csrc/row_math.h, a tile at a time.

    z = softcap * tanh(logit_scale * x / softcap) / temperature
    state (m, s, t): m = max z, s = sum exp(z - m), t = sum (z - m) exp(z - m)
    logp = (z_target - m) - log s;  entropy = log s - t / s;  dL/dlogp = token_coefficient(...)

Triton's language has no log1p, expm1 and tanh that also run in its interpreter, so they are here; each is within four
units in the last place of float32.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from .enumerations import KLKind, ObjectiveKind

#: Stands for -inf as a maximum: -inf - (-inf) would be NaN.
LOWEST = tl.constexpr(-3.4028234663852886e38)
IMPORTANCE, PPO, CISPO, IMPORTANCE_MASK = (
    tl.constexpr(int(kind))
    for kind in (ObjectiveKind.importance, ObjectiveKind.ppo, ObjectiveKind.cispo, ObjectiveKind.importance_mask)
)
NO_KL, K2, K3 = (tl.constexpr(int(kind)) for kind in (KLKind.none, KLKind.k2, KLKind.k3))


@triton.jit
def log1p(x):
    """log(1 + x): the rounding of 1 + x is undone by the quotient (Goldberg 1991, theorem 4)."""
    w = 1.0 + x
    return tl.where(w == 1.0, x, tl.log(w) * (x / tl.where(w == 1.0, 1.0, w - 1.0)))


@triton.jit
def fast_exp(x, FAST: tl.constexpr):
    """exp(x) as tl.exp has it, but below 2^-126 it is 0: two instructions instead of five.

    Without FAST (Triton's interpreter has no special function unit) the ordinary exponential.
    """
    if FAST:
        return libdevice.fast_expf(x)
    return tl.exp(x)


@triton.jit
def expm1(x):
    """exp(x) - 1: whatever rounding exp(x) has, log takes back (Higham, Accuracy and Stability, 1.14.1)."""
    w = tl.exp(x)
    usable = (w != 1.0) & (w > 1e-30) & (w < 1e30)
    v = tl.where(usable, w, 2.0)
    return tl.where(usable, (v - 1.0) * (x / tl.log(v)), tl.where(w == 1.0, x, w - 1.0))


@triton.jit
def tanh(x):
    """A polynomial fitted to tanh where 1 - 2 / (exp(2x) + 1) would cancel, that formula elsewhere."""
    a = tl.abs(x)
    q = x * x
    p = (((-0.00661575 * q + 0.02131274) * q - 0.05391007) * q + 0.13333118) * q - 0.33333332
    large = 1.0 - 2.0 / (tl.exp(2.0 * a) + 1.0)
    return tl.where(a < 0.55, x + x * (q * p), tl.where(x < 0, -large, large))


@triton.jit
def scaled(x, logit_scale, softcap, temperature, SOFTCAP: tl.constexpr):
    """z of raw logits x, in float32. `softcap` is read if SOFTCAP.

    Multiplies by rounded reciprocals: an exact division of every logit would cost more than all the rest.
    """
    if SOFTCAP:
        x = softcap * tanh(x * (logit_scale * tl.div_rn(1.0, softcap)))
        return x * tl.div_rn(1.0, temperature)
    return x * (logit_scale * tl.div_rn(1.0, temperature))


@triton.jit
def weighted(d, p):
    """d * p where p counts: a logit of -inf has weight 0, and -inf * 0 must not become NaN."""
    return tl.where(p > 0, d * p, 0.0)


@triton.jit
def token_coefficient(
    logp, ratio, advantage, weight, reference, low, high, dual_clip, kl_coef, KIND: tl.constexpr, KL: tl.constexpr
):
    """dL/dlogp of one token. KIND and KL: their numbers in enumerations.py."""
    factor = tl.full((), 1.0, tl.float32)
    if KIND == IMPORTANCE:
        factor = tl.where(ratio > high, high, ratio)  # not minimum: a NaN must stay one
    elif KIND == PPO:
        clipped = ((advantage < 0) & (ratio < low)) | ((advantage > 0) & (ratio > high))
        clipped = clipped | ((advantage < 0) & (dual_clip > 0) & (ratio > dual_clip))
        factor = tl.where(clipped, 0.0, ratio)
    elif KIND == CISPO:
        factor = tl.where(ratio < low, low, tl.where(ratio > high, high, ratio))
    elif KIND == IMPORTANCE_MASK:
        factor = tl.where((ratio < low) | (ratio > high), 0.0, ratio)
    # An advantage of exactly zero says nothing, whatever the ratio: 0 * inf must not become NaN.
    c = tl.where((advantage == 0) | (factor == 0), 0.0, -advantage * weight * factor)
    if KL != NO_KL:
        d = logp - reference
        slope = tl.full((), 1.0, tl.float32)
        if KL == K2:
            slope = d
        elif KL == K3:
            slope = -expm1(-d)
        c += kl_coef * weight * slope
    return c
