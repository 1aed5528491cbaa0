"""The policy-gradient loss of an LM head and its gradients, in one pass over the logits (gradient in forward, 6NHV).

    L = sum_i w_i l_i(logp_i, entropy_i),  c_i = dL/dlogp_i,  e_i = -dL/dentropy_i
    dL/dz_ij = c_i ([j = target_i] - p_ij) + e_i p_ij (log p_ij + entropy_i)
    dL/dhidden = dz . weight,  dL/dweight = dz^T . hidden

Rows whose coefficients are known to be zero are dropped before the first product. Of the logits only one chunk exists
at a time, and dz overwrites it. gspo, whose coefficients need whole sequences, scores first (2NHV) and then computes
gradients for the rows that still count.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from . import backends, checks, rows
from .backend import Backend, Head, Scaling, TokenInputs
from .counted import clear_, ignored, may_have_gradient, replaced, rows_that_count, zeroed, zeroed_statistics
from .head_gradients import GivenGradients, HeadGradients, empty_gradients
from .logprobs import rows_with_gradient, score, with_unit_columns
from .objective import STATISTICS, PolicyObjective, loss_and_statistics, token_coefficients
from .ready_gradients import scaled, with_gradients
from .reference import computing_dtype
from .registry import autograd, operation
from .token_arguments import ObjectiveFields, Selection, Sequences, check_weight_grad, token_arguments
from .vocab_parallel import Shard, VocabParallelBackend


class PolicyLoss(NamedTuple):
    """A loss to call .backward() on, and what was seen while computing it.

    Attributes:
        loss: 0-d.
        stats: 0-d tensors by name, without a graph: means over the tokens computed (ratio_mean, clip_fraction_low,
            clip_fraction_high, clip_fraction_dual, kl_k1, kl_k3, entropy), effective_sample_size, and the counts
            tokens_computed, tokens_skipped, nonfinite_rows.
        logprobs: [N], without a graph; NaN for rows that were dropped, 0 where a target is -100.
    """

    loss: Tensor
    stats: dict[str, Tensor]
    logprobs: Tensor


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor,
    *,
    objective: PolicyObjective,
    behavior_logprobs: Tensor | None = None,
    reference_logprobs: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    normalizer: float | Tensor | None = None,
    weight_grad: Tensor | None = None,
    gradient_threshold: float = 0.0,
    skip_zero_rows: bool = True,
    process_group: ProcessGroup | None = None,
) -> PolicyLoss:
    """The policy-gradient loss of N completion tokens of B packed sequences, from the head, never building [N, V].

    Args:
        hidden: [N, H] float32, bfloat16, float16 or float64: the last hidden states at which targets are predicted.
        weight: [V, H], hidden's dtype. It may be frozen, or hidden may be: the other's gradient is then not computed.
        targets: [N] int64 in [0, V); -100 is not counted: as if the token were not there, in no sum and no normalizer.
        advantages: [B] (one a sequence) or [N] (one a token). Tokens with advantage 0 are not computed at all, unless
            the objective's KL or entropy terms make them count; the normalizer does not change.
        cu_seqlens: [B + 1] int32, where sequences begin and end in N, from 0 to N.
        objective: what is minimized (PolicyObjective).
        behavior_logprobs: [N] of the policy that drew the tokens; None means this very policy (ratio 1, with gradient).
        reference_logprobs: [N], needed for a KL term.
        bias: [V] or None, added to the logits before anything else.
        temperature: a float, or [N] (one for each row): what the logits are divided by, last.
        softcap: c in c * tanh(z / c), or None.
        logit_scale: a factor of the logits, before the softcap.
        normalizer: the D of the objective's aggregation, so that micro-batches or ranks add up to exactly the whole.
        weight_grad: [V, H] float32 (such as weight.grad): the weight's gradient is added straight into it, here and
            now, and autograd returns none for the weight. The loss must then be backpropagated unscaled.
        gradient_threshold: above 0, the products of hidden's and weight's gradient leave out every block of 128
            vocabulary entries in which no |dL/dlogit| of the chunk of tokens at hand reaches this share of the largest
            |advantage x token weight|. An approximation (docs/operations.md); the loss stays exact.
        skip_zero_rows: look for tokens of advantage 0 and do not compute them. On a GPU the host waits for their
            number; False asks the device for nothing, and is the same loss and gradients: for callers who know on the
            host which tokens count, and pass no others.
        process_group: weight (and bias, and weight_grad) are this rank's slice of the vocabulary, targets ids of the
            whole of it; all else is the same on every rank, as are the results and hidden's gradient
            (vocab_parallel.py). gradient_threshold must be 0.

    Returns:
        PolicyLoss(loss, stats, logprobs). Gradients (hidden, weight, bias) are ready when this returns; .backward()
        hands them on. An empty batch has loss 0 and zero gradients.

    Raises:
        ValueError, TypeError: naming the argument, before anything is computed.
    """
    checks.head(hidden, weight, bias, "N")
    checks.no_forward_mode(hidden, weight, bias)
    n = hidden.shape[0]
    checks.per_row("targets", targets, n, "N", hidden, torch.int64)
    checks.scaling(temperature, softcap, logit_scale, n, "N", hidden)
    inputs, sequences = token_arguments(
        objective, targets, advantages, cu_seqlens, behavior_logprobs, reference_logprobs, normalizer, hidden
    )
    if not isinstance(skip_zero_rows, bool):
        raise TypeError(f"skip_zero_rows must be True or False; got {skip_zero_rows!r}")
    if not isinstance(gradient_threshold, (int, float)) or not 0 <= gradient_threshold < 1:
        raise ValueError(f"gradient_threshold must be a number >= 0 and < 1; got {gradient_threshold!r}")
    scaling, fields = Scaling.of(temperature, softcap, logit_scale, inputs.weights.dtype), ObjectiveFields.of(objective)
    selection = Selection(skip_zero_rows, float(gradient_threshold))
    wanted = [_wants(hidden), _wants(weight), bias is not None and _wants(bias)]
    if weight_grad is not None:
        check_weight_grad(weight_grad, weight, hidden)
        wanted[1] = False
    if process_group is not None:
        if gradient_threshold:
            raise ValueError(f"gradient_threshold must be 0 with a process_group; got {gradient_threshold}")
        of = Head(hidden, weight, bias)
        seen = _vocab_parallel(
            of, targets, inputs, sequences, scaling, objective, selection, wanted, weight_grad, process_group
        )
        return PolicyLoss(*_named(*seen))
    arguments = (targets, *inputs, *sequences, *scaling, *fields, *selection)
    if weight_grad is not None:
        detached = [None if t is None else t.detach() for t in (hidden, weight, bias)]
        loss, stats, logprobs, *found = _linear_policy_loss_into(weight_grad, *detached, *arguments, wanted)
        loss = with_gradients(hidden, weight, bias, weight_grad, loss, *found)
        return PolicyLoss(*_named(loss, stats, logprobs))
    loss, stats, logprobs, *_ = _linear_policy_loss(hidden, weight, bias, *arguments, wanted)
    return PolicyLoss(*_named(loss, stats, logprobs))


def policy_loss_from_logits(
    logits: Tensor,
    targets: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor,
    *,
    objective: PolicyObjective,
    behavior_logprobs: Tensor | None = None,
    reference_logprobs: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    normalizer: float | Tensor | None = None,
) -> PolicyLoss:
    """The policy-gradient loss of N completion tokens of B packed sequences, from logits that exist already.

    Beside the logits only their gradient is allocated.

    Args:
        logits: [N, V] float32, bfloat16, float16 or float64; -inf is a token that cannot occur.
        targets: [N] int64 in [0, V); -100 is not counted: as if the token were not there, in no sum and no normalizer.
        advantages: [B] (one a sequence) or [N] (one a token).
        cu_seqlens: [B + 1] int32, where sequences begin and end in N, from 0 to N.
        objective: what is minimized (PolicyObjective).
        behavior_logprobs: [N] of the policy that drew the tokens; None means this very policy (ratio 1, with gradient).
        reference_logprobs: [N], needed for a KL term.
        temperature: a float, or [N] (one for each row): what the logits are divided by, last.
        softcap: c in c * tanh(z / c), or None.
        logit_scale: a factor of the logits, before the softcap.
        normalizer: the D of the objective's aggregation, so that micro-batches or ranks add up to exactly the whole.

    Returns:
        PolicyLoss(loss, stats, logprobs). The logits' gradient is ready when this returns; .backward() hands it on.

    Raises:
        ValueError, TypeError: naming the argument, before anything is computed.
    """
    checks.logits(logits, "N")
    checks.no_forward_mode(logits)
    n = logits.shape[0]
    checks.per_row("targets", targets, n, "N", logits, torch.int64)
    checks.scaling(temperature, softcap, logit_scale, n, "N", logits)
    inputs, sequences = token_arguments(
        objective, targets, advantages, cu_seqlens, behavior_logprobs, reference_logprobs, normalizer, logits
    )
    scaling, fields = Scaling.of(temperature, softcap, logit_scale, inputs.weights.dtype), ObjectiveFields.of(objective)
    loss, stats, logprobs, _ = _logits_policy_loss(
        logits, targets, *inputs, *sequences, *scaling, *fields, _wants(logits)
    )
    return PolicyLoss(*_named(loss, stats, logprobs))


def _wants(tensor: Tensor) -> bool:
    return tensor.requires_grad and torch.is_grad_enabled()


def _named(loss: Tensor, stats: Tensor, logprobs: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    return loss, dict(zip(STATISTICS, stats.detach().unbind(), strict=True)), logprobs.detach()


# --- head -------------------------------------------------------------------------------------------------------------


def _compute(
    of: Head, targets: Tensor, inputs: TokenInputs, sequences: Sequences, scaling: Scaling, objective: PolicyObjective,
    selection: Selection, gradients: HeadGradients | None, backend: Backend | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss, statistics, logprobs [N]); gradients, where wanted, are added to `gradients`. `backend`: one given."""
    vocabulary = len(of.weight) if backend is None else backend.vocabulary(of.weight)
    _check_values(targets, vocabulary, inputs, sequences, scaling)
    advantages, weights = inputs.advantages, inputs.weights
    logp = torch.full_like(advantages, math.nan)
    entropy = torch.full_like(advantages, math.nan)
    # Where the caller says that every row counts, a GPU is not asked whether a target is ignored.
    mask = ignored(targets) if selection.skip_zero_rows or checks.readable(targets) else None
    counts = may_have_gradient(objective, advantages, *sequences[:2]) if selection.skip_zero_rows else None
    index = rows_that_count(counts, mask)
    every: Tensor | slice = slice(None) if index is None else index
    if gradients is not None and selection.gradient_threshold and len(advantages):
        gradients.floor = selection.gradient_threshold * float((advantages * weights).abs().max())

    if gradients is not None and objective.token_separable:
        into_products = inputs
        if gradients.narrow:  # what is multiplied is linear in the token weights
            slopes = advantages.abs() + (objective.kl_coef + objective.entropy_coef)
            into_products = inputs._replace(weights=weights * gradients.magnify(slopes * weights))
        policy_rows = gradients.backend.policy_rows

        def fill(z: Tensor, taken: slice | Tensor, into: Tensor | None) -> None:
            logp[taken], entropy[taken] = policy_rows(
                z, targets[taken], scaling.rows(taken), objective, into_products.rows(taken), into
            )

        gradients.accumulate(index, fill)
    else:
        some = Head(of.hidden[every], of.weight, of.bias)
        logp[every], entropy[every] = score(some, targets[every], scaling.rows(every), backend)
    computed, sequence_of = inputs.rows(every), sequences.sequence_of[every]
    loss, statistics = loss_and_statistics(
        objective, logp[every], entropy[every], *computed, sequence_of, sequences.lengths,
        tokens_skipped=0 if index is None else len(of.hidden) - len(index) - (0 if mask is None else mask.sum()),
    )  # fmt: skip

    if gradients is not None and not objective.token_separable:
        c = torch.zeros_like(logp)
        c[every] = token_coefficients(objective, logp[every], *computed, sequence_of, sequences.lengths)
        given = GivenGradients(c, -objective.entropy_coef * weights if objective.entropy_coef else None)
        still = rows_with_gradient(given, targets) if selection.skip_zero_rows and given.entropy is None else index
        fill_given = gradients.filling(given, targets, scaling)
        gradients.accumulate(still, fill_given)
    checks.finite_values("the logits", logp[every])
    return loss, statistics, zeroed(logp, mask)


def _head_gradients(of: Head, wanted: list[bool], weight_grad: Tensor | None = None) -> HeadGradients:
    backend = backends.serving(of.hidden.device, computing_dtype(of.hidden))
    return HeadGradients(of, wanted, backend, weight_grad)


def _check_values(
    targets: Tensor, vocabulary: int, inputs: TokenInputs, sequences: Sequences, scaling: Scaling
) -> None:
    checks.sequence_values(sequences.cu_seqlens, len(targets))
    checks.target_values(targets, vocabulary)
    checks.temperature_values(scaling.temperatures)
    checks.finite_values("advantages", inputs.advantages)
    checks.finite_values("behavior_logprobs", inputs.behavior)
    checks.finite_values("reference_logprobs", inputs.reference)


def _fake_linear_policy_loss(
    of: Head, targets: Tensor, inputs: TokenInputs, sequences: Sequences, scaling: Scaling, objective: ObjectiveFields,
    selection: Selection, wanted: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    like = inputs.advantages
    seen = like.new_empty(()), like.new_empty(len(STATISTICS)), torch.empty_like(like)
    return (*seen, *empty_gradients(of, wanted, rounded=False))


@operation("linear_policy_loss", fake=_fake_linear_policy_loss)
def _linear_policy_loss(
    of: Head, targets: Tensor, inputs: TokenInputs, sequences: Sequences, scaling: Scaling, objective: ObjectiveFields,
    selection: Selection, wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    gradients = _head_gradients(of, wanted) if any(wanted) else None
    seen = _compute(of, targets, inputs, sequences, scaling, objective.objective(), selection, gradients)
    if gradients is None:
        return *seen, of.hidden.new_empty(0), of.hidden.new_empty(0), of.hidden.new_empty(0)
    return *seen, *gradients.results(rounded=False)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    of, wanted = inputs[0], inputs[-1]
    ctx.set_materialize_grads(False)
    ctx.dtypes = [tensor.dtype if want else None for tensor, want in zip(of, wanted, strict=True)]
    # Autograd may run the backward in a thread that knows nothing of `use_backend`.
    ctx.backend = backends.scaling(of.hidden.device, computing_dtype(of.hidden))
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[3:])


def _backward(ctx: Any, grad_loss: Tensor | None, *unused: Any) -> tuple[Any, ...]:
    if grad_loss is None:
        return ()
    return tuple(
        None if dtype is None else scaled(gradient, grad_loss, dtype, ctx.backend)
        for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
    )


autograd("linear_policy_loss", _backward, _setup)


# --- head, with the weight's gradient added straight into a buffer that exists ----------------------------------------


def _fake_linear_policy_loss_into(weight_grad: Tensor, of: Head, *rest: Any) -> tuple[Tensor, ...]:
    return _fake_linear_policy_loss(of, *rest)


@operation("linear_policy_loss_into", fake=_fake_linear_policy_loss_into, mutates=("weight_grad",))
def _linear_policy_loss_into(
    weight_grad: Tensor, of: Head, targets: Tensor, inputs: TokenInputs, sequences: Sequences, scaling: Scaling,
    objective: ObjectiveFields, selection: Selection, wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    gradients = _head_gradients(of, wanted, weight_grad)
    seen = _compute(of, targets, inputs, sequences, scaling, objective.objective(), selection, gradients)
    gradients.weight = None  # it is where it belongs
    of_hidden, of_weight, of_bias = gradients.results(rounded=False)
    return *seen, of_hidden, of_weight, of_bias


# --- head, a slice of the vocabulary on each rank ---------------------------------------------------------------------


def _vocab_parallel(
    of: Head, targets: Tensor, inputs: TokenInputs, sequences: Sequences, scaling: Scaling, objective: PolicyObjective,
    selection: Selection, wanted: list[bool], weight_grad: Tensor | None, group: ProcessGroup,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss, statistics, logprobs [N])."""
    backend = VocabParallelBackend(Shard.of(group, of.hidden, of.weight))
    with torch.no_grad():
        detached = Head(of.hidden.detach(), of.weight.detach(), None if of.bias is None else of.bias.detach())
        needed = any(wanted) or weight_grad is not None
        gradients = HeadGradients(detached, wanted, backend, weight_grad) if needed else None
        loss, statistics, logprobs = _compute(
            detached, targets, inputs, sequences, scaling, objective, selection, gradients, backend
        )
        if gradients is None:
            return loss, statistics, logprobs
        if weight_grad is not None:
            gradients.weight = None  # it is where it belongs
        found = gradients.results(rounded=False)
    return with_gradients(*of, weight_grad, loss, *found), statistics, logprobs


# --- logits -----------------------------------------------------------------------------------------------------------


def _fake_logits_policy_loss(
    logits: Tensor, targets: Tensor, inputs: TokenInputs, sequences: Sequences, scaling: Scaling,
    objective: ObjectiveFields, wanted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    like, contiguous = inputs.advantages, torch.contiguous_format
    gradient = torch.empty_like(logits, memory_format=contiguous) if wanted else logits.new_empty(0)
    return like.new_empty(()), like.new_empty(len(STATISTICS)), torch.empty_like(like), gradient


@operation("logits_policy_loss", fake=_fake_logits_policy_loss)
def _logits_policy_loss(
    logits: Tensor, targets: Tensor, inputs: TokenInputs, sequences: Sequences, scaling: Scaling,
    objective: ObjectiveFields, wanted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    _check_values(targets, logits.shape[1], inputs, sequences, scaling)
    o = objective.objective()
    gradient = logits.clone(memory_format=torch.contiguous_format) if wanted else logits.new_empty(0)
    mask = ignored(targets)
    in_vocabulary = replaced(targets, mask)
    if wanted and o.token_separable:
        # exp(reference - logp) must not overflow in a row that is left out, whatever its logits are
        reference = None if inputs.reference is None or mask is None else inputs.reference.masked_fill(mask, -1e30)
        of_rows = inputs if reference is None else inputs._replace(reference=reference)
        seen = rows.policy_(gradient, in_vocabulary, scaling, o, of_rows)
    else:
        seen = rows.logprobs(with_unit_columns(logits), in_vocabulary, scaling)
    seen = zeroed_statistics(seen, mask)
    loss, statistics = loss_and_statistics(
        o,
        seen.logprobs,
        seen.entropy,
        *inputs,
        sequences.sequence_of,
        sequences.lengths,
        tokens_skipped=0,
        ignored=mask,
    )
    if wanted and not o.token_separable:
        c = zeroed(token_coefficients(o, seen.logprobs, *inputs, *sequences[:2]), mask)
        of_entropy = -o.entropy_coef * inputs.weights if o.entropy_coef else None
        rows.gradient_(gradient, in_vocabulary, scaling, c, of_entropy)
    if wanted:
        clear_(gradient, mask)
    checks.finite_values("the logits", seen.logprobs)
    return loss, statistics, seen.logprobs, gradient


def _setup_logits(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(output[3])
    ctx.backend = backends.scaling(inputs[0].device, inputs[0].dtype)


def _backward_logits(ctx: Any, grad_loss: Tensor | None, *unused: Any) -> tuple[Any, ...]:
    (gradient,) = ctx.saved_tensors
    return () if grad_loss is None else (scaled(gradient, grad_loss, gradient.dtype, ctx.backend),)


autograd("logits_policy_loss", _backward_logits, _setup_logits)
