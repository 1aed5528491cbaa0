"""Log-probabilities and entropy whose gradient is ready when they are, if the loss turns out to be the expected one.

A trainer that computes its own loss from log-probabilities makes the head work twice: once for the log-probabilities,
once more when their gradients come back (8NHV). Where that loss can be foretold but for one factor (its normalizer,
gradient accumulation, a loss scale), its coefficients c_i = dL/dlogp_i are known row by row, so one pass over the
logits computes log-probabilities, entropy and both gradients (6NHV for rows with an advantage, 2NHV for the others):

    forward    logp_i, entropy_i, c_i, dH = sum_i c_i dlogp_i/dhidden, dW = sum_i c_i dlogp_i/dweight
    backward   given g_i = dL/dlogp_i:  s = (g . c) / (c . c)
               |g - s c| <= rounding: hand on s dH, s dW;  otherwise compute the gradients for g as linear_logprobs does

So the caller's loss always rules: an expectation that does not come true costs time, and never changes a gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import backends, checks
from .backend import Head, Scaling, TokenInputs
from .head_gradients import GivenGradients, HeadGradients
from .logprobs import _linear_logprobs_backward, score
from .objective import PolicyObjective, token_coefficients
from .ready_gradients import scaled
from .reference import computing_dtype
from .registry import once

#: How far the coefficients of the loss may be from the expected ones, in units of rounding of the largest.
ROUNDINGS = 128


@dataclass(frozen=True)
class Expectation:
    """The loss that is expected of log-probabilities [N]: sum_i weights_i l(logp_i, advantages_i), times any factor.

    Attributes:
        objective: its token loss l, of any kind but gspo, without an entropy term; its aggregation is in `weights`.
        advantages: [N].
        weights: [N], how much each token counts.
        behavior_logprobs: [N], or None for the ratio 1 with its gradient.
        reference_logprobs: [N], where the objective has a KL term.
    """

    objective: PolicyObjective
    advantages: Tensor
    weights: Tensor
    behavior_logprobs: Tensor | None = None
    reference_logprobs: Tensor | None = None

    def __post_init__(self) -> None:
        if not self.objective.token_separable or self.objective.entropy_coef:
            raise ValueError("objective must be of a kind other than gspo, and have no entropy term")

    def inputs(self, dtype: torch.dtype) -> TokenInputs:
        """As the backends take them."""
        given = (self.advantages, self.weights, self.behavior_logprobs, self.reference_logprobs)
        return TokenInputs(*(None if t is None else t.detach().to(dtype).contiguous() for t in given))  # type: ignore[arg-type]


class Outcome:
    """How often the expected loss was the one that came, over the life of the object."""

    def __init__(self) -> None:
        self.came_true = self.computed_again = 0


def expected_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, expectation: Expectation, outcome: Outcome, *,
    bias: Tensor | None = None, temperature: float = 1.0, softcap: float | None = None, logit_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(logprobs [N], entropy [N]), differentiable, as `linear_logprobs` gives them.

    Args:
        hidden: [N, H].
        weight: [V, H], hidden's dtype.
        targets: [N] int64 in [0, V); none that is not counted.
        expectation: the loss that is expected to be made of the log-probabilities.
        outcome: counts whether it was.
        bias: [V] or None.
        temperature: what the logits are divided by, last.
        softcap: c in c * tanh(z / c), or None.
        logit_scale: a factor of the logits, before the softcap.
    """
    checks.head(hidden, weight, bias, "N")
    checks.no_forward_mode(hidden, weight, bias)
    checks.per_row("targets", targets, hidden.shape[0], "N", hidden, torch.int64)
    checks.scaling(temperature, softcap, logit_scale, hidden.shape[0], "N", hidden)
    scaling = Scaling.of(temperature, softcap, logit_scale, computing_dtype(hidden))
    found: tuple[Tensor, Tensor] = _Expected.apply(hidden, weight, bias, targets, scaling, expectation, outcome)  # type: ignore[no-untyped-call]
    return found


class _Expected(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scaling: Scaling,
        expectation: Expectation, outcome: Outcome,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.set_materialize_grads(False)
        of, wanted = Head(hidden, weight, bias), list(ctx.needs_input_grad[:3])
        with torch.autocast(hidden.device.type, enabled=False):
            logp, entropy, c, gradients = _compute(of, wanted, targets, scaling, expectation)
        ctx.save_for_backward(hidden, weight, bias, targets, c, *gradients.results(rounded=False))
        ctx.scaling, ctx.outcome = scaling, outcome
        # Autograd may run the backward in a thread that knows nothing of `use_backend`.
        ctx.backend = backends.select(hidden.device, computing_dtype(hidden))
        ctx.scaling_backend = backends.scaling(hidden.device, computing_dtype(hidden))
        return logp, entropy

    @staticmethod
    def backward(ctx: Any, of_logprobs: Tensor | None, of_entropy: Tensor | None) -> Any:
        hidden, weight, bias, targets, c, *ready = ctx.saved_tensors
        of, wanted = Head(hidden, weight, bias), list(ctx.needs_input_grad[:3])
        found: tuple[Tensor | None, ...]
        if of_logprobs is None and of_entropy is None:
            found = (None, None, None)
        elif of_logprobs is not None and of_entropy is None and (factor := _factor(of_logprobs, c)) is not None:
            ctx.outcome.came_true += 1
            dtypes = [t.dtype if want and t is not None else None for t, want in zip(of, wanted, strict=True)]
            found = tuple(
                None if dtype is None else scaled(gradient, factor, dtype, ctx.scaling_backend)
                for gradient, dtype in zip(ready, dtypes, strict=True)
            )
        else:
            ctx.outcome.computed_again += 1
            given = GivenGradients(
                torch.zeros_like(c) if of_logprobs is None else of_logprobs.contiguous(),
                None if of_entropy is None else of_entropy.contiguous(),
            )
            with torch.no_grad():
                again = _linear_logprobs_backward(*of, targets, *ctx.scaling, *given, wanted, ctx.backend)
            found = tuple(g if want else None for g, want in zip(again, wanted, strict=True))
        return (*once(found), None, None, None, None)


def _compute(
    of: Head, wanted: list[bool], targets: Tensor, scaling: Scaling, expectation: Expectation
) -> tuple[Tensor, Tensor, Tensor, HeadGradients]:
    """(logprobs [N], entropy [N], coefficients [N], the gradients for these coefficients)."""
    checks.target_values(targets, len(of.weight))
    if checks.readable(targets) and bool((targets < 0).any()):  # such as -100, which other operations leave out
        raise ValueError(f"targets must lie in [0, V = {len(of.weight)}); got {int(targets.min())}")
    objective, dtype = expectation.objective, computing_dtype(of.hidden)
    inputs = expectation.inputs(dtype)
    backend = backends.serving(of.hidden.device, dtype)
    gradients = HeadGradients(of, wanted, backend)
    logp, entropy = torch.empty_like(inputs.advantages), torch.empty_like(inputs.advantages)
    one_sequence = torch.zeros_like(targets), torch.full_like(targets[:1], len(targets))
    index = None
    if not objective.every_token_counts:
        some = (inputs.advantages != 0).nonzero()[:, 0]
        index = None if len(some) == len(targets) else some
    into_products = inputs
    if gradients.narrow:  # what is multiplied is linear in the token weights
        slopes = (inputs.advantages.abs() + objective.kl_coef) * inputs.weights
        into_products = inputs._replace(weights=inputs.weights * gradients.magnify(slopes))

    def fill(z: Tensor, taken: slice | Tensor, into: Tensor | None) -> None:
        logp[taken], entropy[taken] = backend.policy_rows(
            z, targets[taken], scaling, objective, into_products.rows(taken), into
        )

    gradients.accumulate(index, fill)
    if index is not None:  # the others have no gradient, and are asked for all the same
        rest = torch.ones_like(targets, dtype=torch.bool).index_fill(0, index, False).nonzero()[:, 0]
        logp[rest], entropy[rest] = score(Head(of.hidden[rest], of.weight, of.bias), targets[rest], scaling)
    c = token_coefficients(objective, logp, *inputs, *one_sequence)
    checks.finite_values("the logits", logp)
    return logp, entropy, c, gradients


def _factor(given: Tensor, c: Tensor) -> Tensor | None:
    """s with given = s c to rounding, 0-d; None where there is none. On a GPU the host waits here."""
    squares = c @ c
    s = torch.where(squares > 0, (given @ c) / squares, 0.0)
    largest = given.abs().max() if len(given) else squares
    rounding = torch.finfo(c.dtype).eps
    if not bool(((given - s * c).abs() <= ROUNDINGS * rounding * largest).all()):  # a NaN is never near
        return None
    return torch.where((s - 1).abs() <= 4 * rounding, 1.0, s)
