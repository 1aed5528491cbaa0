"""Rows of logits: their log-probabilities, their gradients (in place) and draws from them, on the backend that serves.

`logits` are raw: hidden . weight^T + bias, before logit scale, softcap and temperature, which `Scaling` carries.
The torch implementations are the formulas of csrc/row_math.h, a tensor at a time.
"""

from __future__ import annotations

from importlib import import_module
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
    backend = backends.select(logits.device, logits.dtype)
    if backend == "triton":
        return _triton("policy_rows").logprob_rows(logits, targets, *_triton_scaling(scaling))  # type: ignore[no-any-return]
    if backend in ("cpu", "cuda"):
        out = _statistics_like(logits)
        core, place = _core(backend, logits)
        core.logprob_rows(_dl(logits), _dl(targets), *_native_scaling(scaling), *map(_dl, out), place)
        return out
    z = scaling.scaled(logits.to(computing_dtype(logits)))
    return _safe_logprobs(z, targets)


def gradient_(
    logits: Tensor, targets: Tensor, scaling: Scaling, grad_logprobs: Tensor, grad_entropy: Tensor | None,
    into: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Write dL/dlogits over logits [N, V], given dL/dlogprob and dL/dentropy [N]; returns (logprobs, entropy).

    `into`: where the cuda backend writes it instead, in fewer bits (head.narrow_gradient).
    """
    backend = backends.select(logits.device, logits.dtype)
    if backend == "triton":
        return _triton("policy_rows").gradient_rows(  # type: ignore[no-any-return]
            logits, targets, *_triton_scaling(scaling), grad_logprobs, grad_entropy
        )
    if backend in ("cpu", "cuda"):
        out = _statistics_like(logits)
        core, place = _core(backend, logits)
        core.gradient_rows(
            _dl(logits), _dl(targets), *_native_scaling(scaling),
            _dl(grad_logprobs), _dl(grad_entropy), *map(_dl, out), *([_dl(into)] if backend == "cuda" else []), place,
        )  # fmt: skip
        return out
    z = scaling.scaled(logits.to(computing_dtype(logits)))
    logp, entropy = _safe_logprobs(z, targets)
    _write_gradient(logits, z, targets, scaling, logp, entropy, grad_logprobs, grad_entropy)
    return logp, entropy


_KINDS = {"reinforce": 1, "importance": 2, "ppo": 3, "cispo": 4}
_KLS = {"none": 0, "k1": 1, "k2": 2, "k3": 3}


def policy_(
    logits: Tensor, targets: Tensor, scaling: Scaling, objective: PolicyObjective, inputs: TokenInputs,
    into: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `gradient_`, with the coefficients of a token-separable objective computed on the way (one visit of a row)."""
    o = objective
    backend = backends.select(logits.device, logits.dtype)
    low, high = 1 - o.clip_low, (o.importance_cap if o.kind == "importance" else 1 + o.clip_high)
    kl = _KLS[o.kl] if o.kl_coef else 0
    if backend == "triton":
        return _triton("policy_rows").policy_rows(  # type: ignore[no-any-return]
            logits, targets, *_triton_scaling(scaling),
            _KINDS[o.kind], low, high, o.dual_clip or 0.0, kl, o.kl_coef, o.entropy_coef, *inputs,
        )  # fmt: skip
    if backend in ("cpu", "cuda"):
        out = _statistics_like(logits)
        core, place = _core(backend, logits)
        core.policy_rows(
            _dl(logits), _dl(targets), *_native_scaling(scaling),
            _KINDS[o.kind], low, high, o.dual_clip or 0.0, kl, o.kl_coef, o.entropy_coef,
            *map(_dl, inputs), *map(_dl, out), *([_dl(into)] if backend == "cuda" else []), place,
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
    backend = backends.select(logits.device, logits.dtype)
    if backend == "triton":
        drawn = _triton("sample_rows").sample_rows(
            logits, *_triton_scaling(scaling), seed, sequence_ids, positions, top_k, top_p, min_p
        )
        return Sample(*drawn)
    if backend in ("cpu", "cuda"):
        rows, on = logits.shape[0], logits.device
        out = (torch.empty(rows, dtype=torch.int64, device=on), *(torch.empty(rows, device=on) for _ in range(4)))
        core, place = _core(backend, logits)
        core.sample_rows(
            _dl(logits), *_native_scaling(scaling),
            int(seed.item()) & 0xFFFFFFFFFFFFFFFF if backend == "cpu" else _dl(seed.reshape(1)),
            _dl(sequence_ids), _dl(positions), top_k, top_p, min_p, *map(_dl, out), place,
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


def _core(backend: str, logits: Tensor) -> tuple[Any, int]:
    """The compiled kernels, and what they take last: a number of threads, or the current stream of the logits' GPU."""
    if backend == "cpu":
        return _native(), _threads()
    return _native().cuda, torch.cuda.current_stream(logits.device).cuda_stream


def _statistics_like(logits: Tensor) -> tuple[Tensor, Tensor]:
    rows, on = logits.shape[0], logits.device
    return torch.empty(rows, device=on), torch.empty(rows, device=on)


def _dl(tensor: Tensor | None) -> Any:
    """A borrowed DLPack capsule, as the compiled core takes it."""
    return None if tensor is None else to_dlpack(tensor.detach())


def _triton(module: str) -> Any:
    return import_module(f"bandit_rft.kernels.{module}")  # Triton is imported when it is first needed


def _triton_scaling(scaling: Scaling) -> tuple[float, Tensor | None, float | None, float]:
    if isinstance(scaling.temperature, Tensor):
        return 1.0, scaling.temperature, scaling.softcap, scaling.logit_scale
    return scaling.temperature, None, scaling.softcap, scaling.logit_scale


def fused_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, scaling: Scaling
) -> tuple[Tensor, Tensor]:
    """(logprobs [N], entropy [N]) from the head in one kernel (where `backends.fused_head`)."""
    return _triton("linear_logprobs").linear_logprobs(  # type: ignore[no-any-return]
        hidden, weight, targets, bias=bias, workspace=backends.workspace_bytes(hidden.device), **scaling._asdict()
    )


def fused_sample(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scaling: Scaling,
    *, seed: Tensor, sequence_ids: Tensor, positions: Tensor,
) -> Sample:  # fmt: skip
    """One draw a row from the head's whole softmax in one kernel (where `backends.fused_head`)."""
    drawn = _triton("linear_sample").linear_sample(
        hidden, weight, seed=seed, sequence_ids=sequence_ids, positions=positions, bias=bias,
        workspace=backends.workspace_bytes(hidden.device), **scaling._asdict(),
    )  # fmt: skip
    return Sample(*drawn)


def _native_scaling(scaling: Scaling) -> tuple[float, Any, float, float]:
    if isinstance(scaling.temperature, Tensor):
        return 1.0, _dl(scaling.temperature), scaling.softcap or 0.0, scaling.logit_scale
    return scaling.temperature, None, scaling.softcap or 0.0, scaling.logit_scale
