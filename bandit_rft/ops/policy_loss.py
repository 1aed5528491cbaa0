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

from . import checks, rows
from .logprobs import HeadGradients, empty_gradients, joined, linear_logprobs, split, with_unit_columns
from .objective import STATISTICS, PolicyObjective, loss_and_statistics, token_coefficients, token_weights
from .reference import computing_dtype
from .registry import autograd, operation
from .rows import Scaling, TokenInputs


class PolicyLoss(NamedTuple):
    """A scalar loss to call .backward() on, and what was seen while computing it (no graph)."""

    loss: Tensor  # 0-d
    stats: dict[str, Tensor]  # 0-d each; see `objective.STATISTICS`
    logprobs: Tensor  # [N]; NaN for rows that were dropped


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
) -> PolicyLoss:
    """The policy-gradient loss of N completion tokens of B packed sequences, from the head, never building [N, V].

    Args:
        hidden: [N, H]; weight: [V, H]; targets: [N] int64; bias, temperature, softcap, logit_scale: as in
            `linear_logprobs`.
        advantages: [B] (one a sequence) or [N] (one a token). Tokens with advantage 0 are not computed at all, unless
            the objective's KL or entropy terms make them count; the normalizer does not change.
        cu_seqlens: [B + 1] int32, where sequences begin and end in N, from 0 to N.
        objective: what is minimized (PolicyObjective).
        behavior_logprobs: [N] of the policy that drew the tokens; None means this very policy (ratio 1, with gradient).
        reference_logprobs: [N], needed for a KL term.
        normalizer: the D of the objective's aggregation, so that micro-batches or ranks add up to exactly the whole.
        weight_grad: [V, H] float32 (such as weight.grad): the weight's gradient is added straight into it, here and
            now, and autograd returns none for the weight. The loss must then be backpropagated unscaled.
        gradient_threshold: above 0, the products of hidden's and weight's gradient leave out every block of 128
            vocabulary entries in which no |dL/dlogit| of the chunk of tokens at hand reaches this share of the largest
            |advantage x token weight|. An approximation (docs/operations.md has its error); the loss stays exact.

    Returns:
        PolicyLoss(loss, stats, logprobs). Gradients (hidden, weight, bias) are ready when this returns; .backward()
        hands them on. An empty batch has loss 0 and zero gradients.

    Raises:
        ValueError, TypeError: naming the argument, before anything is computed.
    """
    checks.head(hidden, weight, bias, "N")
    n = hidden.shape[0]
    checks.per_row("targets", targets, n, "N", hidden, torch.int64)
    checks.scaling(temperature, softcap, logit_scale, n, "N", hidden)
    tokens = _token_arguments(
        objective, advantages, cu_seqlens, behavior_logprobs, reference_logprobs, normalizer, hidden, n
    )
    if not isinstance(gradient_threshold, (int, float)) or not 0 <= gradient_threshold < 1:
        raise ValueError(f"gradient_threshold must be a number >= 0 and < 1; got {gradient_threshold!r}")
    arguments = (
        targets, *tokens, *split(temperature), softcap, logit_scale, *_fields(objective), float(gradient_threshold)
    )  # fmt: skip
    if weight_grad is not None:
        _check_weight_grad(weight_grad, weight, hidden)
        return PolicyLoss(*_named(*_AccumulatingLoss.apply(hidden, weight, bias, weight_grad, *arguments)))  # type: ignore[no-untyped-call]
    wanted = [_wants(hidden), _wants(weight), bias is not None and _wants(bias)]
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
    """As `linear_policy_loss`, from logits [N, V] that exist already; beside them only their gradient is allocated."""
    checks.logits(logits, "N")
    n = logits.shape[0]
    checks.per_row("targets", targets, n, "N", logits, torch.int64)
    checks.scaling(temperature, softcap, logit_scale, n, "N", logits)
    tokens = _token_arguments(
        objective, advantages, cu_seqlens, behavior_logprobs, reference_logprobs, normalizer, logits, n
    )
    arguments = (targets, *tokens, *split(temperature), softcap, logit_scale, *_fields(objective))
    loss, stats, logprobs, _ = _logits_policy_loss(logits, *arguments, _wants(logits))
    return PolicyLoss(*_named(loss, stats, logprobs))


def _wants(tensor: Tensor) -> bool:
    return tensor.requires_grad and torch.is_grad_enabled()


def _named(loss: Tensor, stats: Tensor, logprobs: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    return loss, dict(zip(STATISTICS, stats.detach().unbind(), strict=True)), logprobs.detach()


def _fields(o: PolicyObjective) -> tuple[Any, ...]:
    """The objective as a custom operation can take it: what `_objective` puts together again."""
    bounds = [o.clip_low, o.clip_high, o.dual_clip or 0.0, o.importance_cap]
    return o.kind, bounds, o.kl if o.kl_coef else "none", [o.kl_coef, o.entropy_coef]


def _objective(kind: str, bounds: list[float], kl: str, coefficients: list[float]) -> PolicyObjective:
    # The aggregation is in the token weights by now.
    return PolicyObjective(
        kind=kind, clip_low=bounds[0], clip_high=bounds[1], dual_clip=bounds[2] or None, importance_cap=bounds[3],  # type: ignore[arg-type]
        kl=kl, kl_coef=coefficients[0], entropy_coef=coefficients[1],  # type: ignore[arg-type]
    )  # fmt: skip


def _token_arguments(
    objective: PolicyObjective, advantages: Tensor, cu_seqlens: Tensor,
    behavior: Tensor | None, reference: Tensor | None, normalizer: float | Tensor | None, like: Tensor, n: int,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor, Tensor, Tensor]:  # fmt: skip
    """Check what describes the tokens and bring it to one entry a token.

    (advantages [N], weights [N], behavior, reference, sequence_of [N], lengths [B], cu_seqlens)
    """
    if not isinstance(objective, PolicyObjective):
        raise TypeError(f"objective must be a PolicyObjective; got {type(objective).__name__}")
    dtype = computing_dtype(like)
    cu = checks.sequences(cu_seqlens, n, like)
    b = cu.shape[0] - 1
    adv = checks.tensor("advantages", advantages, 1, "[B] or [N]")
    if adv.shape[0] not in (b, n):
        raise ValueError(f"advantages must be [B] with B = {b} or [N] with N = {n}; got {checks.shape_of(adv)}")
    checks.floating("advantages", adv)
    checks.same_device("advantages", adv, "hidden", like)
    vectors: list[Tensor | None] = []
    for name, value in (("behavior_logprobs", behavior), ("reference_logprobs", reference)):
        if value is not None:
            value = checks.per_row(name, value, n, "N", like).detach().to(dtype).contiguous()
        vectors.append(value)
    if objective.kl_coef and reference is None:
        raise ValueError(f"reference_logprobs must be given for kl={objective.kl!r} with kl_coef={objective.kl_coef}")
    if isinstance(normalizer, Tensor):
        if normalizer.dim() != 0:
            raise ValueError(
                f"normalizer must be a number > 0 or a 0-d tensor; got shape {checks.shape_of(normalizer)}"
            )
    elif normalizer is not None:
        checks.positive("normalizer", normalizer)
    if b == 0 and n > 0:
        raise ValueError(f"cu_seqlens must be increasing from 0 to N = {n}; got {checks.shape_of(cu)} (no sequence)")
    _check_sequences(cu, n)
    lengths = torch.diff(cu.long())
    sequence_of = torch.repeat_interleave(lengths, output_size=n)
    adv = adv.detach().to(dtype)
    adv = adv if adv.shape[0] == n else adv[sequence_of]
    weights = token_weights(objective, lengths, sequence_of, normalizer).to(dtype)
    return adv.contiguous(), weights.contiguous(), vectors[0], vectors[1], sequence_of, lengths, cu


def _check_sequences(cu_seqlens: Tensor, tokens: int) -> None:
    # While tracing there are no values to see: the operation itself checks them when it runs.
    if not torch.compiler.is_compiling():
        checks.sequence_values(cu_seqlens, tokens)


def _check_weight_grad(weight_grad: Tensor, weight: Tensor, hidden: Tensor) -> None:
    checks.tensor("weight_grad", weight_grad, 2, "[V, H]")
    if weight_grad.shape != weight.shape:
        raise ValueError(f"weight_grad must be [V, H] = {checks.shape_of(weight)}; got {checks.shape_of(weight_grad)}")
    if weight_grad.dtype != computing_dtype(hidden):
        raise TypeError(f"weight_grad must be {computing_dtype(hidden)}; got {weight_grad.dtype}")
    checks.same_device("weight_grad", weight_grad, "hidden", hidden)


# --- head -------------------------------------------------------------------------------------------------------------


def _compute(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor,
    advantages: Tensor, weights: Tensor, behavior: Tensor | None, reference: Tensor | None,
    sequence_of: Tensor, lengths: Tensor, cu_seqlens: Tensor,
    temperature: float, temperatures: Tensor | None, softcap: float | None, logit_scale: float,
    kind: str, bounds: list[float], kl: str, coefficients: list[float], gradient_threshold: float,
    gradients: HeadGradients | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss, statistics, logprobs [N]); gradients, where wanted, are added to `gradients`."""
    _check_values(targets, weight.shape[0], temperatures, advantages, behavior, reference)
    objective = _objective(kind, bounds, kl, coefficients)
    scaling = Scaling(joined(temperature, temperatures), softcap, logit_scale)
    inputs = TokenInputs(advantages, weights, behavior, reference)
    logp = torch.full_like(advantages, math.nan)
    entropy = torch.full_like(advantages, math.nan)
    index = rows_that_count(objective, advantages, sequence_of, lengths)
    every: Tensor | slice = slice(None) if index is None else index
    if gradients is not None and gradient_threshold and len(advantages):
        gradients.floor = gradient_threshold * float((advantages * weights).abs().max())

    if gradients is not None and objective.token_separable:

        def fill(z: Tensor, taken: slice | Tensor, into: Tensor | None) -> None:
            logp[taken], entropy[taken] = rows.policy_(
                z, targets[taken], scaling.rows(taken), objective, inputs.rows(taken), into
            )

        gradients.accumulate(index, fill)
    else:
        scored = linear_logprobs(
            hidden[every], weight, targets[every], bias=bias, temperature=scaling.rows(every).temperature,
            softcap=softcap, logit_scale=logit_scale, return_entropy=True,
        )  # fmt: skip
        logp[every], entropy[every] = scored
    computed = inputs.rows(every)
    loss, statistics = loss_and_statistics(
        objective, logp[every], entropy[every], *computed, sequence_of[every], lengths,
        tokens_skipped=0 if index is None else len(hidden) - len(index),
    )  # fmt: skip

    if gradients is not None and not objective.token_separable:
        c = torch.zeros_like(logp)
        c[every] = token_coefficients(objective, logp[every], *computed, sequence_of[every], lengths)
        of_entropy = -objective.entropy_coef * weights if objective.entropy_coef else None
        counts = c != 0 if of_entropy is None else torch.ones_like(c, dtype=torch.bool)
        index = counts.nonzero()[:, 0]
        still = None if len(index) == len(counts) else index

        def fill_given(z: Tensor, taken: slice | Tensor, into: Tensor | None) -> None:
            grad_entropy = None if of_entropy is None else of_entropy[taken]
            rows.gradient_(z, targets[taken], scaling.rows(taken), c[taken], grad_entropy, into)

        gradients.accumulate(still, fill_given)
    checks.finite_values("the logits", logp[every])
    return loss, statistics, logp


def rows_that_count(
    objective: PolicyObjective, advantages: Tensor, sequence_of: Tensor, lengths: Tensor
) -> Tensor | None:
    """The rows whose coefficient is not known to be zero (None: all of them), [n] int64."""
    if objective.every_token_counts:
        return None
    counts = advantages != 0  # a NaN advantage counts: it must be seen, not dropped
    if not objective.token_separable:  # one token moves the ratio that its whole sequence shares
        of_sequence = torch.zeros_like(lengths).index_add(0, sequence_of, counts.long())
        counts = (of_sequence > 0)[sequence_of]
    index = counts.nonzero()[:, 0]  # on a GPU the one time the host waits: how many rows there are to compute
    return None if len(index) == len(counts) else index


def _check_values(
    targets: Tensor, vocabulary: int, temperatures: Tensor | None, advantages: Tensor, behavior: Tensor | None,
    reference: Tensor | None,
) -> None:  # fmt: skip
    checks.target_values(targets, vocabulary)
    checks.temperature_values(temperatures)
    for name, vector in (
        ("advantages", advantages),
        ("behavior_logprobs", behavior),
        ("reference_logprobs", reference),
    ):
        checks.finite_values(name, vector)


def _fake_linear_policy_loss(
    hidden: Tensor, weight: Tensor, bias: Any, targets: Tensor, advantages: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    statistics = advantages.new_empty(len(STATISTICS))
    seen = advantages.new_empty(()), statistics, torch.empty_like(advantages)
    return (*seen, *empty_gradients(hidden, weight, bias, rest[-1]))


@operation("linear_policy_loss", fake=_fake_linear_policy_loss)
def _linear_policy_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor,
    advantages: Tensor, weights: Tensor, behavior: Tensor | None, reference: Tensor | None,
    sequence_of: Tensor, lengths: Tensor, cu_seqlens: Tensor,
    temperature: float, temperatures: Tensor | None, softcap: float | None, logit_scale: float,
    kind: str, bounds: list[float], kl: str, coefficients: list[float], gradient_threshold: float,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    checks.sequence_values(cu_seqlens, len(hidden))
    gradients = HeadGradients(hidden, weight, bias, wanted) if any(wanted) else None
    seen = _compute(
        hidden, weight, bias, targets, advantages, weights, behavior, reference, sequence_of, lengths, cu_seqlens,
        temperature, temperatures, softcap, logit_scale, kind, bounds, kl, coefficients, gradient_threshold, gradients,
    )  # fmt: skip
    nothing = [hidden.new_empty(0) for _ in range(3)]
    return (*seen, *(nothing if gradients is None else gradients.results()))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.wanted = inputs[-1]
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[3:])


def _backward(ctx: Any, grad_loss: Tensor | None, *unused: Any) -> tuple[Any, ...]:
    gradients = [
        scaled(gradient, grad_loss) if wanted and grad_loss is not None else None
        for gradient, wanted in zip(ctx.saved_tensors, ctx.wanted, strict=True)
    ]
    return (*gradients, *(None,) * 18)


autograd("linear_policy_loss", _backward, _setup)


def scaled(gradient: Tensor, grad_loss: Tensor) -> Tensor:
    """gradient * grad_loss without a second [V, H]: in place, and not at all where the factor is seen to be 1.

    (Autograd's version counter refuses a second backward pass over a gradient that was scaled in place.)
    """
    if type(grad_loss) is not Tensor or type(gradient) is not Tensor:  # being traced by torch.compile
        return gradient * grad_loss.to(gradient.dtype)
    if grad_loss.device.type == "cpu" and grad_loss.item() == 1.0:
        return gradient
    return gradient.mul_(grad_loss.to(gradient.dtype))


class _AccumulatingLoss(torch.autograd.Function):
    """linear_policy_loss with the weight's gradient added straight into a buffer that exists."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, weight_grad: Tensor, *arguments: Any
    ) -> Any:
        wanted = [ctx.needs_input_grad[0], False, ctx.needs_input_grad[2]]
        gradients = HeadGradients(hidden, weight, bias, wanted, weight_grad)
        checks.sequence_values(arguments[7], len(hidden))
        seen = _compute(hidden, weight, bias, *arguments, gradients)  # type: ignore[call-arg]
        gradients.weight = None  # it is where it belongs
        ctx.wanted = wanted
        ctx.save_for_backward(*gradients.results())
        ctx.mark_non_differentiable(*seen[1:])
        return seen

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *unused: Any) -> Any:
        # The weight's gradient was added for a factor of 1; any other would leave the two gradients at odds.
        torch._assert_async(grad_loss == 1)
        of_hidden, _, of_bias = (g if wanted else None for g, wanted in zip(ctx.saved_tensors, ctx.wanted, strict=True))
        return of_hidden, None, of_bias, *(None,) * 18


# --- logits -----------------------------------------------------------------------------------------------------------


def _fake_logits_policy_loss(
    logits: Tensor, targets: Tensor, advantages: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    contiguous = torch.contiguous_format
    gradient = torch.empty_like(logits, memory_format=contiguous) if rest[-1] else logits.new_empty(0)
    return advantages.new_empty(()), advantages.new_empty(len(STATISTICS)), torch.empty_like(advantages), gradient


@operation("logits_policy_loss", fake=_fake_logits_policy_loss)
def _logits_policy_loss(
    logits: Tensor, targets: Tensor,
    advantages: Tensor, weights: Tensor, behavior: Tensor | None, reference: Tensor | None,
    sequence_of: Tensor, lengths: Tensor, cu_seqlens: Tensor,
    temperature: float, temperatures: Tensor | None, softcap: float | None, logit_scale: float,
    kind: str, bounds: list[float], kl: str, coefficients: list[float], wanted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    checks.sequence_values(cu_seqlens, len(logits))
    _check_values(targets, logits.shape[1], temperatures, advantages, behavior, reference)
    objective = _objective(kind, bounds, kl, coefficients)
    scaling = Scaling(joined(temperature, temperatures), softcap, logit_scale)
    inputs = TokenInputs(advantages, weights, behavior, reference)
    of_entropy = -objective.entropy_coef * weights if objective.entropy_coef else None
    gradient = logits.clone(memory_format=torch.contiguous_format) if wanted else logits.new_empty(0)
    if wanted and objective.token_separable:
        logp, entropy = rows.policy_(gradient, targets, scaling, objective, inputs)
    else:
        logp, entropy = rows.logprobs(with_unit_columns(logits), targets, scaling)
    loss, statistics = loss_and_statistics(objective, logp, entropy, *inputs, sequence_of, lengths, tokens_skipped=0)
    if wanted and not objective.token_separable:
        c = token_coefficients(objective, logp, *inputs, sequence_of, lengths)
        rows.gradient_(gradient, targets, scaling, c, of_entropy)
    checks.finite_values("the logits", logp)
    return loss, statistics, logp, gradient


def _setup_logits(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(output[3])


def _backward_logits(ctx: Any, grad_loss: Tensor | None, *unused: Any) -> tuple[Any, ...]:
    (gradient,) = ctx.saved_tensors
    return (None if grad_loss is None else scaled(gradient, grad_loss), *(None,) * 17)


autograd("logits_policy_loss", _backward_logits, _setup_logits)
