"""Draw one token a row and its probability from one pass: over the head, or over logits that exist.

    token = argmax_j z_j + g_j,  g_j Gumbel noise of (seed, sequence id, position, j)        (the Gumbel-max trick)

A row's draw does not depend on the batch it is in. On the cpu backend neither do the bits of its statistics: the head's
product sums every logit in the same order whatever the batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from . import backends, checks, head, rows
from .backend import Backend, Filters, Head, Scaling, Stream
from .logprobs import with_unit_columns
from .reference import Sample, computing_dtype
from .registry import operation
from .vocab_parallel import Shard, VocabParallelBackend


def linear_sample(
    hidden: Tensor,
    weight: Tensor,
    *,
    seed: int | Tensor,
    sequence_ids: Tensor,
    positions: Tensor,
    temperature: float | Tensor = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    process_group: ProcessGroup | None = None,
) -> Sample:
    """Draw the next token of B sequences from the LM head.

    Args:
        hidden: [B, H] float32, bfloat16, float16 or float64: the last hidden state of each sequence.
        weight: [V, H], hidden's dtype.
        seed: a 64-bit integer, or a 0-d int64 tensor (for CUDA graphs).
        sequence_ids: [B] int64, which random stream a row draws from.
        positions: [B] int64 in [0, 2^32), where in the stream: usually the index of the token in its completion.
        temperature: a float, or [B] (one for each row): what the logits are divided by, last.
        top_k: keep the k most likely tokens of the tempered softmax; 0 keeps every token, 1 is greedy.
        top_p: then keep the most likely tokens that make up this mass; 1 keeps every token.
        min_p: then keep the tokens at least this likely relative to the most likely one; 0 keeps every token.
        bias: [V] or None, added to the logits before anything else.
        softcap: c in c * tanh(z / c), or None.
        logit_scale: a factor of the logits, before the softcap.
        process_group: weight (and bias) are this rank's slice of the vocabulary; all else is the same on every rank, as
            is the result, which is what one process would draw from the whole head (vocab_parallel.py).

    Returns:
        Sample(tokens, logprobs, sampling_logprobs, entropy, kept_mass), each [B]. `logprobs` are under the full softmax
        at this temperature, `sampling_logprobs` under what was drawn from. Nothing is differentiable.

    Raises:
        ValueError, TypeError: naming the argument, before anything is computed.
    """
    checks.head(hidden, weight, bias, "B")
    checks.scaling(temperature, softcap, logit_scale, hidden.shape[0], "B", hidden)
    stream = stream_of(seed, sequence_ids, positions, hidden)
    checks.filters(top_k, top_p, min_p)
    of = Head(hidden.detach(), weight.detach(), None if bias is None else bias.detach())
    filters = Filters(top_k, float(top_p), float(min_p))
    scaling = Scaling.of(temperature, softcap, logit_scale, computing_dtype(hidden))
    if process_group is not None:
        return Sample(*_vocab_parallel(of, stream, scaling, filters, process_group))
    return Sample(*_linear_sample(*of, *stream, *scaling, *filters))


def sample_from_logits(
    logits: Tensor,
    *,
    seed: int | Tensor,
    sequence_ids: Tensor,
    positions: Tensor,
    temperature: float | Tensor = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Sample:
    """Draw the next token of B sequences from logits that exist already.

    Args:
        logits: [B, V] float32, bfloat16, float16 or float64; -inf is a token that cannot be drawn.
        seed: a 64-bit integer, or a 0-d int64 tensor (for CUDA graphs).
        sequence_ids: [B] int64, which random stream a row draws from.
        positions: [B] int64 in [0, 2^32), where in the stream.
        temperature: a float, or [B] (one for each row): what the logits are divided by, last.
        top_k: keep the k most likely tokens of the tempered softmax; 0 keeps every token, 1 is greedy.
        top_p: then keep the most likely tokens that make up this mass; 1 keeps every token.
        min_p: then keep the tokens at least this likely relative to the most likely one; 0 keeps every token.
        softcap: c in c * tanh(z / c), or None.
        logit_scale: a factor of the logits, before the softcap.

    Returns:
        Sample, as `linear_sample`.

    Raises:
        ValueError, TypeError: naming the argument, before anything is computed.
    """
    checks.logits(logits, "B")
    checks.scaling(temperature, softcap, logit_scale, logits.shape[0], "B", logits)
    stream = stream_of(seed, sequence_ids, positions, logits)
    checks.filters(top_k, top_p, min_p)
    filters = Filters(top_k, float(top_p), float(min_p))
    scaling = Scaling.of(temperature, softcap, logit_scale, computing_dtype(logits))
    return Sample(*_logits_sample(logits.detach(), *stream, *scaling, *filters))


def stream_of(seed: int | Tensor, sequence_ids: Tensor, positions: Tensor, like: Tensor) -> Stream:
    """The checked random streams of the rows of `like`; the seed is a tensor on their device."""
    if isinstance(seed, Tensor):
        if seed.dim() != 0 or seed.dtype != torch.int64:
            raise TypeError(f"seed must be an int or a 0-d int64 tensor; got {seed.dtype} {checks.shape_of(seed)}")
        checks.same_device("seed", seed, "hidden", like)
    elif isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an int or a 0-d int64 tensor; got {type(seed).__name__}")
    elif not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must fit 64 bits; got {seed}")
    else:
        signed = seed - 2**64 if seed >= 2**63 else seed
        seed = torch.full((), signed, dtype=torch.int64, device=like.device)
    checks.per_row("sequence_ids", sequence_ids, like.shape[0], "B", like, torch.int64)
    checks.per_row("positions", positions, like.shape[0], "B", like, torch.int64)
    return Stream(seed, sequence_ids, positions)


def _check_values(positions: Tensor, temperatures: Tensor | None) -> None:
    checks.temperature_values(temperatures)
    if checks.readable(positions):
        checks.within("positions", positions, 1 << 32, "[0, 2^32)")


def _fake_linear_sample(of: Head, *rest: Any) -> Sample:
    return _empty_sample(of.hidden)


@operation("linear_sample", fake=_fake_linear_sample)
def _linear_sample(
    of: Head, stream: Stream, scaling: Scaling, filters: Filters
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check_values(stream.positions, scaling.temperatures)
    return _draw(of, stream, scaling, filters)


def _draw(of: Head, stream: Stream, scaling: Scaling, filters: Filters, backend: Backend | None = None) -> Sample:
    """From checked arguments: chunk by chunk (as by a given backend) or fused."""
    hidden, weight, bias = of
    fused = backends.fusing(hidden.device, hidden.dtype) if filters.keep_all and backend is None else None
    if fused is not None:
        drawn = fused.linear_sample(of, scaling, stream, head.workspace_bytes(hidden.device))
    else:
        backend = backend or backends.serving(hidden.device, computing_dtype(hidden))
        plan = head.chunks(len(hidden), backend.columns(weight), hidden, backend.copies_of_logits)
        buffer = head.workspace(plan[0].stop if plan else 0, len(weight), hidden)
        parts = []
        for chunk in plan or [slice(0, 0)]:
            z = backend.sampling_logits(Head(hidden[chunk], weight, bias), buffer)
            parts.append(backend.sample_rows(z, scaling.rows(chunk), stream.rows(chunk), filters))
        drawn = parts[0] if len(parts) == 1 else Sample(*map(torch.cat, zip(*parts, strict=True)))
    checks.finite_values("the logits", drawn.logprobs)
    return drawn


def _vocab_parallel(of: Head, stream: Stream, scaling: Scaling, filters: Filters, group: ProcessGroup) -> Sample:
    _check_values(stream.positions, scaling.temperatures)
    return _draw(of, stream, scaling, filters, VocabParallelBackend(Shard.of(group, of.hidden, of.weight)))


def _fake_logits_sample(logits: Tensor, *rest: Any) -> Sample:
    return _empty_sample(logits)


@operation("logits_sample", fake=_fake_logits_sample)
def _logits_sample(
    logits: Tensor, stream: Stream, scaling: Scaling, filters: Filters
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check_values(stream.positions, scaling.temperatures)
    drawn = rows.sample(with_unit_columns(logits), scaling, stream, filters)
    checks.finite_values("the logits", drawn.logprobs)
    return drawn


def _empty_sample(like: Tensor) -> Sample:
    size, dtype = like.shape[0], computing_dtype(like)
    statistics = (like.new_empty(size, dtype=dtype) for _ in range(4))
    return Sample(like.new_empty(size, dtype=torch.int64), *statistics)
