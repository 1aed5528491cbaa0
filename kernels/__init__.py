"""Triton kernels, one file an operation. None is needed: without Triton the operations run through PyTorch.

Importing this package imports no Triton; importing one of its modules does. A machine has Triton's kernels where
`refusal` says None: on an NVIDIA GPU from sm_80 on, and on CPU tensors in Triton's interpreter (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@cache
def _installed() -> bool:
    try:
        return bool(version("triton"))
    except PackageNotFoundError:
        return False


@cache
def _capability(device_index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device_index)


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Where to launch: Triton launches on the current device, so the tensor's must be it."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def rows_contiguous(matrix: Tensor) -> Tensor:
    """The matrix itself if its columns are neighbours in memory, as the kernels read them; otherwise a copy."""
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()


def refusal(device_type: str, dtype: torch.dtype, device_index: int = 0) -> str | None:
    """None if these kernels can read tensors of this device and dtype, otherwise the reason why not."""
    if not _installed():
        return "Triton is not installed"
    if dtype not in DTYPES:
        return f"it reads float32, bfloat16 and float16; the tensors are {str(dtype).removeprefix('torch.')}"
    if device_type == "cpu" and os.environ.get("TRITON_INTERPRET", "0") != "1":
        return "it reads GPU memory (CPU memory only in Triton's interpreter, TRITON_INTERPRET=1)"
    if device_type not in ("cpu", "cuda"):
        return f"it reads CUDA memory; the tensors are on {device_type}"
    if device_type == "cuda" and torch.version.hip is None and _capability(device_index) < (8, 0):
        return f"it needs compute capability 8.0 or later; this GPU has {'.'.join(map(str, _capability(device_index)))}"
    return None
