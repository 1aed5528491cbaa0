"""From rectangles to packed tokens and back: what the operations take, and what most trainers have."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import checks


class Packed(NamedTuple):
    """Tokens of B sequences one after another, without padding.

    Attributes:
        values: [N, ...], in the padded tensor's dtype and order.
        cu_seqlens: [B + 1] int32, where each sequence begins in N, and N.
    """

    values: Tensor
    cu_seqlens: Tensor


def pack(padded: Tensor, mask: Tensor) -> Packed:
    """The tokens that count, one after another, as the operations take them.

    Differentiable: what is left out gets a gradient of 0.

    Args:
        padded: [B, L, ...], such as hidden states [B, L, H], targets or old log-probabilities [B, L].
        mask: [B, L], nonzero where a token counts: padded on either side, or with holes.

    Returns:
        Packed(values [N, ...], cu_seqlens [B + 1]). The host waits once for N where the mask lies on a GPU.

    Raises:
        ValueError, TypeError: naming the argument.

    >>> logprobs, mask = torch.tensor([[0.1, 0.2, 0.0], [0.3, 0.0, 0.0]]), torch.tensor([[1, 1, 0], [1, 0, 0]])
    >>> values, cu_seqlens = pack(logprobs, mask)
    >>> values, cu_seqlens
    (tensor([0.1000, 0.2000, 0.3000]), tensor([0, 2, 3], dtype=torch.int32))
    >>> torch.equal(unpack(values, mask), logprobs)
    True
    """
    counted = _mask(mask)
    if not isinstance(padded, Tensor):
        raise TypeError(f"padded must be a torch.Tensor [B, L, ...]; got {type(padded).__name__}")
    if padded.dim() < 2 or padded.shape[:2] != counted.shape:
        raise ValueError(
            f"padded must be [B, L, ...] with [B, L] = {checks.shape_of(counted)} as in mask; got "
            f"{checks.shape_of(padded)}"
        )
    checks.same_device("padded", padded, "mask", counted)
    lengths = counted.sum(1)
    cu_seqlens = torch.zeros(len(lengths) + 1, dtype=torch.int32, device=counted.device)
    cu_seqlens[1:] = lengths.cumsum(0)
    return Packed(padded[counted], cu_seqlens)


def unpack(values: Tensor, mask: Tensor, fill: float = 0.0) -> Tensor:
    """The inverse of `pack`.

    Args:
        values: [N, ...], one a nonzero entry of the mask, in its order.
        mask: [B, L], as `pack` got it.
        fill: what stands where no token counts.

    Returns:
        [B, L, ...], differentiable in the values.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    counted = _mask(mask)
    if not isinstance(values, Tensor) or values.dim() < 1:
        raise TypeError(f"values must be a torch.Tensor [N, ...]; got {values!r:.80}")
    checks.same_device("values", values, "mask", counted)
    place = counted.flatten().nonzero()[:, 0]
    if len(place) != len(values):
        raise ValueError(
            f"values must be [N, ...] with N = {len(place)}, the nonzero entries of mask; got {checks.shape_of(values)}"
        )
    empty = values.new_full((counted.numel(), *values.shape[1:]), fill)
    return empty.index_copy(0, place, values).view(*counted.shape, *values.shape[1:])


def _mask(mask: object) -> Tensor:
    value = checks.tensor("mask", mask, 2, "[B, L]")
    if value.is_floating_point() and not bool(((value == 0) | (value == 1)).all()):
        raise ValueError("mask must be bool, or 0 and 1; got other numbers")
    return value.bool()
