"""What a backend is: an object with one method an operation on rows of logits, and what these methods are given.

`logits` are raw: hidden . weight^T + bias, before logit scale, softcap and temperature, which `Scaling` carries. Their
rows are contiguous; everything else may have any strides. `backends.py` chooses which backend serves a call.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from . import head
from .installed import load_kernels
from .objective import PolicyObjective
from .reference import Sample, scaled_logits

#: The numbers by which the kernels know a PolicyObjective's kind and kl.
KINDS: dict[str, int] = {kind.name: int(kind) for kind in load_kernels("enumerations").ObjectiveKind}
KLS: dict[str, int] = {kl.name: int(kl) for kl in load_kernels("enumerations").KLKind}


class Head(NamedTuple):
    """What logits are made of: hidden . weight^T + bias."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]


class Scaling(NamedTuple):
    """What is done to raw logits: z = softcap(logit_scale x) / temperature."""

    temperature: float = 1.0
    temperatures: Tensor | None = None  # [N] in the computing dtype, in place of the number above
    softcap: float | None = None
    logit_scale: float = 1.0

    @classmethod
    def of(
        cls, temperature: float | Tensor, softcap: float | None = None, logit_scale: float = 1.0,
        dtype: torch.dtype = torch.float32,
    ) -> Scaling:  # fmt: skip
        """From the arguments of an operation, whose temperature is a number or a vector; `dtype` is computed in."""
        if isinstance(temperature, Tensor):
            return cls(1.0, temperature.detach().to(dtype), softcap, logit_scale)
        return cls(float(temperature), None, softcap, logit_scale)

    @property
    def divisor(self) -> float | Tensor:
        """The temperature: the number, or the vector [N]."""
        return self.temperature if self.temperatures is None else self.temperatures

    def rows(self, index: slice | Tensor) -> Scaling:
        """The scaling of some of the rows."""
        return self if self.temperatures is None else self._replace(temperatures=self.temperatures[index])

    def scaled(self, logits: Tensor) -> Tensor:
        """z [N, V] of raw logits, in plain PyTorch."""
        return scaled_logits(logits, self.divisor, self.softcap, self.logit_scale)


class TokenInputs(NamedTuple):
    """What the objective needs to know of each row, [N] each."""

    advantages: Tensor
    weights: Tensor
    behavior: Tensor | None
    reference: Tensor | None

    def rows(self, index: slice | Tensor) -> TokenInputs:
        """The inputs of some of the rows."""
        return TokenInputs(*(None if t is None else t[index] for t in self))  # type: ignore[arg-type]


class Stream(NamedTuple):
    """Which random numbers each row draws with."""

    seed: Tensor  # int64, 0-d
    sequence_ids: Tensor  # int64 [B]
    positions: Tensor  # int64 [B], in [0, 2^32)

    def rows(self, index: slice) -> Stream:
        """The streams of some of the rows."""
        return Stream(self.seed, self.sequence_ids[index], self.positions[index])


class Filters(NamedTuple):
    """Which tokens may be drawn: top-k, then top-p, then min-p. The defaults keep every token."""

    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @property
    def keep_all(self) -> bool:
        """Whether nothing is filtered."""
        return self.top_k == 0 and self.top_p == 1 and self.min_p == 0


class RowStatistics(NamedTuple):
    """Of the target of each row, [N] each."""

    logprobs: Tensor
    entropy: Tensor


class Backend(ABC):
    """Rows of logits on one kind of kernels. Nothing here waits for a device."""

    name: str
    #: How many tensors of the logits' size the rows need, logits included: what a chunk's size is computed with.
    copies_of_logits = 1
    #: Whether dL/dlogits may be written in 16 bits over the second half of each float32 row (`head.narrow_gradient`).
    writes_narrow = False

    def vocabulary(self, weight: Tensor) -> int:
        """How many tokens there are, of which targets are ids; a head may hold a slice of them (vocab_parallel.py)."""
        return weight.shape[0]

    def columns(self, weight: Tensor) -> int:
        """How many logits of a row exist at once, at most: what a chunk's size is computed with."""
        return weight.shape[0]

    def sum_over_ranks(self, part: Tensor) -> Tensor:
        """A gradient to which every slice of the head contributes, in place."""
        return part

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
        """`head.logits`, or a product of one's own."""
        return head.logits(hidden, weight, bias, out)

    def add_hidden_gradient(self, dz: Tensor, weight: Tensor, out: Tensor, accumulate: bool = False) -> None:
        """`head.add_hidden_gradient`, or a product of one's own."""
        head.add_hidden_gradient(dz, weight, out, accumulate)

    def add_weight_gradient(self, dz: Tensor, hidden: Tensor, out: Tensor, accumulate: bool) -> None:
        """`head.add_weight_gradient`, or a product of one's own."""
        head.add_weight_gradient(dz, hidden, out, accumulate)

    @abstractmethod
    def logprob_rows(self, logits: Tensor, targets: Tensor, scaling: Scaling) -> RowStatistics:
        """Log-probability of each row's target, and the row's entropy; logits are only read.

        A target outside [0, V) gets NaN where looking for it would wait.
        """

    def head_logprobs(self, of: Head, targets: Tensor, scaling: Scaling) -> RowStatistics:
        """`logprob_rows` of the head's logits [N, V], of which a chunk of rows exists at a time."""
        hidden, weight, bias = of
        plan = head.chunks(len(hidden), self.columns(weight), hidden, self.copies_of_logits)
        buffer = head.workspace(plan[0].stop if plan else 0, len(weight), hidden)
        seen = RowStatistics(*(buffer.new_empty(len(hidden)) for _ in range(2)))
        for chunk in plan:
            z = self.logits(hidden[chunk], weight, bias, buffer)
            seen.logprobs[chunk], seen.entropy[chunk] = self.logprob_rows(z, targets[chunk], scaling.rows(chunk))
        return seen

    @abstractmethod
    def gradient_rows(
        self, logits: Tensor, targets: Tensor, scaling: Scaling, grad_logprobs: Tensor, grad_entropy: Tensor | None,
        into: Tensor | None = None,
    ) -> RowStatistics:  # fmt: skip
        """As `logprob_rows`, and dL/dlogits is written over the logits, given dL/dlogprob and dL/dentropy [N].

        `into`: where it is written instead, by a backend that `writes_narrow`.
        """

    @abstractmethod
    def policy_rows(
        self, logits: Tensor, targets: Tensor, scaling: Scaling, objective: PolicyObjective, inputs: TokenInputs,
        into: Tensor | None = None,
    ) -> RowStatistics:  # fmt: skip
        """As `gradient_rows`, with the coefficients of a token-separable objective computed on the way."""

    @abstractmethod
    def sample_rows(self, logits: Tensor, scaling: Scaling, stream: Stream, filters: Filters) -> Sample:
        """One draw a row of logits [B, V]."""

    def sampling_logits(self, of: Head, out: Tensor) -> Tensor:
        """The head's raw logits [B, V] to draw from, in (and as) the first rows of `out`."""
        return self.logits(of.hidden, of.weight, of.bias, out)

    def scale_(self, gradient: Tensor, factor: Tensor) -> Tensor:
        """gradient times factor (0-d, on its device), in place; returned."""
        return gradient.mul_(factor.to(gradient.dtype))

    def linear_logprobs(self, of: Head, targets: Tensor, scaling: Scaling, workspace: int) -> RowStatistics:
        """`logprob_rows` fused with the head, by a backend that `backends.fusing` names."""
        raise NotImplementedError

    def linear_sample(self, of: Head, scaling: Scaling, stream: Stream, workspace: int) -> Sample:
        """`sample_rows` without filters, fused with the head, by a backend that `backends.fusing` names."""
        raise NotImplementedError


def ratio_bounds(objective: PolicyObjective) -> tuple[float, float]:
    """(lowest, highest) ratio before the objective clips, caps or masks it."""
    if objective.kind in ("importance", "importance_mask"):
        return objective.importance_floor, objective.importance_cap
    return 1 - objective.clip_low, 1 + objective.clip_high
