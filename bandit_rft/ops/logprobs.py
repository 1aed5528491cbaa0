"""Log-probability and entropy of given tokens: from the head (no [N, V] tensor ever exists) or from logits.

    z = softcap(logit_scale (hidden . weight^T + bias)) / temperature
    logp = z_target - logsumexp(z);  entropy = logsumexp(z) - sum_j p_j z_j

The forward keeps nothing of the vocabulary's size; the backward computes each chunk of logits again (8NHV FLOP in all).
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from . import backends, checks, head, rows
from .backend import Backend, Head, RowStatistics, Scaling
from .counted import clear_, ignored, replaced, zeroed, zeroed_statistics
from .head_gradients import GivenGradients, HeadGradients, empty_gradients
from .reference import IGNORED, computing_dtype
from .registry import autograd, once, operation
from .vocab_parallel import Shard, VocabParallelBackend


@overload
def linear_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None = None,
    temperature: float | Tensor = 1.0, softcap: float | None = None, logit_scale: float = 1.0,
    return_entropy: Literal[False] = False, process_group: ProcessGroup | None = None,
) -> Tensor: ...  # fmt: skip
@overload
def linear_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None = None,
    temperature: float | Tensor = 1.0, softcap: float | None = None, logit_scale: float = 1.0,
    return_entropy: Literal[True], process_group: ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
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
    process_group: ProcessGroup | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probabilities of `targets` under the LM head, without the logits ever being in memory at once.

    Args:
        hidden: [N, H] float32, bfloat16, float16 or float64: the last hidden states at which targets are predicted.
        weight: [V, H], hidden's dtype. It may be frozen, or hidden may be: the other's gradient is then not computed.
        targets: [N] int64 in [0, V); -100 is not counted: log-probability and entropy 0, no gradient.
        bias: [V] or None, added to the logits before anything else.
        temperature: a float, or [N] (one for each row): what the logits are divided by, last.
        softcap: c in c * tanh(z / c), or None.
        logit_scale: a factor of the logits, before the softcap.
        return_entropy: also return the entropy of the whole softmax, in nats.
        process_group: weight (and bias) are this rank's slice of the vocabulary, targets ids of the whole of it; all
            else is the same on every rank, as are the results and hidden's gradient (vocab_parallel.py).

    Returns:
        logprobs [N] float32 (float64 for float64 inputs), or (logprobs, entropy); both differentiable in hidden, weight
        and bias (not in the temperature).

    Raises:
        ValueError, TypeError: naming the argument, before anything is computed.
    """
    checks.head(hidden, weight, bias, "N")
    checks.no_forward_mode(hidden, weight, bias)
    checks.per_row("targets", targets, hidden.shape[0], "N", hidden, torch.int64)
    checks.scaling(temperature, softcap, logit_scale, hidden.shape[0], "N", hidden)
    scaling = Scaling.of(temperature, softcap, logit_scale, computing_dtype(hidden))
    if process_group is None:
        logp, entropy = _linear_logprobs(hidden, weight, bias, targets, *scaling)
    else:
        logp, entropy = _vocab_parallel(Head(hidden, weight, bias), targets, scaling, process_group)
    return (logp, entropy) if return_entropy else logp


@overload
def logprobs_from_logits(
    logits: Tensor, targets: Tensor, *, temperature: float | Tensor = 1.0, return_entropy: Literal[False] = False
) -> Tensor: ...
@overload
def logprobs_from_logits(
    logits: Tensor, targets: Tensor, *, temperature: float | Tensor = 1.0, return_entropy: Literal[True]
) -> tuple[Tensor, Tensor]: ...
def logprobs_from_logits(
    logits: Tensor, targets: Tensor, *, temperature: float | Tensor = 1.0, return_entropy: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probabilities of `targets` from logits that exist already.

    Beyond the gradient itself nothing of the logits' size is allocated.

    Args:
        logits: [N, V] float32, bfloat16, float16 or float64; -inf is a token that cannot occur.
        targets: [N] int64 in [0, V); -100 is not counted: log-probability and entropy 0, no gradient.
        temperature: a float, or [N] (one for each row): what the logits are divided by.
        return_entropy: also return the entropy of the whole softmax, in nats.

    Returns:
        logprobs [N] float32 (float64 for float64 logits), or (logprobs, entropy); both differentiable in the logits.

    Raises:
        ValueError, TypeError: naming the argument, before anything is computed.
    """
    checks.logits(logits, "N")
    checks.no_forward_mode(logits)
    checks.per_row("targets", targets, logits.shape[0], "N", logits, torch.int64)
    checks.scaling(temperature, None, 1.0, logits.shape[0], "N", logits)
    logp, entropy = _logits_logprobs(logits, targets, *Scaling.of(temperature, dtype=computing_dtype(logits))[:2])
    return (logp, entropy) if return_entropy else logp


# --- head -------------------------------------------------------------------------------------------------------------


def _fake_linear_logprobs(of: Head, *rest: Any) -> tuple[Tensor, Tensor]:
    rows_of, dtype = of.hidden.shape[0], computing_dtype(of.hidden)
    return of.hidden.new_empty(rows_of, dtype=dtype), of.hidden.new_empty(rows_of, dtype=dtype)


@operation("linear_logprobs", fake=_fake_linear_logprobs)
def _linear_logprobs(of: Head, targets: Tensor, scaling: Scaling) -> tuple[Tensor, Tensor]:
    checks.target_values(targets, len(of.weight))
    checks.temperature_values(scaling.temperatures)
    return score_counted(of, targets, scaling)


def score_counted(of: Head, targets: Tensor, scaling: Scaling, backend: Backend | None = None) -> RowStatistics:
    """As `score`, with 0 for targets that are not counted, whose rows are left out where looking is free."""
    mask = ignored(targets)
    if mask is None or not checks.readable(targets):
        return zeroed_statistics(score(of, replaced(targets, mask), scaling, backend), mask)
    counted = (~mask).nonzero()[:, 0]
    some = score(Head(of.hidden[counted], of.weight, of.bias), targets[counted], scaling.rows(counted), backend)
    return RowStatistics(*(values.new_zeros(len(targets)).index_copy_(0, counted, values) for values in some))


def score(of: Head, targets: Tensor, scaling: Scaling, backend: Backend | None = None) -> RowStatistics:
    """Log-probabilities and entropy of checked arguments, chunk by chunk (as by a given backend) or fused."""
    hidden = of.hidden
    fused = backends.fusing(hidden.device, hidden.dtype) if backend is None else None
    if fused is not None:
        seen = fused.linear_logprobs(of, targets, scaling, head.workspace_bytes(hidden.device))
    else:
        backend = backend or backends.serving(hidden.device, computing_dtype(hidden))
        seen = backend.head_logprobs(of, targets, scaling)
    checks.finite_values("the logits", seen.logprobs)
    return seen


def _fake_linear_logprobs_backward(
    of: Head, targets: Tensor, scaling: Scaling, given: GivenGradients, wanted: list[bool], backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_gradients(of, wanted)


@operation("linear_logprobs_backward", fake=_fake_linear_logprobs_backward)
def _linear_logprobs_backward(
    of: Head, targets: Tensor, scaling: Scaling, given: GivenGradients, wanted: list[bool], backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    checks.target_values(targets, len(of.weight))  # as they are now, not as they were in the forward call
    gradients = HeadGradients(of, wanted, backends.named(backend))
    gradients.accumulate(rows_with_gradient(given, targets), gradients.filling(given, targets, scaling))
    return gradients.results()


def rows_with_gradient(given: GivenGradients, targets: Tensor) -> Tensor | None:
    """The rows that anything flows back into (None: all of them), int64; on a GPU the host waits for their number."""
    counts = given.logprobs != 0
    if given.entropy is not None:
        counts |= given.entropy != 0
    counts &= targets != IGNORED
    index = counts.nonzero()[:, 0]
    return None if len(index) == len(counts) else index


def _setup_linear(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    of, targets, scaling = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*of, targets, scaling.temperatures)
    ctx.scaling = scaling._replace(temperatures=None)
    # Autograd may run the backward in a thread that knows nothing of `use_backend`.
    ctx.backend = backends.select(of.hidden.device, computing_dtype(of.hidden))


def _backward_linear(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
    if (given := _given(*gradients)) is None:
        return ()
    *of, targets, temperatures = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:3])
    scaling = ctx.scaling._replace(temperatures=temperatures)
    found = _linear_logprobs_backward(*of, targets, *scaling, *given, wanted, ctx.backend)
    return tuple(g if want else None for g, want in zip(found, wanted, strict=True))


def _given(logprobs: Tensor | None, entropy: Tensor | None) -> GivenGradients | None:
    if logprobs is None and entropy is None:
        return None
    if logprobs is None:
        assert entropy is not None
        logprobs = torch.zeros_like(entropy)
    return GivenGradients(logprobs.contiguous(), None if entropy is None else entropy.contiguous())


autograd("linear_logprobs", _backward_linear, _setup_linear)


# --- head, a slice of the vocabulary on each rank ---------------------------------------------------------------------


class _VocabParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: VocabParallelBackend, targets: Tensor, scaling: Scaling, *of: Tensor | None) -> Any:
        ctx.set_materialize_grads(False)
        ctx.backend, ctx.scaling = backend, scaling._replace(temperatures=None)
        ctx.save_for_backward(targets, scaling.temperatures, *of)
        return tuple(score_counted(Head(*of), targets, scaling, backend))  # type: ignore[arg-type]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        if (given := _given(*gradients)) is None:
            return (None,) * 6
        targets, temperatures, *of = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[3:])
        found = HeadGradients(Head(*of), wanted, ctx.backend)
        fill = found.filling(given, targets, ctx.scaling._replace(temperatures=temperatures))
        found.accumulate(rows_with_gradient(given, targets), fill)
        results = once(tuple(g if want else None for g, want in zip(found.results(), wanted, strict=True)))
        return (None, None, None, *results)


def _vocab_parallel(of: Head, targets: Tensor, scaling: Scaling, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    backend = VocabParallelBackend(Shard.of(group, of.hidden, of.weight))
    checks.target_values(targets, backend.vocabulary(of.weight))
    checks.temperature_values(scaling.temperatures)
    logp, entropy = _VocabParallel.apply(backend, targets, scaling, *of)  # type: ignore[no-untyped-call]
    return logp, entropy


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
    mask = ignored(targets)
    seen = rows.logprobs(with_unit_columns(logits), replaced(targets, mask), Scaling(temperature, temperatures))
    seen = zeroed_statistics(seen, mask)
    checks.finite_values("the logits", seen.logprobs)
    return seen


def _fake_logits_logprobs_backward(logits: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@operation("logits_logprobs_backward", fake=_fake_logits_logprobs_backward)
def _logits_logprobs_backward(
    logits: Tensor, targets: Tensor, temperature: float, temperatures: Tensor | None, given: GivenGradients,
    backend: str,
) -> Tensor:  # fmt: skip
    checks.target_values(targets, logits.shape[1])
    gradient = logits.clone(memory_format=torch.contiguous_format)
    mask = ignored(targets)
    of_logprobs, of_entropy = (None if g is None else zeroed(g, mask) for g in given)
    assert of_logprobs is not None
    rows.gradient_(
        gradient, replaced(targets, mask), Scaling(temperature, temperatures), of_logprobs, of_entropy, backend=backend
    )
    clear_(gradient, mask)
    return gradient


def _setup_logits(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    logits, targets, temperature, temperatures = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, targets, temperatures)
    ctx.temperature = temperature
    ctx.backend = backends.select(logits.device, logits.dtype)


def _backward_logits(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
    if (given := _given(*gradients)) is None:
        return ()
    logits, targets, temperatures = ctx.saved_tensors
    return (_logits_logprobs_backward(logits, targets, ctx.temperature, temperatures, *given, ctx.backend),)


autograd("logits_logprobs", _backward_logits, _setup_logits)


def with_unit_columns(logits: Tensor) -> Tensor:
    """Rows must be contiguous for the kernels; a transposed view is copied once."""
    return logits if logits.shape[1] == 1 or logits.stride(1) == 1 else logits.contiguous()
