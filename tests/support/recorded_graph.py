"""A CUDA graph's replay, on a CPU: the operations of one call, with the host's numbers of that call, once more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

#: Operations that hand a value, or a size that depends on values, to the host: a capture refuses them.
WAITING = ("_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "is_nonzero", "equal")


class _Recording(TorchDispatchMode):
    """Keeps every operation, and how the memory that operations write into looked before."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket.__name__ in WAITING:
            raise RuntimeError(f"{func} waits for the device")
        values = [*args, *(kwargs.get(argument.name) for argument in func._schema.arguments[len(args) :])]
        for argument, value in zip(func._schema.arguments, values, strict=True):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in tree_leaves(value):
                    storage = tensor.untyped_storage()
                    self.before.setdefault(storage.data_ptr(), (tensor, storage.clone()))
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out))
        return out


def record(function: Callable[[], None]) -> Callable[[], None]:
    """As `with torch.cuda.graph(...)`: nothing has happened after it, and what it returns makes it happen."""
    recording = _Recording()
    try:
        with recording:
            function()
    finally:
        for tensor, storage in recording.before.values():
            tensor.untyped_storage().copy_(storage)

    def replay() -> None:
        made: dict[int, Any] = {}

        def now(value: Any) -> Any:
            return made.get(id(value), value) if isinstance(value, torch.Tensor) else value

        for func, args, kwargs, out in recording.calls:
            result = func(*tree_map(now, args), **tree_map(now, kwargs))
            for then, value in zip(tree_leaves(out), tree_leaves(result), strict=True):
                made[id(then)] = value

    return replay
