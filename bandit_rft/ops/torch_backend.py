"""Rows of logits in plain PyTorch: the formulas of csrc/row_math.h, a tensor at a time. Any device and dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .backend import Backend, Filters, RowStatistics, Scaling, Stream, TokenInputs
from .objective import PolicyObjective, token_coefficients
from .reference import Sample, computing_dtype


class TorchBackend(Backend):
    """Serves every call."""

    name = "torch"
    copies_of_logits = 10  # z, log p, p, dz and temporaries beside the logits

    def logprob_rows(self, logits: Tensor, targets: Tensor, scaling: Scaling) -> RowStatistics:
        """The definition of reference.py on a chunk."""
        return _statistics(scaled_in_computing_dtype(logits, scaling), targets)

    def gradient_rows(
        self, logits: Tensor, targets: Tensor, scaling: Scaling, grad_logprobs: Tensor, grad_entropy: Tensor | None,
        into: Tensor | None = None,
    ) -> RowStatistics:  # fmt: skip
        """The gradient in closed form (`_write_gradient`)."""
        z = scaled_in_computing_dtype(logits, scaling)
        seen = _statistics(z, targets)
        _write_gradient(logits if into is None else into, z, targets, scaling, seen, grad_logprobs, grad_entropy)
        return seen

    def policy_rows(
        self, logits: Tensor, targets: Tensor, scaling: Scaling, objective: PolicyObjective, inputs: TokenInputs,
        into: Tensor | None = None,
    ) -> RowStatistics:  # fmt: skip
        """The same gradient, with the coefficients of objective.py."""
        z = scaled_in_computing_dtype(logits, scaling)
        seen = _statistics(z, targets)
        given = given_gradients(objective, seen.logprobs, inputs)
        _write_gradient(logits if into is None else into, z, targets, scaling, seen, *given)
        return seen

    def sample_rows(self, logits: Tensor, scaling: Scaling, stream: Stream, filters: Filters) -> Sample:
        """The definition of reference.py on a chunk."""
        return reference.sample(scaled_in_computing_dtype(logits, scaling), **stream._asdict(), **filters._asdict())


def given_gradients(objective: PolicyObjective, logprobs: Tensor, inputs: TokenInputs) -> tuple[Tensor, Tensor | None]:
    """dL/dlogprob and dL/dentropy [N] of an objective whose tokens are separable."""
    nowhere = torch.empty(0, dtype=torch.int64, device=logprobs.device)  # only gspo looks at sequences
    coefficients = token_coefficients(
        objective, logprobs, inputs.advantages, inputs.weights, inputs.behavior, inputs.reference, nowhere, nowhere
    )
    return coefficients, -objective.entropy_coef * inputs.weights if objective.entropy_coef else None


def scaled_in_computing_dtype(logits: Tensor, scaling: Scaling) -> Tensor:
    """z [N, V] of raw logits."""
    return scaling.scaled(logits.to(computing_dtype(logits)))


def _statistics(z: Tensor, targets: Tensor) -> RowStatistics:
    """A target outside [0, V) gives NaN (and is counted as such) where it cannot raise: on a GPU, without waiting."""
    inside = (targets >= 0) & (targets < z.shape[-1])
    logp, entropy = reference.logprobs_and_entropy(z, targets.clamp(0, z.shape[-1] - 1))
    return RowStatistics(torch.where(inside, logp, torch.nan), entropy)


def _write_gradient(
    out: Tensor, z: Tensor, targets: Tensor, scaling: Scaling, seen: RowStatistics,
    grad_logprobs: Tensor, grad_entropy: Tensor | None,
) -> None:  # fmt: skip
    columns, everywhere = targets.clamp(0, z.shape[-1] - 1), torch.ones_like(targets, dtype=torch.bool)
    write_gradient(out, z, torch.logsumexp(z, -1), columns, everywhere, scaling, seen, grad_logprobs, grad_entropy)


def write_gradient(
    out: Tensor, z: Tensor, lse: Tensor, columns: Tensor, here: Tensor, scaling: Scaling, seen: RowStatistics,
    grad_logprobs: Tensor, grad_entropy: Tensor | None,
) -> None:  # fmt: skip
    """dz = c ([j = target] - p) + e p (log p + entropy), through temperature, softcap and logit scale, into `out`.

    `columns` [N]: where in z a row's target is, if it is `here` [N].
    """
    c, columns = grad_logprobs.to(z.dtype)[:, None], columns[:, None]
    every_logp = z - lse[:, None]
    p = every_logp.exp()
    dz = -c * p
    at_target = -c * torch.expm1(seen.logprobs[:, None])  # p_target - 1 without cancellation
    if grad_entropy is not None:
        e = -grad_entropy.to(z.dtype)[:, None]
        pull = e * p * (every_logp.clamp(min=torch.finfo(z.dtype).min) + seen.entropy[:, None])
        dz += pull
        at_target += pull.gather(1, columns)
    dz.scatter_(1, columns, torch.where(here[:, None], at_target, dz.gather(1, columns)))
    divisor = scaling.temperature if scaling.temperatures is None else scaling.temperatures[:, None]
    if scaling.softcap is not None:
        dz *= 1 - (z * divisor / scaling.softcap) ** 2
    out.copy_(dz * (scaling.logit_scale / divisor))
