"""Rows of logits: their log-probabilities, their gradients (in place) and draws from them, on the backend that serves.

`logits` are raw: hidden . weight^T + bias, before logit scale, softcap and temperature, which `Scaling` carries.
The torch implementations are the formulas of csrc/row_math.h, a tensor at a time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack  # type: ignore[attr-defined]

from . import backends, reference
from .objective import PolicyObjective, token_coefficients
from .reference import Sample, computing_dtype, scaled_logits


class Scaling(NamedTuple):
    temperature: float | Tensor = 1.0  # a float, or float32 [N]
    softcap: float | None = None
    logit_scale: float = 1.0

    def rows(self, index: slice | Tensor) -> Scaling:
        """The scaling of some of the rows."""
        return self._replace(temperature=self.temperature[index]) if isinstance(self.temperature, Tensor) else self

    def scaled(self, logits: Tensor) -> Tensor:
        return scaled_logits(logits, *self)


class TokenInputs(NamedTuple):
    """What the objective needs to know of each row, [N] each."""

    advantages: Tensor
    weights: Tensor
    behavior: Tensor | None
    reference: Tensor | None

    def rows(self, index: slice | Tensor) -> TokenInputs:
        return TokenInputs(*(None if t is None else t[index] for t in self))  # type: ignore[arg-type]


def logprobs(logits: Tensor, targets: Tensor, scaling: Scaling) -> tuple[Tensor, Tensor]:
    """(logprobs [N], entropy [N]); logits [N, V] are only read."""
    if backends.select(logits.device, logits.dtype) == "cpu":
        out = _statistics_like(logits)
        _native().logprob_rows(_dl(logits), _dl(targets), *_native_scaling(scaling), *map(_dl, out), _threads())
        return out
    z = scaling.scaled(logits.to(computing_dtype(logits)))
    return _safe_logprobs(z, targets)


def gradient_(
    logits: Tensor, targets: Tensor, scaling: Scaling, grad_logprobs: Tensor, grad_entropy: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Write dL/dlogits over logits [N, V], given dL/dlogprob and dL/dentropy [N]; returns (logprobs, entropy)."""
    if backends.select(logits.device, logits.dtype) == "cpu":
        out = _statistics_like(logits)
        _native().gradient_rows(
            _dl(logits), _dl(targets), *_native_scaling(scaling),
            _dl(grad_logprobs), _dl(grad_entropy), *map(_dl, out), _threads(),
        )  # fmt: skip
        return out
    z = scaling.scaled(logits.to(computing_dtype(logits)))
    logp, entropy = _safe_logprobs(z, targets)
    _write_gradient(logits, z, targets, scaling, logp, entropy, grad_logprobs, grad_entropy)
    return logp, entropy


_KINDS = {"reinforce": 1, "importance": 2, "ppo": 3, "cispo": 4}
_KLS = {"none": 0, "k1": 1, "k2": 2, "k3": 3}


def policy_(
    logits: Tensor, targets: Tensor, scaling: Scaling, objective: PolicyObjective, inputs: TokenInputs
) -> tuple[Tensor, Tensor]:
    """As `gradient_`, with the coefficients of a token-separable objective computed on the way (one visit of a row)."""
    o = objective
    if backends.select(logits.device, logits.dtype) == "cpu":
        out = _statistics_like(logits)
        low, high = 1 - o.clip_low, (o.importance_cap if o.kind == "importance" else 1 + o.clip_high)
        _native().policy_rows(
            _dl(logits), _dl(targets), *_native_scaling(scaling),
            _KINDS[o.kind], low, high, o.dual_clip or 0.0, _KLS[o.kl] if o.kl_coef else 0, o.kl_coef, o.entropy_coef,
            *map(_dl, inputs), *map(_dl, out), _threads(),
        )  # fmt: skip
        return out
    z = scaling.scaled(logits.to(computing_dtype(logits)))
    logp, entropy = _safe_logprobs(z, targets)
    nowhere = torch.empty(0, dtype=torch.int64, device=logits.device)  # only gspo looks at sequences
    coefficients = token_coefficients(
        o, logp, inputs.advantages, inputs.weights, inputs.behavior, inputs.reference, nowhere, nowhere
    )
    of_entropy = -o.entropy_coef * inputs.weights if o.entropy_coef else None
    _write_gradient(logits, z, targets, scaling, logp, entropy, coefficients, of_entropy)
    return logp, entropy


def sample(
    logits: Tensor,
    scaling: Scaling,
    *,
    seed: Tensor,
    sequence_ids: Tensor,
    positions: Tensor,
    top_k: int,
    top_p: float,
    min_p: float,
) -> Sample:
    """One draw a row of logits [B, V]."""
    if backends.select(logits.device, logits.dtype) == "cpu":
        rows = logits.shape[0]
        out = (torch.empty(rows, dtype=torch.int64), *(torch.empty(rows) for _ in range(4)))
        _native().sample_rows(
            _dl(logits), *_native_scaling(scaling), int(seed.item()) & 0xFFFFFFFFFFFFFFFF,
            _dl(sequence_ids), _dl(positions), top_k, top_p, min_p, *map(_dl, out), _threads(),
        )  # fmt: skip
        return Sample(*out)
    z = scaling.scaled(logits.to(computing_dtype(logits)))
    return reference.sample(
        z, seed=seed, sequence_ids=sequence_ids, positions=positions, top_k=top_k, top_p=top_p, min_p=min_p
    )


def batch_invariant_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """hidden [B, H] . weight [V, H]^T + bias into out [B, V] float32; a row has the same bits in any batch (cpu)."""
    wide_bias = None if bias is None else bias.to(torch.float32).contiguous()
    _native().head_logits(_dl(hidden), _dl(weight), _dl(wide_bias), _dl(out), _threads())
    return out


def _safe_logprobs(z: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """A target outside [0, V) gives NaN (and is counted as such) where it cannot raise: on a GPU, without waiting."""
    inside = (targets >= 0) & (targets < z.shape[-1])
    logp, entropy = reference.logprobs_and_entropy(z, targets.clamp(0, z.shape[-1] - 1))
    return torch.where(inside, logp, torch.nan), entropy


def _write_gradient(
    out: Tensor, z: Tensor, targets: Tensor, scaling: Scaling, logp: Tensor, entropy: Tensor,
    grad_logprobs: Tensor, grad_entropy: Tensor | None,
) -> None:  # fmt: skip
    """dz = c ([j = target] - p) + e p (log p + entropy), through temperature, softcap and logit scale, into `out`."""
    c = grad_logprobs.to(z.dtype)[:, None]
    targets = targets.clamp(0, z.shape[-1] - 1)[:, None]
    every_logp = z - torch.logsumexp(z, -1, keepdim=True)
    p = every_logp.exp()
    dz = -c * p
    at_target = -c * torch.expm1(logp[:, None])  # p_target - 1 without cancellation
    if grad_entropy is not None:
        e = -grad_entropy.to(z.dtype)[:, None]
        pull = e * p * (every_logp.clamp(min=torch.finfo(z.dtype).min) + entropy[:, None])
        dz += pull
        at_target += pull.gather(1, targets)
    dz.scatter_(1, targets, at_target)
    temperature = scaling.temperature
    divisor = temperature[:, None] if isinstance(temperature, Tensor) else temperature
    if scaling.softcap is not None:
        dz *= 1 - (z * divisor / scaling.softcap) ** 2
    out.copy_(dz * (scaling.logit_scale / divisor))


def _native() -> Any:
    return backends.native


def _threads() -> int:
    return torch.get_num_threads()


def _statistics_like(logits: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty(logits.shape[0]), torch.empty(logits.shape[0])


def _dl(tensor: Tensor | None) -> Any:
    """A borrowed DLPack capsule, as the compiled core takes it."""
    return None if tensor is None else to_dlpack(tensor.detach())


def _native_scaling(scaling: Scaling) -> tuple[float, Any, float, float]:
    if isinstance(scaling.temperature, Tensor):
        return 1.0, _dl(scaling.temperature), scaling.softcap or 0.0, scaling.logit_scale
    return scaling.temperature, None, scaling.softcap or 0.0, scaling.logit_scale
