"""Gradients that were computed together with a loss: the backward pass hands them on, scaled by what it is asked for.

dL'/dx = (dL'/dL) dL/dx
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import backends, checks
from .reference import computing_dtype
from .registry import once


def with_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, weight_grad: Tensor | None, loss: Tensor, *found: Tensor
) -> Tensor:
    """The loss as a function of hidden, weight and bias, whose gradients were `found` with it, in this order.

    With weight_grad, the weight's gradient lies there already: the loss must then be backpropagated unscaled.
    """
    return _WithGradients.apply(hidden, weight, bias, weight_grad, loss, *found)  # type: ignore[no-untyped-call,no-any-return]


class _WithGradients(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, weight_grad: Tensor | None, loss: Tensor,
        *found: Tensor,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(*found)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (hidden, weight, bias)]
        ctx.weight_grad = weight_grad
        ctx.backend = backends.scaling(hidden.device, computing_dtype(hidden))
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> Any:
        factor = grad_loss if ctx.weight_grad is None else _unit_factor(grad_loss, ctx.weight_grad)
        wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[1] and ctx.weight_grad is None, ctx.needs_input_grad[2]]
        gradients = tuple(
            scaled(gradient, factor, dtype, ctx.backend) if want else None
            for want, gradient, dtype in zip(wanted, ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (*once(gradients), *(None,) * (len(ctx.needs_input_grad) - len(gradients)))


def scaled(gradient: Tensor, grad_loss: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    """gradient * grad_loss without a second [V, H]: in place, and not at all where the factor is seen to be 1.

    On a CPU the host sees it; on a GPU, where it would have to wait, a kernel does that returns at once (`backend`).

    (Autograd's version counter refuses a second backward pass over a gradient that was scaled in place.)
    """
    traced = torch.compiler.is_compiling() or type(grad_loss) is not Tensor or type(gradient) is not Tensor
    if traced:
        return (gradient * grad_loss.to(gradient.dtype)).to(dtype)
    if grad_loss.device.type == "cpu" and grad_loss.item() == 1.0:
        return gradient.to(dtype)
    return backends.named(backend).scale_(gradient, grad_loss).to(dtype)


def _unit_factor(grad_loss: Tensor, weight_grad: Tensor) -> Tensor:
    """grad_loss, which must be 1: the weight's gradient was added for that factor, and cannot be scaled any more.

    Raises RuntimeError where looking does not wait for a GPU; otherwise all gradients become NaN, weight_grad's first
    entry with them, so that the step is seen to be wrong.
    """
    if type(grad_loss) is Tensor and checks.readable(grad_loss):
        if (factor := grad_loss.item()) != 1.0:
            raise RuntimeError(
                "a loss computed with weight_grad must be backpropagated unscaled: the weight's gradient was added in "
                f"the forward call, for a factor of 1; got {factor}. Scale through normalizer, or leave weight_grad out"
            )
        return grad_loss
    unit = torch.where(grad_loss == 1, grad_loss, math.nan)
    weight_grad[:1, :1].mul_(unit.to(weight_grad.dtype))
    return unit
