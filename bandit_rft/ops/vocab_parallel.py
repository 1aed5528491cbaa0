"""The operations where each rank of a process group holds a slice of the vocabulary: weight [V_r, H], the r-th slice.

    lse = top + log sum_r exp(z_r - top), top = max_r max z_r;  logp and entropy from sums over the ranks
    dL/dhidden = sum_r dz_r . weight_r;  dL/dweight_r = dz_r^T . hidden stays where it is
    a draw is the best of the ranks' best tokens: the noise belongs to a token's id, wherever the token lies

Neither [N, V] nor [V, H] exists on any rank. Slices may differ in size; they follow each other as the ranks do. hidden,
 targets and everything else must be the same on every rank, as must be what is done with the results. Two small
all-reduces a chunk of rows, one of [N, H] a backward. Rows are computed by plain PyTorch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import backends
from .backend import Backend, Filters, RowStatistics, Scaling, Stream, TokenInputs
from .objective import PolicyObjective
from .philox import gumbel_noise, random_words
from .reference import Sample, computing_dtype
from .torch_backend import TorchBackend, given_gradients, scaled_in_computing_dtype, write_gradient


class Shard(NamedTuple):
    """Which slice of the vocabulary this rank holds."""

    group: dist.ProcessGroup
    sizes: tuple[int, ...]  # of every rank's slice
    start: int  # the id of the first token here

    @property
    def total(self) -> int:
        """The whole vocabulary."""
        return sum(self.sizes)

    @classmethod
    def of(cls, group: dist.ProcessGroup, hidden: Tensor, weight: Tensor) -> Shard:
        """Ask the other ranks.

        Raises:
            TypeError: it is no process group.
            ValueError: hidden is not the same shape everywhere.
            NotImplementedError: under torch.compile.
        """
        if torch.compiler.is_compiling():
            raise NotImplementedError("process_group is not served under torch.compile: call the operation outside it")
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(f"process_group must be a torch.distributed.ProcessGroup; got {type(group).__name__}")
        mine = torch.tensor([len(weight), *hidden.shape], device=hidden.device)
        gathered = [torch.empty_like(mine) for _ in range(group.size())]
        dist.all_gather(gathered, mine, group=group)
        everywhere = [tuple(each.tolist()) for each in gathered]
        shapes = {each[1:] for each in everywhere}
        if len(shapes) > 1:
            raise ValueError(
                "hidden must be the same [N, H] on every rank of process_group; got "
                + ", ".join(f"[{n}, {h}]" for _, n, h in everywhere)
            )
        sizes = tuple(each[0] for each in everywhere)
        return cls(group, sizes, sum(sizes[: group.rank()]))


class VocabParallelBackend(Backend):
    """Rows whose columns lie on several ranks: logits are this rank's, targets and tokens are ids of the whole."""

    name = "vocab_parallel"
    copies_of_logits = TorchBackend.copies_of_logits

    def __init__(self, shard: Shard) -> None:
        self.shard = shard

    def vocabulary(self, weight: Tensor) -> int:
        """Of all ranks together."""
        return self.shard.total

    def columns(self, weight: Tensor) -> int:
        """Of the largest slice, so that every rank takes equally many rows at a time."""
        return max(self.shard.sizes)

    def logprob_rows(self, logits: Tensor, targets: Tensor, scaling: Scaling) -> RowStatistics:
        """From sums over the ranks."""
        return self._statistics(scaled_in_computing_dtype(logits, scaling), targets)[0]

    def gradient_rows(
        self, logits: Tensor, targets: Tensor, scaling: Scaling, grad_logprobs: Tensor, grad_entropy: Tensor | None,
        into: Tensor | None = None,
    ) -> RowStatistics:  # fmt: skip
        """This rank's columns of the gradient."""
        z = scaled_in_computing_dtype(logits, scaling)
        seen, lse = self._statistics(z, targets)
        self._write(logits if into is None else into, z, lse, targets, scaling, seen, grad_logprobs, grad_entropy)
        return seen

    def policy_rows(
        self, logits: Tensor, targets: Tensor, scaling: Scaling, objective: PolicyObjective, inputs: TokenInputs,
        into: Tensor | None = None,
    ) -> RowStatistics:  # fmt: skip
        """The same gradient, with the coefficients of objective.py, which are the same on every rank."""
        z = scaled_in_computing_dtype(logits, scaling)
        seen, lse = self._statistics(z, targets)
        given = given_gradients(objective, seen.logprobs, inputs)
        self._write(logits if into is None else into, z, lse, targets, scaling, seen, *given)
        return seen

    def sample_rows(self, logits: Tensor, scaling: Scaling, stream: Stream, filters: Filters) -> Sample:
        """Without filters the best of the ranks' best; filters need whole rows, which are gathered (B V numbers)."""
        if not filters.keep_all:
            whole = self._gather_columns(logits)
            return backends.serving(whole.device, whole.dtype).sample_rows(whole, scaling, stream, filters)
        z, (_, sizes, start) = scaled_in_computing_dtype(logits, scaling), self.shard
        words = random_words(*stream, vocabulary=z.shape[1], first=start)
        best = (z + gumbel_noise(words, z.dtype)).max(-1)
        found = torch.stack([best.values.double(), (best.indices + start).double()])  # both are exact in float64
        gathered = [torch.empty_like(found) for _ in sizes]
        dist.all_gather(gathered, found, group=self.shard.group)
        values, ids = torch.stack(gathered).unbind(1)
        tokens = ids.gather(0, values.argmax(0, keepdim=True))[0].long()  # the first of equal ones: the lowest id
        (logprobs, entropy), _ = self._statistics(z, tokens)
        return Sample(tokens, logprobs, logprobs.clone(), entropy, torch.ones_like(entropy))

    def sum_over_ranks(self, part: Tensor) -> Tensor:
        """Added up in float32 at least."""
        total = part.to(computing_dtype(part))
        dist.all_reduce(total, group=self.shard.group)
        return part.copy_(total)

    def _mine(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(columns [N] here, 0 where the target is elsewhere; whether it is here [N])."""
        columns = targets - self.shard.start
        here = (columns >= 0) & (columns < self.shard.sizes[self.shard.group.rank()])
        return torch.where(here, columns, 0), here

    def _statistics(self, z: Tensor, targets: Tensor) -> tuple[RowStatistics, Tensor]:
        """(statistics, logsumexp of the whole rows [N])."""
        top = z.amax(-1)
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=self.shard.group)
        z = z - top[:, None]
        columns, here = self._mine(targets)
        weights, finite = z.exp(), z.clamp(min=torch.finfo(z.dtype).min)  # 0 * -inf must not become NaN
        of_target = torch.where(here, z.gather(1, columns[:, None])[:, 0], 0)
        sums = torch.stack([weights.sum(-1), (weights * finite).sum(-1), of_target])
        dist.all_reduce(sums, group=self.shard.group)
        total, moment, of_target = sums
        lse = total.log()
        inside = (targets >= 0) & (targets < self.shard.total)
        return RowStatistics(torch.where(inside, of_target - lse, torch.nan), lse - moment / total), lse + top

    def _write(
        self, out: Tensor, z: Tensor, lse: Tensor, targets: Tensor, scaling: Scaling, seen: RowStatistics,
        grad_logprobs: Tensor, grad_entropy: Tensor | None,
    ) -> None:  # fmt: skip
        columns, here = self._mine(targets)
        write_gradient(out, z, lse, columns, here, scaling, seen, grad_logprobs, grad_entropy)

    def _gather_columns(self, logits: Tensor) -> Tensor:
        _, sizes, _ = self.shard
        padded = torch.nn.functional.pad(logits, (0, max(sizes) - logits.shape[1])).contiguous()
        gathered = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(gathered, padded, group=self.shard.group)
        return torch.cat([part[:, :size] for part, size in zip(gathered, sizes, strict=True)], 1)
