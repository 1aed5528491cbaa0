"""Counts what a rank gives to collective calls, and what it keeps for the backward pass."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

#: Calls that send nothing, or next to nothing.
QUIET = ("wait_tensor", "_wrap_tensor_autograd", "barrier", "monitored_barrier_")


class CollectiveBytes(TorchDispatchMode):
    """Bytes that this rank sends in collectives, by kind: `gather`, `scatter` (sums that stay split), `sum`, `other`.

    A ring sends (ranks - 1) / ranks of the whole tensor for a gather and a scatter, and twice that for a sum.
    """

    def __init__(self, ranks: int):
        super().__init__()
        self.share, self.sent = (ranks - 1) / ranks, Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        space, _, name = str(func.name()).partition("::")
        if space in ("c10d", "_c10d_functional"):
            kind, whole = self.measure(name.partition(".")[0], args, result)
            self.sent[kind] += round(self.share * whole)
        return result

    def measure(self, name: str, args: Any, result: Any) -> tuple[str, float]:
        """Which kind a call is, and the size of the whole tensor."""
        if name in QUIET:
            return "other", 0
        if name in ("_allgather_base_", "all_gather_into_tensor"):
            return "gather", size(args[0]) if name.startswith("_") else size(result)
        if name in ("_reduce_scatter_base_", "reduce_scatter_tensor"):
            return "scatter", size(args[1]) if name.startswith("_") else size(args[0])
        if name in ("allreduce_", "all_reduce"):
            return "sum", 2 * size(args[0])
        if name in ("broadcast_", "allgather_"):
            return "other", size(args[0])
        raise ValueError(f"a collective call that is not counted here: {name}")


def size(tensors: Any) -> int:
    """Bytes of a tensor, or of all in nested lists."""
    if isinstance(tensors, torch.Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(size(tensor) for tensor in tensors)


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Bytes that a forward pass keeps for its backward pass in tensors of so many rows, each memory counted once."""

    def __init__(self, rows: int):
        self._rows, self.kept = rows, dict[int, int]()
        super().__init__(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._rows in tensor.shape[:2]:
            storage = tensor.untyped_storage()
            self.kept[storage.data_ptr()] = storage.nbytes()
        return tensor
