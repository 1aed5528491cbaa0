"""Log-probability and entropy of given tokens: from the head (no [N, V] tensor ever exists) or from logits.

    z = softcap(logit_scale (hidden . weight^T + bias)) / temperature
    logp = z_target - logsumexp(z);  entropy = logsumexp(z) - sum_j p_j z_j

The forward keeps nothing of the vocabulary's size; the backward computes each chunk of logits again (8NHV FLOP in all).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import backends, checks, head, rows
from .reference import computing_dtype
from .registry import autograd, operation
from .rows import Scaling


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probabilities of `targets` under the LM head, without the logits ever being in memory at once.

    Args:
        hidden: [N, H] float32, bfloat16, float16 or float64: the last hidden states at which targets are predicted.
        weight: [V, H], hidden's dtype. It may be frozen, or hidden may be: the other's gradient is then not computed.
        targets: [N] int64 in [0, V).
        bias: [V] or None, added to the logits before anything else.
        temperature: a float, or [N] (one for each row): what the logits are divided by, last.
        softcap: c in c * tanh(z / c), or None.  logit_scale: a factor of the logits, before the softcap.
        return_entropy: also return the entropy of the whole softmax, in nats.

    Returns:
        logprobs [N] float32 (float64 for float64 inputs), or (logprobs, entropy); both differentiable in hidden, weight
        and bias (not in the temperature).

    Raises:
        ValueError, TypeError: naming the argument, before anything is computed.
    """
    checks.head(hidden, weight, bias, "N")
    checks.per_row("targets", targets, hidden.shape[0], "N", hidden, torch.int64)
    checks.scaling(temperature, softcap, logit_scale, hidden.shape[0], "N", hidden)
    logp, entropy = _linear_logprobs(hidden, weight, bias, targets, *split(temperature), softcap, logit_scale)
    return (logp, entropy) if return_entropy else logp


def logprobs_from_logits(
    logits: Tensor, targets: Tensor, *, temperature: float | Tensor = 1.0, return_entropy: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probabilities of `targets` [N] from logits [N, V] that exist already; differentiable in the logits.

    Beyond the gradient itself nothing of the logits' size is allocated. Shapes, returns, errors as `linear_logprobs`.
    """
    checks.logits(logits, "N")
    checks.per_row("targets", targets, logits.shape[0], "N", logits, torch.int64)
    checks.scaling(temperature, None, 1.0, logits.shape[0], "N", logits)
    logp, entropy = _logits_logprobs(logits, targets, *split(temperature))
    return (logp, entropy) if return_entropy else logp


def split(temperature: float | Tensor) -> tuple[float, Tensor | None]:
    """A custom operation's argument has one type: (number, tensor or None)."""
    if isinstance(temperature, Tensor):
        return 1.0, temperature.detach().to(torch.float32)
    return float(temperature), None


def joined(temperature: float, temperatures: Tensor | None) -> float | Tensor:
    return temperature if temperatures is None else temperatures


# --- head -------------------------------------------------------------------------------------------------------------


def _fake_linear_logprobs(
    hidden: Tensor, weight: Tensor, bias: Any, targets: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    dtype = computing_dtype(hidden)
    return hidden.new_empty(hidden.shape[0], dtype=dtype), hidden.new_empty(hidden.shape[0], dtype=dtype)


@operation("linear_logprobs", fake=_fake_linear_logprobs)
def _linear_logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float,
    temperatures: Tensor | None, softcap: float | None, logit_scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    checks.target_values(targets, weight.shape[0])
    checks.temperature_values(temperatures)
    scaling = Scaling(joined(temperature, temperatures), softcap, logit_scale)
    if backends.fused_head(hidden.device, hidden.dtype):
        logp, entropy = rows.fused_logprobs(hidden, weight, targets, bias, scaling)
        checks.finite_values("the logits", logp)
        return logp, entropy
    dtype = computing_dtype(hidden)
    logp, entropy = hidden.new_empty(len(hidden), dtype=dtype), hidden.new_empty(len(hidden), dtype=dtype)
    plan = head.chunks(len(hidden), len(weight), hidden.device, dtype, backends.select(hidden.device, dtype))
    buffer = head.workspace(plan[0].stop if plan else 0, len(weight), hidden)
    for chunk in plan:
        z = head.logits(hidden[chunk], weight, bias, buffer)
        logp[chunk], entropy[chunk] = rows.logprobs(z, targets[chunk], scaling.rows(chunk))
    checks.finite_values("the logits", logp)
    return logp, entropy


def _fake_linear_logprobs_backward(
    hidden: Tensor, weight: Tensor, bias: Any, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_gradients(hidden, weight, bias, rest[-1])


@operation("linear_logprobs_backward", fake=_fake_linear_logprobs_backward)
def _linear_logprobs_backward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float,
    temperatures: Tensor | None, softcap: float | None, logit_scale: float,
    grad_logprobs: Tensor, grad_entropy: Tensor | None, wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    scaling = Scaling(joined(temperature, temperatures), softcap, logit_scale)
    gradients = HeadGradients(hidden, weight, bias, wanted)
    counts = grad_logprobs != 0
    if grad_entropy is not None:
        counts |= grad_entropy != 0
    index = counts.nonzero()[:, 0]
    every = len(index) == len(counts)

    def fill(z: Tensor, chunk: slice | Tensor, into: Tensor | None) -> None:
        of_entropy = None if grad_entropy is None else grad_entropy[chunk]
        rows.gradient_(z, targets[chunk], scaling.rows(chunk), grad_logprobs[chunk], of_entropy, into)

    gradients.accumulate(None if every else index, fill)
    return gradients.results()


def _setup_linear(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    hidden, weight, bias, targets, temperature, temperatures, softcap, logit_scale = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, targets, temperatures)
    ctx.scaling = (temperature, softcap, logit_scale)


def _backward_linear(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Any, ...]:
    hidden, weight, bias, targets, temperatures = ctx.saved_tensors
    temperature, softcap, logit_scale = ctx.scaling
    wanted = list(ctx.needs_input_grad[:3])
    if grad_logprobs is None and grad_entropy is None:
        return (None,) * 8
    if grad_logprobs is None:
        assert grad_entropy is not None
        grad_logprobs = torch.zeros_like(grad_entropy)
    gradients = _linear_logprobs_backward(
        hidden, weight, bias, targets, temperature, temperatures, softcap, logit_scale,
        grad_logprobs.contiguous(), None if grad_entropy is None else grad_entropy.contiguous(), wanted,
    )  # fmt: skip
    return (*(g if want else None for g, want in zip(gradients, wanted, strict=True)), *(None,) * 5)


autograd("linear_logprobs", _backward_linear, _setup_linear)


class HeadGradients:
    """dL/dhidden, dL/dweight and dL/dbias, summed over chunks of rows; those not wanted cost nothing.

    weight and bias gradients are accumulated in float32 (float64 for float64 inputs) and rounded once, in `results`.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: list[bool], weight_grad: Tensor | None = None
    ) -> None:
        self.inputs = hidden, weight, bias
        dtype = computing_dtype(hidden)
        want_hidden, want_weight, want_bias = wanted
        self.hidden = torch.empty_like(hidden) if want_hidden else None
        self.started = weight_grad is not None
        if weight_grad is None and want_weight:
            weight_grad = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        self.weight = weight_grad
        self.bias = torch.zeros(bias.shape, dtype=dtype, device=bias.device) if want_bias and bias is not None else None
        self.floor = 0.0  # |dL/dlogit| below which a block of the vocabulary is left out of the products

    def accumulate(self, index: Tensor | None, fill: Any) -> None:
        """For the rows in `index` (None: all), `fill(z, chunk, into)` turns their logits into dL/dlogits in place.

        Where `into` is not None it writes dL/dlogits there instead (head.narrow_gradient).
        """
        hidden, weight, bias = self.inputs
        count = len(hidden) if index is None else len(index)
        if self.hidden is not None and index is not None:
            self.hidden.zero_()
        dtype = computing_dtype(hidden)
        backend = backends.select(hidden.device, dtype)
        # A quarter is left for the rows gathered, their gradient, and what the products pack.
        plan = head.chunks(count, len(weight), hidden.device, dtype, backend, share=0.75)
        buffer = head.workspace(plan[0].stop if plan else 0, len(weight), hidden)
        for chunk in plan:
            taken = chunk if index is None else index[chunk]
            h = hidden[taken]
            z = head.logits(h, weight, bias, buffer)
            narrow = head.narrow_gradient(z, weight.dtype, backend)
            fill(z, taken, narrow)
            dz = z if narrow is None else narrow
            columns = head.columns_that_count(dz, self.floor) if self.floor else None
            of_hidden = (dz, weight) if columns is None else (dz[:, columns], weight[columns])
            if self.hidden is not None:
                if index is None:
                    head.add_hidden_gradient(*of_hidden, self.hidden[chunk])
                else:
                    part = torch.empty_like(h)
                    head.add_hidden_gradient(*of_hidden, part)
                    self.hidden.index_copy_(0, taken, part)  # type: ignore[arg-type]
            if self.weight is not None:
                if columns is None:
                    head.add_weight_gradient(dz, h, self.weight, accumulate=self.started)
                else:
                    some = self.weight.new_empty(len(columns), h.shape[1])
                    head.add_weight_gradient(of_hidden[0], h, some, accumulate=False)
                    self.weight = self.weight if self.started else self.weight.zero_()
                    self.weight.index_add_(0, columns, some)
                self.started = True
            if self.bias is not None:
                self.bias += dz.sum(0, dtype=self.bias.dtype)
        if self.weight is not None and not self.started:
            self.weight.zero_()

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """(hidden, weight, bias) gradients in their inputs' dtypes; an empty tensor for one that was not wanted."""
        hidden, weight, bias = self.inputs
        nothing = hidden.new_empty(0)
        return (
            nothing if self.hidden is None else self.hidden,
            nothing.clone() if self.weight is None else self.weight.to(weight.dtype),
            nothing.clone() if self.bias is None or bias is None else self.bias.to(bias.dtype),
        )


def empty_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """The shapes of `HeadGradients.results`, for tracing."""
    return (
        torch.empty_like(hidden) if wanted[0] else hidden.new_empty(0),
        weight.new_empty(weight.shape) if wanted[1] else hidden.new_empty(0),
        bias.new_empty(bias.shape) if wanted[2] and bias is not None else hidden.new_empty(0),
    )


# --- logits -----------------------------------------------------------------------------------------------------------


def _fake_logits_logprobs(
    logits: Tensor, targets: Tensor, temperature: float, temperatures: Any
) -> tuple[Tensor, Tensor]:
    dtype = computing_dtype(logits)
    return logits.new_empty(logits.shape[0], dtype=dtype), logits.new_empty(logits.shape[0], dtype=dtype)


@operation("logits_logprobs", fake=_fake_logits_logprobs)
def _logits_logprobs(
    logits: Tensor, targets: Tensor, temperature: float, temperatures: Tensor | None
) -> tuple[Tensor, Tensor]:
    checks.target_values(targets, logits.shape[1])
    checks.temperature_values(temperatures)
    logp, entropy = rows.logprobs(with_unit_columns(logits), targets, Scaling(joined(temperature, temperatures)))
    checks.finite_values("the logits", logp)
    return logp, entropy


def _fake_logits_logprobs_backward(logits: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@operation("logits_logprobs_backward", fake=_fake_logits_logprobs_backward)
def _logits_logprobs_backward(
    logits: Tensor, targets: Tensor, temperature: float, temperatures: Tensor | None,
    grad_logprobs: Tensor, grad_entropy: Tensor | None,
) -> Tensor:  # fmt: skip
    gradient = logits.clone(memory_format=torch.contiguous_format)
    rows.gradient_(gradient, targets, Scaling(joined(temperature, temperatures)), grad_logprobs, grad_entropy)
    return gradient


def _setup_logits(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    logits, targets, temperature, temperatures = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, targets, temperatures)
    ctx.temperature = temperature


def _backward_logits(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Any, ...]:
    logits, targets, temperatures = ctx.saved_tensors
    if grad_logprobs is None and grad_entropy is None:
        return (None,) * 4
    if grad_logprobs is None:
        assert grad_entropy is not None
        grad_logprobs = torch.zeros_like(grad_entropy)
    of_entropy = None if grad_entropy is None else grad_entropy.contiguous()
    gradient = _logits_logprobs_backward(
        logits, targets, ctx.temperature, temperatures, grad_logprobs.contiguous(), of_entropy
    )
    return gradient, None, None, None


autograd("logits_logprobs", _backward_logits, _setup_logits)


def with_unit_columns(logits: Tensor) -> Tensor:
    """Rows must be contiguous for the kernels; a transposed view is copied once."""
    return logits if logits.shape[1] == 1 or logits.stride(1) == 1 else logits.contiguous()
