"""Rows of logits in the compiled core: csrc/cpu on a CPU, csrc/cuda on an NVIDIA GPU, behind the same DLPack calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack  # type: ignore[attr-defined]

from . import head
from .backend import KINDS, KLS, Backend, Filters, Head, RowStatistics, Scaling, Stream, TokenInputs, ratio_bounds
from .objective import PolicyObjective
from .reference import Sample

_FEW_ROWS = 8  # fewer are not worth packing a weight for


class CpuBackend(Backend):
    """float32 and bfloat16 in CPU memory.

    Args:
        native: the compiled module; None where it is missing (the backend then serves nothing).
    """

    name = "cpu"

    def __init__(self, native: Any) -> None:
        self.native = native

    def _kernels(self) -> Any:
        return self.native

    def _place(self, logits: Tensor) -> int:
        """What the kernels take last: here, how many threads may work."""
        return torch.get_num_threads()

    def _into(self, into: Tensor | None) -> tuple[Any, ...]:
        return ()

    def _seed(self, seed: Tensor) -> Any:
        return int(seed.item()) & 0xFFFFFFFFFFFFFFFF

    def _multiplies(self, *operands: Tensor) -> bool:
        """Whether the core's own products serve: float32 in CPU memory, where they were measured to beat oneMKL's."""
        if self.native is None or not torch.backends.mkl.is_available() or not self.native.products_pay():
            return False
        for t in operands:  # once a product of every layer: the cheaper questions first
            rows, columns = t.shape
            if not t.is_cpu or t.dtype != torch.float32 or rows < _FEW_ROWS or (columns != 1 and t.stride(1) != 1):
                return False
        return True

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
        """By the core's own product, or the vendor's."""
        z = out[: len(hidden)]
        if not self._multiplies(hidden, weight, z):
            return super().logits(hidden, weight, bias, out)
        self.native.logits_product(_matrix(hidden), _matrix(weight), _matrix(z), torch.get_num_threads())
        return z if bias is None else z.add_(bias)

    def add_hidden_gradient(self, dz: Tensor, weight: Tensor, out: Tensor, accumulate: bool = False) -> None:
        """By the core's own product, or the vendor's."""
        if not self._multiplies(dz, weight, out):
            return super().add_hidden_gradient(dz, weight, out, accumulate)
        self.native.hidden_gradient_product(
            _matrix(dz), _matrix(weight), _matrix(out), accumulate, torch.get_num_threads()
        )

    def add_weight_gradient(self, dz: Tensor, hidden: Tensor, out: Tensor, accumulate: bool) -> None:
        """By the core's own product, or the vendor's."""
        if not self._multiplies(dz, hidden, out):
            return super().add_weight_gradient(dz, hidden, out, accumulate)
        self.native.weight_gradient_product(
            _matrix(dz), _matrix(hidden), _matrix(out), accumulate, torch.get_num_threads()
        )

    def logprob_rows(self, logits: Tensor, targets: Tensor, scaling: Scaling) -> RowStatistics:
        """One pass over each row, by the core's kernel."""
        out = _empty_statistics(logits)
        self._kernels().logprob_rows(
            _matrix(logits), _vector(targets), *_scaling(scaling), *map(_vector, out), self._place(logits)
        )
        return out

    def head_logprobs(self, of: Head, targets: Tensor, scaling: Scaling) -> RowStatistics:
        """A tile of columns of many rows at a time: the weight is read once for all of them."""
        own = getattr(self.logprob_rows, "__func__", None) is CpuBackend.logprob_rows
        if not own:  # who defines rows of their own gets whole ones
            return super().head_logprobs(of, targets, scaling)
        out = [torch.empty(len(of.hidden), dtype=torch.float32) for _ in range(2)]
        for chunk in head.rows_of_tiles(of.hidden):
            h, of_chunk = of.hidden[chunk], scaling.rows(chunk)
            sums, vector = self._kernels().TiledLogprobs(len(h)), _vector(targets[chunk])
            for tile, z in head.tiles_of_logits(h, of.weight, of.bias):
                sums.add(_matrix(z), vector, tile.start, *_scaling(of_chunk), self._place(z))
                del z  # or its memory would stay beside the next stretch's
            sums.finish(*(_vector(values[chunk]) for values in out))
        return RowStatistics(*out)

    def gradient_rows(
        self, logits: Tensor, targets: Tensor, scaling: Scaling, grad_logprobs: Tensor, grad_entropy: Tensor | None,
        into: Tensor | None = None,
    ) -> RowStatistics:  # fmt: skip
        """Two passes over each row: its statistics, then the gradient written over it."""
        out = _empty_statistics(logits)
        self._kernels().gradient_rows(
            _matrix(logits), _vector(targets), *_scaling(scaling), _vector(grad_logprobs), _vector(grad_entropy),
            *map(_vector, out), *self._into(into), self._place(logits),
        )  # fmt: skip
        return out

    def policy_rows(
        self, logits: Tensor, targets: Tensor, scaling: Scaling, objective: PolicyObjective, inputs: TokenInputs,
        into: Tensor | None = None,
    ) -> RowStatistics:  # fmt: skip
        """As `gradient_rows`; the coefficient is computed between the two passes."""
        o, out = objective, _empty_statistics(logits)
        self._kernels().policy_rows(
            _matrix(logits), _vector(targets), *_scaling(scaling),
            KINDS[o.kind], *ratio_bounds(o), o.dual_clip or 0.0, KLS[o.kl] if o.kl_coef else 0, o.kl_coef,
            o.entropy_coef, *map(_vector, inputs), *map(_vector, out), *self._into(into), self._place(logits),
        )  # fmt: skip
        return out

    def sample_rows(self, logits: Tensor, scaling: Scaling, stream: Stream, filters: Filters) -> Sample:
        """Filters and noise by the core's kernel."""
        size, on = logits.shape[0], logits.device
        statistics = (torch.empty(size, dtype=torch.float32, device=on) for _ in range(4))
        out = Sample(torch.empty(size, dtype=torch.int64, device=on), *statistics)
        self._kernels().sample_rows(
            _matrix(logits), *_scaling(scaling), self._seed(stream.seed), _vector(stream.sequence_ids),
            _vector(stream.positions), *filters, *map(_vector, out), self._place(logits),
        )  # fmt: skip
        return out

    def sampling_logits(self, of: Head, out: Tensor) -> Tensor:
        """A row has the same bits in any batch: the core's own product sums every logit in one order."""
        if of.hidden.dtype == torch.float16:
            return super().sampling_logits(of, out)
        out = out[: of.hidden.shape[0]]
        bias = None if of.bias is None else of.bias.to(torch.float32)
        self.native.head_logits(_matrix(of.hidden), _matrix(of.weight), _vector(bias), _matrix(out), self._place(out))
        return out


class CudaBackend(CpuBackend):
    """float32, bfloat16 and float16 on an NVIDIA GPU, on the current stream of the tensors' device."""

    name = "cuda"
    writes_narrow = True
    head_logprobs, sampling_logits = Backend.head_logprobs, Backend.sampling_logits
    logits, add_hidden_gradient, add_weight_gradient = (
        Backend.logits, Backend.add_hidden_gradient, Backend.add_weight_gradient
    )  # fmt: skip

    def _kernels(self) -> Any:
        return self.native.cuda

    def _place(self, logits: Tensor) -> int:
        return torch.cuda.current_stream(logits.device).cuda_stream

    def _into(self, into: Tensor | None) -> tuple[Any, ...]:
        return (None if into is None else _matrix(into),)

    def _seed(self, seed: Tensor) -> Any:
        return _vector(seed.reshape(1))


def _empty_statistics(logits: Tensor) -> RowStatistics:
    rows, on = logits.shape[0], logits.device
    return RowStatistics(*(torch.empty(rows, dtype=torch.float32, device=on) for _ in range(2)))


def _vector(tensor: Tensor | None) -> Any:
    """A borrowed DLPack capsule of a vector's entries one after another."""
    return None if tensor is None else to_dlpack(tensor.detach().contiguous())


def _matrix(tensor: Tensor) -> Any:
    """A borrowed DLPack capsule; rows that are not contiguous are copied (those written to always are)."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    return to_dlpack(tensor if tensor.shape[1] == 1 or tensor.stride(1) == 1 else tensor.contiguous())


def _scaling(scaling: Scaling) -> tuple[float, Any, float, float]:
    return scaling.temperature, _vector(scaling.temperatures), scaling.softcap or 0.0, scaling.logit_scale
