"""Which backend serves which call: one table, pure predicates. `describe()` prints it; BANDIT_RFT_BACKEND forces one.

A backend is an object with one method an operation on rows of logits (backend.py):

    cpu     the compiled core (csrc/cpu): float32 and bfloat16 rows in CPU memory
    cuda    the compiled CUDA kernels (csrc/cuda): float32, bfloat16 and float16 rows on an NVIDIA GPU, sm_80 and later
    triton  the Triton kernels (kernels/): an NVIDIA GPU; CPU memory only if forced, in Triton's interpreter (tests)
    torch   plain PyTorch, chunked: any device, any floating dtype

The matrix products around the rows are the vendor's; or the core's own, for sampling on the cpu backend (in which a row
has the same bits in any batch) and for its losses where those are faster; or, on triton, fused with the softmax
(`fusing`).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from .backend import Backend
from .core_backend import CpuBackend, CudaBackend
from .installed import load_core, load_kernels
from .torch_backend import TorchBackend
from .triton_backend import TritonBackend

kernels = load_kernels()  # imports no Triton
native, native_error = load_core()
if native is not None:
    # torch's own OpenMP runtime, which lies beside its libraries or is the system's: the core works on its threads.
    for _library in [
        *map(str, (Path(torch.__file__).parent / "lib").glob("lib?omp*.so*")),
        "libgomp.so.1",
        "libiomp5.so",
    ]:
        if native.use_openmp(_library):
            break


class Call(NamedTuple):
    """What a predicate may look at."""

    device_type: str
    dtype: torch.dtype
    device_index: int = 0


class Entry(NamedTuple):
    """A row of the table."""

    backend: Backend
    what: str
    #: None if the backend serves the call, otherwise the reason why not.
    refusal: Callable[[Call], str | None]


def _cpu_refusal(call: Call) -> str | None:
    if native is None:
        return f"the compiled module bandit_rft._C is not installed ({native_error})"
    if call.device_type != "cpu":
        return f"it reads CPU memory; the tensors are on {call.device_type}"
    if call.dtype not in (torch.float32, torch.bfloat16):
        return f"it reads float32 and bfloat16; the tensors are {str(call.dtype).removeprefix('torch.')}"
    return None


@cache
def _cuda_module_refusal(device: int) -> str | None:
    """Why the compiled CUDA kernels cannot run on this GPU: what is there and what is needed, in one sentence."""
    if native is None:
        return f"the compiled module bandit_rft._C is not installed ({native_error})"
    if not hasattr(native, "cuda"):
        return f"bandit_rft {native.version} was built without CUDA; a wheel with +cu in its version has the kernels"
    return native.cuda.refusal(device) or None


def _cuda_refusal(call: Call) -> str | None:
    if call.device_type != "cuda" or torch.version.hip is not None:
        return f"it reads NVIDIA GPU memory; the tensors are on {'hip' if torch.version.hip else call.device_type}"
    if call.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it reads float32, bfloat16 and float16; the tensors are {str(call.dtype).removeprefix('torch.')}"
    return _cuda_module_refusal(call.device_index)


def _triton_refusal(call: Call) -> str | None:
    reason: str | None = kernels.refusal(call.device_type, call.dtype, call.device_index)
    return reason


#: In the order in which they are asked.
BACKENDS = [
    Entry(CpuBackend(native), "compiled core, float32 and bfloat16 in CPU memory", _cpu_refusal),
    Entry(CudaBackend(native), "compiled CUDA kernels, float32, bfloat16 and float16 on a GPU", _cuda_refusal),
    Entry(TritonBackend(), "Triton kernels, float32, bfloat16 and float16 on a GPU", _triton_refusal),
    Entry(TorchBackend(), "plain PyTorch, any device and floating dtype", lambda call: None),
]
_ENTRIES = {entry.backend.name: entry for entry in BACKENDS}

_forced: ContextVar[str | None] = ContextVar("bandit_rft_backend", default=None)
_checked: ContextVar[bool | None] = ContextVar("bandit_rft_checked", default=None)
_told = False


def register(backend: Backend, what: str, refusal: Callable[[Call], str | None]) -> None:
    """Add kernels of one's own: they are asked before those that are here, and tests and benchmarks take them in.

    Args:
        backend: its name is a new one; what it does not define, a backend it inherits from does (docs/operations.md).
        what: it is, in a few words, for `describe`.
        refusal: why it cannot serve a call (device type, dtype, device index), in one sentence; None where it can.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if not isinstance(backend, Backend):
        raise TypeError(f"backend must be a bandit_rft.ops.backend.Backend; got {type(backend).__name__}")
    name = getattr(backend, "name", None)
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"backend.name must be a word of letters, digits and underscores; got {name!r}")
    if name in _ENTRIES:
        raise ValueError(f"backend.name must be a new one; {', '.join(_ENTRIES)} are taken")
    if not callable(refusal):
        raise TypeError(f"refusal must be a function of a Call; got {type(refusal).__name__}")
    entry = Entry(backend, str(what), refusal)
    BACKENDS.insert(0, entry)
    _ENTRIES[name] = entry


#: Before any `register`.
BUILT_IN = tuple(_ENTRIES)


def registered(call: Call) -> list[str]:
    """The names of added backends that serve a call."""
    return [e.backend.name for e in BACKENDS if e.backend.name not in BUILT_IN and e.refusal(call) is None]


def serving(device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend that serves tensors of this device and dtype.

    Raises:
        ValueError: BANDIT_RFT_BACKEND (or `use_backend`) names one that cannot.
    """
    call = Call(device.type, dtype, _index(device))
    if forced := _forced.get() or os.environ.get("BANDIT_RFT_BACKEND"):
        entry = _ENTRIES.get(forced)
        if entry is None:
            raise ValueError(f"BANDIT_RFT_BACKEND must be one of {', '.join(_ENTRIES)}; got {forced!r}")
        if reason := entry.refusal(call):
            raise ValueError(f"BANDIT_RFT_BACKEND={forced} cannot serve this call: {reason}")
        return entry.backend
    if not _told:
        _tell(call)
    for entry in BACKENDS:
        interpreted = entry.backend.name == "triton" and call.device_type == "cpu"  # thousands of times slower
        if not interpreted and entry.refusal(call) is None:
            return entry.backend
    raise AssertionError("unreachable: the torch backend serves every call")


def select(device: torch.device, dtype: torch.dtype) -> str:
    """The name of the backend that serves tensors of this device and dtype (`serving`)."""
    return serving(device, dtype).name


def named(name: str) -> Backend:
    """The backend of this name: the one that a forward call was served by, in its backward."""
    return _ENTRIES[name].backend


def fusing(device: torch.device, dtype: torch.dtype) -> Backend | None:
    """The backend that runs a forward through the head (scoring, or a draw from the whole softmax) as one kernel.

    `dtype` is that of hidden and weight. Where triton can serve and no other backend is forced: bfloat16 and float16 on
    a GPU; float32 only if triton is forced, since its exact float32 products are slower than the vendor's.
    """
    triton = _ENTRIES["triton"]
    if forced := _forced.get() or os.environ.get("BANDIT_RFT_BACKEND"):
        return serving(device, dtype) if forced == "triton" else None
    if device.type != "cuda" or dtype == torch.float32:
        return None
    return triton.backend if triton.refusal(Call(device.type, dtype, _index(device))) is None else None


def scaling(device: torch.device, dtype: torch.dtype) -> str:
    """The name of the backend that scales a gradient in place: on a GPU triton, whichever serves the rows.

    A compiler that traces the call sees PyTorch's product, which it can fuse.
    """
    if torch.compiler.is_compiling():
        return "torch"
    if device.type != "cuda" or _forced.get() or os.environ.get("BANDIT_RFT_BACKEND"):
        return select(device, dtype)
    serves = _ENTRIES["triton"].refusal(Call(device.type, dtype, _index(device))) is None
    return "triton" if serves else "torch"


def _index(device: torch.device) -> int:
    if device.index is not None or device.type != "cuda":
        return device.index or 0
    return torch.cuda.current_device() if torch.cuda.is_available() else 0


def _tell(call: Call) -> None:
    """Warn, once, where the operations run on something slower than they might."""
    global _told
    if native is None and call.device_type == "cpu":
        _told = True
        warnings.warn(
            "bandit_rft runs through PyTorch, with the same results, slower: the compiled module is missing "
            f"({native_error})",
            RuntimeWarning,
            stacklevel=4,
        )
    elif call.device_type == "cuda" and torch.version.hip is None:
        _told = True
        if reason := _cuda_module_refusal(call.device_index):
            warnings.warn(
                f"bandit_rft goes on without its CUDA kernels, through Triton or PyTorch: {reason}",
                RuntimeWarning,
                stacklevel=4,
            )


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force one backend within a `with` block (tests, measurements)."""
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


@contextmanager
def checked(enabled: bool = True) -> Iterator[None]:
    """Within the block, a NaN or infinite logit row, advantage or log-probability raises with its index.

    This synchronizes with a GPU. BANDIT_RFT_CHECKED=1 does the same for a whole process. Without it such rows make the
    loss NaN and are counted in stats["nonfinite_rows"].
    """
    token = _checked.set(enabled)
    try:
        yield
    finally:
        _checked.reset(token)


def is_checked() -> bool:
    """Whether values are looked at although a GPU has to be waited for: `checked`, or else BANDIT_RFT_CHECKED."""
    value = _checked.get()
    return os.environ.get("BANDIT_RFT_CHECKED", "0") not in ("", "0") if value is None else value


def describe() -> str:
    """The table of backends on this machine, and what the compiled core was built and chosen for."""
    lines = []
    if native is None:
        lines.append(f"compiled core  missing: {native_error}")
    else:
        lines.append(f"compiled core  {native.version}, instruction set {native.instruction_set()}")
        if hasattr(native, "cuda"):
            lines.append(f"CUDA kernels   CUDA {native.cuda.version}, sm_{native.cuda.architectures} and later")
    lines.append(f"torch          {torch.__version__}, {torch.get_num_threads()} threads")
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for device in devices:
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            serving = select(torch.device(device), dtype)
            lines.append(f"{device:<5}{str(dtype).removeprefix('torch.'):<10}-> {serving}")
    for entry in BACKENDS:
        lines.append(f"{entry.backend.name:<15}{entry.what}")
    return "\n".join(lines)
