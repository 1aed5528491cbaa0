"""Which tokens count: not those whose target is -100, and of the others those that may have a gradient.

With a target of -100, what an operation gives is what it would give without that token. Looking for them is free on a
CPU. Elsewhere the host would have to wait, so there a mask goes along, and a row that is not counted is computed for
the token 0 and then left out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks
from .backend import RowStatistics
from .objective import PolicyObjective
from .reference import IGNORED


def ignored(targets: Tensor) -> Tensor | None:
    """Which targets are not counted, bool [N]; None where it is known that each is."""
    if checks.readable(targets) and (not len(targets) or targets.min().item() > IGNORED):  # cheaper than a mask
        return None
    mask = targets == IGNORED
    return None if checks.readable(targets) and not bool(mask.any()) else mask


def replaced(targets: Tensor, mask: Tensor | None) -> Tensor:
    """Targets [N] that lie in the vocabulary, for rows whose results are left out afterwards."""
    return targets if mask is None else targets.masked_fill(mask, 0)


def zeroed(values: Tensor, mask: Tensor | None) -> Tensor:
    """Values [N], 0 where a target is not counted, whatever stands there."""
    return values if mask is None else values.masked_fill(mask, 0)


def clear_(gradient: Tensor, mask: Tensor | None) -> None:
    """Rows [N, V] of targets that are not counted become 0, where looking is free.

    Elsewhere nothing flows into them, so they are 0 already unless their logits are not finite.
    """
    if mask is not None and checks.readable(mask):
        gradient[mask] = 0


def zeroed_statistics(seen: RowStatistics, mask: Tensor | None) -> RowStatistics:
    """Log-probability and entropy, both 0 where a target is not counted."""
    return seen if mask is None else RowStatistics(*(zeroed(values, mask) for values in seen))


def may_have_gradient(
    objective: PolicyObjective, advantages: Tensor, sequence_of: Tensor, lengths: Tensor
) -> Tensor | None:
    """The rows whose coefficient is not known to be zero, bool [N] (None: all of them)."""
    if objective.every_token_counts:
        return None
    counts = advantages != 0  # a NaN advantage counts: it must be seen, not dropped
    if not objective.token_separable:  # one token moves the ratio that its whole sequence shares
        of_sequence = torch.zeros_like(lengths).index_add(0, sequence_of, counts.long())
        counts = (of_sequence > 0)[sequence_of]
    return counts


def rows_that_count(counts: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """The rows to compute (None: all of them), [n] int64: those that may have a gradient, and whose target counts."""
    if mask is not None:
        counts = ~mask if counts is None else counts & ~mask
    if counts is None:
        return None
    index = counts.nonzero()[:, 0]  # on a GPU the host waits here for how many rows there are to compute
    return None if len(index) == len(counts) else index
