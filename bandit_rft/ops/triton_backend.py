"""Rows of logits, and the head fused with them, in Triton (kernels/): on a GPU, or in Triton's interpreter."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from torch import Tensor

from .backend import KINDS, KLS, Backend, Filters, Head, RowStatistics, Scaling, Stream, TokenInputs, ratio_bounds
from .objective import PolicyObjective
from .reference import Sample


class TritonBackend(Backend):
    """float32, bfloat16 and float16. A module of the kernels, and with it Triton, is imported when first needed."""

    name = "triton"
    writes_narrow = True

    def logprob_rows(self, logits: Tensor, targets: Tensor, scaling: Scaling) -> RowStatistics:
        """By kernels/policy_rows.py."""
        return RowStatistics(*_module("policy_rows").logprob_rows(logits, targets, *scaling))

    def gradient_rows(
        self, logits: Tensor, targets: Tensor, scaling: Scaling, grad_logprobs: Tensor, grad_entropy: Tensor | None,
        into: Tensor | None = None,
    ) -> RowStatistics:  # fmt: skip
        """By kernels/policy_rows.py."""
        seen = _module("policy_rows").gradient_rows(logits, targets, *scaling, grad_logprobs, grad_entropy, into)
        return RowStatistics(*seen)

    def policy_rows(
        self, logits: Tensor, targets: Tensor, scaling: Scaling, objective: PolicyObjective, inputs: TokenInputs,
        into: Tensor | None = None,
    ) -> RowStatistics:  # fmt: skip
        """By kernels/policy_rows.py."""
        o = objective
        seen = _module("policy_rows").policy_rows(
            logits, targets, *scaling, KINDS[o.kind], *ratio_bounds(o), o.dual_clip or 0.0,
            KLS[o.kl] if o.kl_coef else 0, o.kl_coef, o.entropy_coef, *inputs, into,
        )  # fmt: skip
        return RowStatistics(*seen)

    def sample_rows(self, logits: Tensor, scaling: Scaling, stream: Stream, filters: Filters) -> Sample:
        """By kernels/sample_rows.py."""
        return Sample(*_module("sample_rows").sample_rows(logits, *scaling, *stream, *filters))

    def scale_(self, gradient: Tensor, factor: Tensor) -> Tensor:
        """Without a visit of the gradient where the factor, which the host does not know, is 1."""
        scaled: Tensor = _module("scale_gradient").scale_(gradient, factor)
        return scaled

    def linear_logprobs(self, of: Head, targets: Tensor, scaling: Scaling, workspace: int) -> RowStatistics:
        """By kernels/linear_logprobs.py."""
        seen = _module("linear_logprobs").linear_logprobs(
            of.hidden, of.weight, targets, bias=of.bias, workspace=workspace, **_named(scaling)
        )
        return RowStatistics(*seen)

    def linear_sample(self, of: Head, scaling: Scaling, stream: Stream, workspace: int) -> Sample:
        """By kernels/linear_sample.py."""
        drawn = _module("linear_sample").linear_sample(
            of.hidden, of.weight, **stream._asdict(), bias=of.bias, workspace=workspace, **_named(scaling)
        )
        return Sample(*drawn)


def _module(name: str) -> Any:
    return import_module(f"bandit_rft.kernels.{name}")


def _named(scaling: Scaling) -> dict[str, Any]:
    return {"temperature": scaling.divisor, "softcap": scaling.softcap, "logit_scale": scaling.logit_scale}
