"""The operations in plain PyTorch: the definition that every backend is tested against.

Nothing here is chunked, fused or clever: the [tokens x vocabulary] tensor exists and autograd does the rest. Inputs in
float64 are computed in float64 (the truth of the tests), anything else in float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .objective import PolicyObjective, loss_and_statistics, token_weights
from .philox import gumbel_noise, random_words

#: A target that is not counted, as PyTorch's own losses have it: as if its token were not there.
IGNORED = -100


class Sample(NamedTuple):
    """One token drawn for each of B rows, and what is known of it from the same pass.

    Attributes:
        tokens: [B] int64.
        logprobs: [B] float32, log-probability under the full softmax at this temperature.
        sampling_logprobs: [B] float32, log-probability under the distribution drawn from (after top-k, top-p, min-p).
        entropy: [B] float32, of the full softmax at this temperature, nats.
        kept_mass: [B] float32, probability that top-k, top-p and min-p kept; 1 without them.
    """

    tokens: Tensor
    logprobs: Tensor
    sampling_logprobs: Tensor
    entropy: Tensor
    kept_mass: Tensor


def computing_dtype(tensor: Tensor) -> torch.dtype:
    """What an operation computes and returns in: float64 for float64, float32 for everything else."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def scaled_logits(
    raw: Tensor, temperature: float | Tensor = 1.0, softcap: float | None = None, logit_scale: float = 1.0
) -> Tensor:
    """z [N, V] from hidden . weight^T + bias: scaled, soft-capped, divided by the temperature (float or [N])."""
    z = raw * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / (temperature[:, None] if isinstance(temperature, Tensor) else temperature)


def head_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """hidden [N, H] . weight [V, H]^T + bias [V], [N, V] in the computing dtype."""
    dtype = computing_dtype(hidden)
    raw = hidden.to(dtype) @ weight.to(dtype).T
    return raw if bias is None else raw + bias.to(dtype)


def logprobs_and_entropy(z: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(log softmax(z)[target] [N], entropy of softmax(z) [N]). A logit of -inf is a token that cannot occur."""
    z = z - z.detach().amax(-1, keepdim=True)  # else lse - sum p z cancels where logits are large
    lse = torch.logsumexp(z, dim=-1)
    logprobs = z.gather(-1, targets[:, None])[:, 0] - lse
    finite = z.clamp(min=torch.finfo(z.dtype).min)  # 0 * -inf must not become NaN
    return logprobs, lse - (torch.exp(z - lse[:, None]) * finite).sum(-1)


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """(logprobs [N], entropy [N]) of targets [N] under the head, both 0 where one is IGNORED; differentiable."""
    z = scaled_logits(head_logits(hidden, weight, bias), temperature, softcap, logit_scale)
    counted = (targets != IGNORED).nonzero()[:, 0]
    logprobs, entropy = logprobs_and_entropy(z[counted], targets[counted])
    zeros = z.new_zeros(len(z))
    return zeros.index_copy(0, counted, logprobs), zeros.index_copy(0, counted, entropy)


def policy_loss(
    logprobs: Tensor,
    entropy: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor,
    *,
    objective: PolicyObjective,
    behavior_logprobs: Tensor | None = None,
    reference_logprobs: Tensor | None = None,
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(loss 0-d, statistics) of per-token logprobs and entropy [N]; advantages [B] or [N]; differentiable."""
    lengths = torch.diff(cu_seqlens.long())
    sequence_of = torch.repeat_interleave(lengths)
    if advantages.shape[0] != logprobs.shape[0]:
        advantages = advantages[sequence_of]
    weights = token_weights(objective, lengths, sequence_of, normalizer).to(logprobs.dtype)
    return loss_and_statistics(
        objective, logprobs, entropy, advantages.to(logprobs.dtype), weights,
        behavior_logprobs, reference_logprobs, sequence_of, lengths, tokens_skipped=0,
    )  # fmt: skip


def kept_tokens(z: Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
    """Which tokens top-k, then top-p (of what top-k left), then min-p leave, bool [B, V].

    Tokens are ranked by logit, ties by the lower id. top-k keeps the first k; top-p the shortest prefix whose
    probability, renormalized after top-k, reaches top_p; min-p those at least min_p times as likely as the first.
    The first is always kept.
    """
    ordered, ids = torch.sort(z, dim=-1, descending=True, stable=True)
    rank = torch.arange(z.shape[-1], device=z.device)
    keep = torch.ones_like(ordered, dtype=torch.bool)
    if top_k > 0:
        keep &= rank < top_k
    relative = torch.exp((ordered - ordered[:, :1]).double())  # probability relative to the most likely token
    if top_p < 1:
        inside = relative * keep
        before = torch.cumsum(inside, -1) - inside
        keep &= before < top_p * inside.sum(-1, keepdim=True)
    if min_p > 0:
        keep &= relative >= min_p
    keep[:, 0] = True
    return torch.zeros_like(keep).scatter(-1, ids, keep)


def sample(
    z: Tensor,
    *,
    seed: Tensor,
    sequence_ids: Tensor,
    positions: Tensor,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Sample:
    """Draw from softmax(z) [B, V] (after top-k, top-p, min-p) with the noise of philox.py."""
    words = random_words(seed, sequence_ids, positions, z.shape[-1])
    perturbed = z + gumbel_noise(words, z.dtype)
    if filtered := top_k > 0 or top_p < 1 or min_p > 0:
        keep = kept_tokens(z, top_k, top_p, min_p)
        perturbed = perturbed.masked_fill(~keep, -torch.inf)
    tokens = perturbed.argmax(-1)
    logprobs, entropy = logprobs_and_entropy(z, tokens)
    if not filtered:
        return Sample(tokens, logprobs, logprobs.clone(), entropy, torch.ones_like(entropy))
    lse = torch.logsumexp(z, -1, keepdim=True)
    log_kept = torch.logsumexp(z.masked_fill(~keep, -torch.inf) - lse, -1)
    return Sample(tokens, logprobs, logprobs - log_kept, entropy, log_kept.exp())
