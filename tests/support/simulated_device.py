"""A device that computes on the CPU and counts what the host waits for: a GPU's rules, without a GPU.

Its tensors say that they are on `meta` and hold their values in host memory. Every operation on one runs on what it
holds. What makes the host wait on a GPU is counted where it happens: a number read, a size that depends on values, a
copy to the host, and a copy from memory that is not pinned, which the driver has to stage.
"""

from __future__ import annotations

import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from bandit_rft import transfer
from bandit_rft.model import Policy
from bandit_rft.ops.registry import implementations
from bandit_rft.rollout import graphs

DEVICE = torch.device("meta")
#: Operations that hand a value, or a size that depends on values, to the host.
READING = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim")


class OnDevice(Tensor):
    """A tensor of the device; `held` has its values."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnDevice:
        made: OnDevice = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            layout=held.layout, device=DEVICE,
        )  # fmt: skip
        made.held = held
        return made

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside of the simulation")


class Simulation(TorchDispatchMode):
    """What happens within it is counted in `waits`, by what the host waited for and where."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.pinned: set[int] = set()
        self._kept: list[Tensor] = []  # so that no address is used twice

    def pin(self, tensor: Tensor) -> Tensor:
        pinned = tensor.clone()
        self.pinned.add(pinned.data_ptr())
        self._kept.append(pinned)
        return pinned

    def wait(self, what: str) -> None:
        own = [f for f in traceback.extract_stack() if "/bandit_rft/" in f.filename or "/kernels/" in f.filename]
        where = f"{own[-1].filename.rpartition('/')[2]}:{own[-1].name}" if own else "elsewhere"
        self.waits[f"{what} in {where}"] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func.overloadpacket.__name__
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if func.namespace == "bandit_rft":  # its own operations inside count as well
            with self:
                return implementations[name](*args, **kwargs)
        there = [x for x in given if isinstance(x, OnDevice)]
        if lost := [x for x in given if x.device == DEVICE and not isinstance(x, OnDevice)]:
            raise AssertionError(f"{func}: {lost[0].shape} came by torch.tensor(..., device=...): a copy that waits")
        target = kwargs.get("device")
        onto = bool(there) if target is None else torch.device(target) == DEVICE
        if target is not None:
            kwargs["device"] = "cpu"
        if name in ("_to_copy", "copy_"):
            self._copy(name, args, kwargs, onto if name == "_to_copy" else isinstance(args[0], OnDevice))
        elif there:
            self._read(name, args, kwargs)
            if any(not isinstance(x, OnDevice) and x.dim() for x in given):
                raise AssertionError(f"{func}: one argument is in host memory")

        def held(x: Any) -> Any:
            return x.held if isinstance(x, OnDevice) else x

        kwargs.pop("pin_memory", None)
        out = func(*tree_map(held, args), **tree_map(held, kwargs))
        by_held = {id(x.held): x for x in there}

        def wrapped(x: Any) -> Any:
            if not isinstance(x, Tensor) or not onto:
                return x
            same = by_held.get(id(x))
            return OnDevice(x) if same is None else same

        return tree_map(wrapped, out)

    def _copy(self, name: str, args: Any, kwargs: Any, to_device: bool) -> None:
        source = args[1] if name == "copy_" else args[0]
        asynchronous = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
        if isinstance(source, OnDevice) and not to_device:
            self.wait("a copy to the host")
        elif not isinstance(source, OnDevice) and to_device and source.numel():
            if source.data_ptr() not in self.pinned:
                self.wait("a copy from pageable memory")
            elif not asynchronous:
                self.wait("a blocking copy")

    def _read(self, name: str, args: Any, kwargs: Any) -> None:
        if name in READING:
            self.wait(name)
        if name == "repeat_interleave" and kwargs.get("output_size") is None:
            self.wait(name)
        indexed = name in ("index", "index_put_", "index_put", "_index_put_impl_")
        if indexed and any(x is not None and x.dtype == torch.bool for x in args[1]):
            self.wait("a mask as index")


@contextmanager
def simulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[Simulation]:
    """Within the block `meta` is the simulated device, with pinned memory and a stop check that reads late."""
    simulation = Simulation()
    monkeypatch.setattr(transfer, "pins", lambda device: device == DEVICE)
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: simulation.pin(self))

    class LateStopCheck(graphs.StopCheck):
        """An event behind a copy into pinned memory, waited for a check later."""

        def __call__(self, alive: Tensor) -> int | None:
            assert isinstance(alive, OnDevice)
            return super().__call__(alive.held)

    monkeypatch.setattr(graphs, "StopCheck", LateStopCheck)
    monkeypatch.setattr(torch, "inference_mode", torch.no_grad)  # which knows no tensors that hold others
    optimizers = sys.modules["torch.optim.optimizer"]  # torch.optim has no such attribute
    monkeypatch.setattr(optimizers, "_get_fused_kernels_supported_devices", lambda: ["cpu", "meta"])
    with simulation:
        yield simulation


def move(policy: Policy) -> Policy:
    """The policy's parameters and buffers on the simulated device."""
    moved: dict[int, Any] = {}
    for module in policy.model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                new = moved.setdefault(
                    id(parameter), nn.Parameter(OnDevice(parameter.detach()), parameter.requires_grad)
                )
                module._parameters[name] = new
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = moved.setdefault(id(buffer), OnDevice(buffer))
    head: Any = policy.model.get_output_embeddings()  # type: ignore[no-untyped-call]
    policy.weight = head.weight
    return policy
