"""Rows of logits that exist already, on the backend that serves them, or on one that is named.

The operations on logits call these, as do the benchmarks; the head's operations choose once and call the backend.
"""

from __future__ import annotations

from torch import Tensor

from . import backends
from .backend import Backend, Filters, RowStatistics, Scaling, Stream, TokenInputs
from .objective import PolicyObjective
from .reference import Sample

__all__ = ["Filters", "Scaling", "Stream", "TokenInputs", "gradient_", "logprobs", "policy_", "sample"]


def _serving(logits: Tensor, backend: str | None = None) -> Backend:
    return backends.serving(logits.device, logits.dtype) if backend is None else backends.named(backend)


def logprobs(logits: Tensor, targets: Tensor, scaling: Scaling) -> RowStatistics:
    """(logprobs [N], entropy [N]); logits [N, V] are only read."""
    return _serving(logits).logprob_rows(logits, targets, scaling)


def gradient_(
    logits: Tensor, targets: Tensor, scaling: Scaling, grad_logprobs: Tensor, grad_entropy: Tensor | None,
    into: Tensor | None = None, backend: str | None = None,
) -> RowStatistics:  # fmt: skip
    """Write dL/dlogits over logits [N, V] (or `into`), given dL/dlogprob and dL/dentropy [N]."""
    return _serving(logits, backend).gradient_rows(logits, targets, scaling, grad_logprobs, grad_entropy, into)


def policy_(
    logits: Tensor, targets: Tensor, scaling: Scaling, objective: PolicyObjective, inputs: TokenInputs,
    into: Tensor | None = None,
) -> RowStatistics:  # fmt: skip
    """As `gradient_`, with the coefficients of a token-separable objective computed on the way (one visit of a row)."""
    return _serving(logits).policy_rows(logits, targets, scaling, objective, inputs, into)


def sample(logits: Tensor, scaling: Scaling, stream: Stream, filters: Filters) -> Sample:
    """One draw a row of logits [B, V]."""
    return _serving(logits).sample_rows(logits, scaling, stream, filters)
