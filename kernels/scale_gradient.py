# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped,import-not-found"
"""gradient *= factor, in place, where the factor is a number on the device that almost always is 1.

Gradients computed in the forward pass are scaled by what comes back to the loss. The host cannot see that it is 1
without waiting, and a multiplication would read and write a [V, H] for nothing: every block looks for itself and
returns at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import on_device_of

BLOCK, PROGRAMS = 2048, 1024


@triton.jit
def scale_all(gradient, factor, count, BLOCK: tl.constexpr):
    """gradient [count] *= factor [1], rounded once; persistent programs."""
    by = tl.load(factor).to(tl.float32)
    if by != 1.0:  # a NaN is not 1
        start = tl.program_id(0).to(tl.int64) * BLOCK
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        for first in range(start, count, step):
            at = first + tl.arange(0, BLOCK)
            value = tl.load(gradient + at, mask=at < count, other=0.0).to(tl.float32)
            tl.store(gradient + at, (value * by).to(gradient.dtype.element_ty), mask=at < count)


def scale_(gradient: Tensor, factor: Tensor) -> Tensor:
    """gradient (float32, bfloat16 or float16, contiguous) times factor (0-d, on its device), in place; returned.

    Autograd's version counter is told, as of any operation in place: a second backward pass over it is refused.
    """
    if not gradient.is_contiguous():
        return gradient.mul_(factor.to(gradient.dtype))
    if gradient.numel():
        with on_device_of(gradient):
            programs = min(PROGRAMS, triton.cdiv(gradient.numel(), BLOCK))
            scale_all[(programs,)](gradient, factor.reshape(1), gradient.numel(), BLOCK=BLOCK)
    torch.autograd.graph.increment_version(gradient)
    return gradient
