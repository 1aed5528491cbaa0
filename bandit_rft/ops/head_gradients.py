"""dL/dhidden, dL/dweight and dL/dbias of a head, from dL/dlogits that only ever exist a chunk of rows at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from . import head
from .backend import Backend, Head, Scaling
from .chunks import ROUNDED_SUMS
from .reference import computing_dtype

Fill: TypeAlias = Callable[[Tensor, slice | Tensor, Tensor | None], None]


class GivenGradients(NamedTuple):
    """What flows back into a row's statistics, [N] each."""

    logprobs: Tensor
    entropy: Tensor | None


class HeadGradients:
    """dL/dhidden, dL/dweight and dL/dbias, summed over chunks of rows; those not wanted cost nothing.

    Weight and bias gradients are accumulated in float32 (float64 for float64 inputs) and rounded once, in `results`; a
    bfloat16 weight's gradient on a GPU straight in bfloat16 (`_sum_dtype`), unless it is added into `weight_grad`.

    Of float16 inputs hidden's gradient is kept in float32 as well: a loss may be scaled after its gradients were
    computed, and what had underflowed by then would stay zero. Where products take dL/dlogits in float16 (on a GPU), it
    is multiplied by a power of two for them (`magnify`): a coefficient of 1 / tokens times a probability is below the
    smallest float16.

    Args:
        of: the head.
        wanted: whether hidden's, weight's and bias's gradients are.
        backend: that computes rows of logits in the computing dtype.
        weight_grad: [V, H] in the computing dtype, into which the weight's gradient is added.
    """

    def __init__(self, of: Head, wanted: list[bool], backend: Backend, weight_grad: Tensor | None = None) -> None:
        self.inputs, self.backend = of, backend
        hidden, _, bias = of
        dtype = computing_dtype(hidden)
        want_hidden, want_weight, want_bias = wanted
        kept_in = dtype if hidden.dtype == torch.float16 else hidden.dtype
        self.hidden = torch.empty_like(hidden, dtype=kept_in) if want_hidden else None
        self.given, self.started = weight_grad is not None, weight_grad is not None
        self.want_weight = want_weight
        self.weight = weight_grad
        self.bias = torch.zeros(bias.shape, dtype=dtype, device=bias.device) if want_bias and bias is not None else None
        self.floor = 0.0  # |dL/dlogit| below which a block of the vocabulary is left out of the products
        #: Whether products take dL/dlogits in float16.
        self.narrow = hidden.dtype == torch.float16 and not head.widens(hidden) and len(hidden) > 0
        self.scale: Tensor | None = None  # 0-d: what dL/dlogits is multiplied by for the products

    def magnify(self, slopes: Tensor) -> Tensor:
        """The power of two, 0-d, that brings the largest of these to [0.5, 1): dL/dlogits comes multiplied by it."""
        largest = slopes.abs().max()
        usable = torch.isfinite(largest) & (largest > 0)
        exponent = torch.frexp(torch.where(usable, largest, 1.0)).exponent
        self.scale = torch.ldexp(torch.ones_like(largest), -exponent)
        return self.scale

    def filling(self, given: GivenGradients, targets: Tensor, scaling: Scaling) -> Fill:
        """For `accumulate`, where dL/dlogprobs and dL/dentropy of every row are known."""
        of_logprobs, of_entropy = given
        if self.narrow:
            scale = self.magnify(of_logprobs if of_entropy is None else of_logprobs.abs() + of_entropy.abs())
            of_logprobs, of_entropy = of_logprobs * scale, None if of_entropy is None else of_entropy * scale

        def fill(z: Tensor, rows: slice | Tensor, into: Tensor | None) -> None:
            chosen = None if of_entropy is None else of_entropy[rows]
            self.backend.gradient_rows(z, targets[rows], scaling.rows(rows), of_logprobs[rows], chosen, into)

        return fill

    def accumulate(self, index: Tensor | None, fill: Fill) -> None:
        """For the rows in `index` (None: all), `fill(z, chunk, into)` turns their logits into dL/dlogits in place.

        Where `into` is not None it writes dL/dlogits there instead (head.narrow_gradient).
        """
        hidden, weight, bias = self.inputs
        count = len(hidden) if index is None else len(index)
        if self.hidden is not None and index is not None:
            self.hidden.zero_()
        if self.given and self.scale is not None and self.weight is not None:
            self.weight.mul_(self.scale)  # exact, by a power of two
        columns = self.backend.columns(weight)
        plan = head.chunks(count, columns, hidden, self.backend.copies_of_logits, self._share(columns, index))
        if self.weight is None and self.want_weight:
            self.weight = torch.empty(weight.shape, dtype=self._sum_dtype(len(plan)), device=weight.device)
        buffer = head.workspace(plan[0].stop if plan else 0, len(weight), hidden)
        for chunk in plan:
            taken = chunk if index is None else index[chunk]
            h = hidden[taken]
            z = self.backend.logits(h, weight, bias, buffer)
            narrow = head.narrow_gradient(z, weight.dtype) if self.backend.writes_narrow else None
            fill(z, taken, narrow)
            self._add(z if narrow is None else narrow, h, taken)
        if self.weight is not None and not self.started:
            self.weight.zero_()
        if self.hidden is not None:
            self.backend.sum_over_ranks(self.hidden)
        if self.scale is not None:
            for gradient in (self.hidden, self.weight, self.bias):
                if gradient is not None:
                    gradient.div_(self.scale)

    def _share(self, columns: int, index: Tensor | None) -> float:
        """Of the workspace for logits.

        The rest is for the rows gathered and their gradient, for what is widened or packed for a product, and for freed
        gradients: the C library keeps those of up to 32 MiB on its heap, up to twice the size of the largest.
        """
        if not head.widens(self.inputs.hidden):
            return 0.95
        gathered = 0 if index is None else 2 * self.inputs.hidden.shape[1]
        return 0.65 * columns / (columns + gathered)

    def _sum_dtype(self, chunks: int) -> torch.dtype:
        """Of the weight's gradient: bfloat16 where autograd wants it so and few enough roundings add up (chunks.py).

        Half the traffic of every sum, and no float32 [V, H] beside the gradient.
        """
        weight = self.inputs.weight
        rounded = weight.dtype == torch.bfloat16 and not head.widens(weight) and chunks <= ROUNDED_SUMS
        return weight.dtype if rounded and not self.floor else computing_dtype(weight)

    def _add(self, dz: Tensor, h: Tensor, taken: slice | Tensor) -> None:
        """Add what dL/dlogits [n, V] of the rows h [n, H], which are hidden[taken], contribute."""
        weight = self.inputs.weight
        floor = self.floor if self.scale is None else self.floor * self.scale
        columns = head.columns_that_count(dz, floor) if self.floor else None
        of_hidden = (dz, weight) if columns is None else (dz[:, columns], weight[columns])
        if self.hidden is not None:
            if isinstance(taken, slice):
                self.backend.add_hidden_gradient(*of_hidden, self.hidden[taken])
            else:
                part = torch.empty_like(h, dtype=self.hidden.dtype)
                self.backend.add_hidden_gradient(*of_hidden, part)
                self.hidden.index_copy_(0, taken, part)
        if self.weight is not None:
            if columns is None:
                self.backend.add_weight_gradient(dz, h, self.weight, accumulate=self.started)
            else:
                some = self.weight.new_empty(len(columns), h.shape[1])
                self.backend.add_weight_gradient(of_hidden[0], h, some, accumulate=False)
                self.weight = self.weight if self.started else self.weight.zero_()
                self.weight.index_add_(0, columns, some)
            self.started = True
        if self.bias is not None:
            self.bias += dz.sum(0, dtype=self.bias.dtype)

    def results(self, rounded: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """(hidden, weight, bias) gradients; an empty tensor for one that was not wanted.

        Args:
            rounded: to their inputs' dtypes. False leaves those of float16 inputs in float32, to be scaled first.
        """
        hidden, weight, bias = self.inputs
        found = []
        for gradient, of in zip((self.hidden, self.weight, self.bias), (hidden, weight, bias), strict=True):
            if gradient is None or of is None:
                found.append(hidden.new_empty(0))
            else:
                found.append(gradient.to(of.dtype) if rounded or of.dtype != torch.float16 else gradient)
        return found[0], found[1], found[2]


def empty_gradients(of: Head, wanted: list[bool], rounded: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """The shapes and dtypes of `HeadGradients.results`, for tracing."""
    found = []
    for tensor, want in zip(of, wanted, strict=True):
        if tensor is None or not want:
            found.append(of.hidden.new_empty(0))
            continue
        dtype = tensor.dtype if rounded or tensor.dtype != torch.float16 else torch.float32
        found.append(torch.empty_like(tensor, dtype=dtype))
    return found[0], found[1], found[2]
