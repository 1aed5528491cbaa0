# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped,import-not-found"
"""Rows of logits: log-probability and entropy, and dL/dlogits written over the logits.

    logp = z_target - logsumexp(z);  entropy = logsumexp(z) - sum_j p_j z_j
    dz_j = c ([j = target] - p_j) + e p_j (log p_j + entropy),  c = dL/dlogp,  e = -dL/dentropy

No probability is ever in memory. A row is read twice and written once, by one block, the second time backwards: what
was read last is still in the cache, and a 16-bit gradient may lie over the second half of its own logits. float32
throughout; p_target - 1 is formed as expm1(logp), without cancellation. Written in place, so nothing here may be
autotuned: a second trial would read the first one's gradient.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import on_device_of, rows_contiguous
from .row_math import LOWEST, expm1, scaled, token_coefficient, weighted


@triton.jit
def row_state(logits, vocabulary, logit_scale, softcap, temperature, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr):
    """(m, s, t) of the row of raw logits that starts at `logits`."""
    column = tl.arange(0, BLOCK)
    m = tl.full((), LOWEST, tl.float32)
    s = tl.zeros((BLOCK,), tl.float32)
    t = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        inside = column < vocabulary - start
        x = tl.load(logits + start + column, mask=inside, other=0.0).to(tl.float32)
        z = tl.where(inside, scaled(x, logit_scale, softcap, temperature, SOFTCAP), -float("inf"))
        top = tl.maximum(m, tl.max(z, 0))
        d = z - top
        p = tl.exp(d)
        w = tl.exp(m - top)
        # Lanes that only saw -inf have sum 0: m - top is kept finite, so that their product is 0.
        t = (t + tl.maximum(m - top, LOWEST) * s) * w + weighted(d, p)
        s = s * w + p
        m = top
    return m, tl.sum(s, 0), tl.sum(t, 0)


@triton.jit
def visit_rows(
    logits, gradient, targets, temperatures, given_logprob, given_entropy, advantages, weights, behavior, reference,
    logprobs, entropy, vocabulary, stride, gradient_stride, logit_scale, softcap, temperature,
    low, high, dual_clip, kl_coef, entropy_coef,
    KIND: tl.constexpr, KL: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row a program. KIND: -1 only statistics, 0 given dL/dlogp (and dL/dentropy), 1-5 an objective."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    if temperatures is not None:
        temperature = tl.load(temperatures + row)
    target = tl.load(targets + row)
    exists = (target >= 0) & (target < vocabulary)
    x_target = tl.load(logits + tl.where(exists, target, 0)).to(tl.float32)
    m, s, t = row_state(logits, vocabulary, logit_scale, softcap, temperature, SOFTCAP, BLOCK)
    log_s = tl.log(s)
    logp = (scaled(x_target, logit_scale, softcap, temperature, SOFTCAP) - m) - log_s
    logp = tl.where(exists, logp, float("nan"))
    row_entropy = log_s - tl.div_rn(t, s)
    tl.store(logprobs + row, logp)
    tl.store(entropy + row, row_entropy)
    if KIND >= 0:
        e = tl.full((), 0.0, tl.float32)
        if KIND == 0:
            c = tl.load(given_logprob + row)
            if given_entropy is not None:
                e = -tl.load(given_entropy + row)
        else:
            weight = tl.load(weights + row)
            ratio = tl.full((), 1.0, tl.float32)
            if behavior is not None:
                ratio = tl.exp(logp - tl.load(behavior + row))
            of_reference = tl.full((), 0.0, tl.float32)
            if reference is not None:
                of_reference = tl.load(reference + row)
            c = token_coefficient(
                logp, ratio, tl.load(advantages + row), weight, of_reference, low, high, dual_clip, kl_coef, KIND, KL
            )
            e = entropy_coef * weight
        at_target = -c * expm1(logp)
        chain = tl.div_rn(logit_scale, temperature)
        gradient += row * gradient_stride
        column = tl.arange(0, BLOCK)
        blocks = tl.cdiv(vocabulary, BLOCK)
        for done in range(0, blocks):
            start = (blocks - 1 - done) * BLOCK
            inside = column < vocabulary - start
            x = tl.load(logits + start + column, mask=inside, other=0.0).to(tl.float32)
            z = scaled(x, logit_scale, softcap, temperature, SOFTCAP)
            every_logp = (z - m) - log_s
            p = tl.exp(every_logp)
            dz = tl.where(start + column == target, at_target, -c * p)
            if (KIND == 0 and given_entropy is not None) or KIND > 0:
                dz += e * weighted(every_logp + row_entropy, p)
            if SOFTCAP:
                capped = z * tl.div_rn(temperature, softcap)
                dz *= 1.0 - capped * capped
            if gradient.dtype != logits.dtype:  # perhaps over the row's second half: all threads have read their part
                tl.debug_barrier()
            tl.store(gradient + start + column, (dz * chain).to(gradient.dtype.element_ty), mask=inside)


def block_of(vocabulary: int) -> tuple[int, int]:
    """(logits at a time, warps): 16 logits a thread keep enough loads in flight; a short row needs few threads."""
    block = min(8192, max(128, triton.next_power_of_2(vocabulary)))
    return block, max(1, block // 512)


def logprob_rows(
    logits: Tensor, targets: Tensor, temperature: float, temperatures: Tensor | None, softcap: float | None,
    logit_scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(logprobs [N], entropy [N]) float32 of targets [N] int64 in logits [N, V]; a target outside [0, V) gets NaN."""
    return _visit(logits, logits, targets, temperature, temperatures, softcap, logit_scale, kind=-1)


def gradient_rows(
    logits: Tensor, targets: Tensor, temperature: float, temperatures: Tensor | None, softcap: float | None,
    logit_scale: float, grad_logprobs: Tensor, grad_entropy: Tensor | None, out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `logprob_rows`, and dL/dlogits is written over the logits, or into `out` [N, V] of any floating dtype.

    It is computed from dL/dlogprob and dL/dentropy, float32 [N].
    """
    return _visit(
        logits, logits if out is None else out, targets, temperature, temperatures, softcap, logit_scale, kind=0,
        given=(grad_logprobs, grad_entropy),
    )  # fmt: skip


def policy_rows(
    logits: Tensor, targets: Tensor, temperature: float, temperatures: Tensor | None, softcap: float | None,
    logit_scale: float, kind: int, low: float, high: float, dual_clip: float, kl: int, kl_coef: float,
    entropy_coef: float, advantages: Tensor, weights: Tensor, behavior: Tensor | None, reference: Tensor | None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `gradient_rows`, with the coefficients c and e of an objective (bandit_rft/ops/objective.py).

    kind and kl are the numbers of enumerations.py; low and high bound the ratio; advantages, weights, behavior and
    reference are float32 [N].
    """
    return _visit(
        logits, logits if out is None else out, targets, temperature, temperatures, softcap, logit_scale, kind=kind,
        inputs=(advantages, weights, behavior, reference), bounds=(low, high, dual_clip, kl_coef, entropy_coef), kl=kl,
    )  # fmt: skip


def _visit(
    logits: Tensor, gradient: Tensor, targets: Tensor, temperature: float, temperatures: Tensor | None,
    softcap: float | None, logit_scale: float, *, kind: int, kl: int = 0,
    given: tuple[Tensor | None, ...] = (None, None), inputs: tuple[Tensor | None, ...] = (None, None, None, None),
    bounds: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0, 0.0),
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rows, vocabulary = logits.shape
    out = torch.empty((2, rows), dtype=torch.float32, device=logits.device)
    if rows:
        block, warps = block_of(vocabulary)
        vectors = [None if v is None else v.contiguous() for v in (targets, temperatures, *given, *inputs)]
        logits, written = rows_contiguous(logits), rows_contiguous(gradient)
        with on_device_of(logits):
            visit_rows[(rows,)](
                logits, written, *vectors, out[0], out[1], vocabulary, logits.stride(0), written.stride(0),
                logit_scale, softcap or 0.0, temperature, *bounds,
                KIND=kind, KL=kl, SOFTCAP=softcap is not None, BLOCK=block, num_warps=warps, enable_fp_fusion=False,
            )  # fmt: skip
        if kind >= 0 and written is not gradient:
            gradient.copy_(written)
    return out[0], out[1]
