"""What a policy loss is told of its tokens: checked, one entry a token, and as a custom operation takes it."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from . import checks
from .backend import TokenInputs
from .counted import ignored, zeroed
from .objective import Kind, KLEstimator, PolicyObjective, token_weights
from .reference import computing_dtype


class Sequences(NamedTuple):
    """Which sequence each token belongs to."""

    sequence_of: Tensor  # int64 [N]
    lengths: Tensor  # int64 [B]
    cu_seqlens: Tensor  # [B + 1]


class ObjectiveFields(NamedTuple):
    """A PolicyObjective as a custom operation can take it; the aggregation is in the token weights by then."""

    kind: str
    bounds: list[float]  # clip_low, clip_high, dual_clip (0: none), importance_floor, importance_cap
    kl: str
    coefficients: list[float]  # kl_coef, entropy_coef

    @classmethod
    def of(cls, o: PolicyObjective) -> ObjectiveFields:
        """The fields of an objective."""
        bounds = [o.clip_low, o.clip_high, o.dual_clip or 0.0, o.importance_floor, o.importance_cap]
        return cls(o.kind, bounds, o.kl if o.kl_coef else "none", [o.kl_coef, o.entropy_coef])

    def objective(self) -> PolicyObjective:
        """The objective again."""
        return _objective(self.kind, *self.bounds, self.kl, *self.coefficients)


@lru_cache(maxsize=64)
def _objective(
    kind: Kind, clip_low: float, clip_high: float, dual_clip: float, importance_floor: float, importance_cap: float,
    kl: KLEstimator, kl_coef: float, entropy_coef: float,
) -> PolicyObjective:  # fmt: skip
    return PolicyObjective(
        kind=kind, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip or None,
        importance_floor=importance_floor, importance_cap=importance_cap, kl=kl, kl_coef=kl_coef,
        entropy_coef=entropy_coef,
    )  # fmt: skip


class Selection(NamedTuple):
    """What of the computation may be left out."""

    skip_zero_rows: bool  # the rows whose coefficient is known to be zero
    gradient_threshold: float  # and the blocks of the vocabulary below this share of the largest gradient


def token_arguments(
    objective: PolicyObjective, targets: Tensor, advantages: Tensor, cu_seqlens: Tensor,
    behavior: Tensor | None, reference: Tensor | None, normalizer: float | Tensor | None, like: Tensor,
) -> tuple[TokenInputs, Sequences]:  # fmt: skip
    """Check what describes the tokens and bring it to one entry a token.

    A target that is not counted leaves its sequence's length and the normalizer; its token has only zeros.
    """
    n = like.shape[0]
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
    if b == 0 and n > 0:
        raise ValueError(f"cu_seqlens must be increasing from 0 to N = {n}; got {checks.shape_of(cu)} (no sequence)")
    _check_sequences(cu, n)
    lengths = torch.diff(cu.long())
    sequence_of = torch.repeat_interleave(lengths, output_size=n)
    adv = adv.detach().to(dtype)
    adv = _one_a_token(adv, lengths, sequence_of)
    divisor, mask = checks.normalizer(normalizer), ignored(targets)
    if mask is not None:
        lengths = torch.zeros_like(lengths).index_add(0, sequence_of, (~mask).long())
        if divisor is None and objective.aggregation == "token-mean":
            divisor = lengths.sum().clamp(min=1)
    weights = token_weights(objective, lengths, sequence_of, divisor).to(dtype)
    vectors = [None if vector is None else zeroed(vector, mask) for vector in vectors]
    inputs = TokenInputs(zeroed(adv, mask).contiguous(), zeroed(weights, mask).contiguous(), vectors[0], vectors[1])
    return inputs, Sequences(sequence_of, lengths, cu)


def _one_a_token(advantages: Tensor, lengths: Tensor, sequence_of: Tensor) -> Tensor:
    """[N], from [B] or [N]. With B = N both mean the same if every sequence has one token, and are refused if not."""
    if advantages.shape[0] != sequence_of.shape[0]:
        return advantages[sequence_of]
    if advantages.shape[0] != lengths.shape[0]:
        return advantages
    same = (lengths == 1).all()
    if not checks.readable(lengths):
        return torch.where(same, advantages, torch.nan)
    if not same:
        raise ValueError(
            f"advantages {checks.shape_of(advantages)} could be one a sequence or one a token: there are as many "
            "sequences as tokens, and some are empty. Leave out the empty sequences, with their advantages"
        )
    return advantages


def _check_sequences(cu_seqlens: Tensor, tokens: int) -> None:
    # While tracing there are no values to see: the operation itself checks them when it runs.
    if not torch.compiler.is_compiling():
        checks.sequence_values(cu_seqlens, tokens)


def check_weight_grad(weight_grad: Tensor, weight: Tensor, hidden: Tensor) -> None:
    """A buffer [V, H] in the computing dtype, with memory of its own for every entry."""
    checks.tensor("weight_grad", weight_grad, 2, "[V, H]")
    if weight_grad.shape != weight.shape:
        raise ValueError(f"weight_grad must be [V, H] = {checks.shape_of(weight)}; got {checks.shape_of(weight_grad)}")
    if weight_grad.dtype != computing_dtype(hidden):
        raise TypeError(f"weight_grad must be {computing_dtype(hidden)}; got {weight_grad.dtype}")
    checks.same_device("weight_grad", weight_grad, "hidden", hidden)
    if any(size > 1 and step == 0 for size, step in zip(weight_grad.shape, weight_grad.stride(), strict=True)):
        raise ValueError("weight_grad must have memory of its own for every entry; got an expanded tensor")
    if weight_grad.requires_grad:
        raise ValueError("weight_grad must not require a gradient itself: it is a buffer that one is added into")
