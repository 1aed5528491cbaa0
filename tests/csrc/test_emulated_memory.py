"""The emulation's own checks (tests/native/device_emulation.h): alignment, and copies that must be waited for."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.slow  # compiles the emulation


@pytest.fixture(scope="module")
def kernels(emulated_cuda: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(emulated_cuda))
    for name in ("write_vector", "copy_vectors"):
        getattr(loaded, name).restype = ctypes.c_char_p
    return loaded


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def raise_if(error: bytes | None) -> None:
    if error is not None:
        raise ValueError(error.decode())


def test_misaligned_vectors_are_seen(kernels: ctypes.CDLL) -> None:
    """As on a device, a 16-byte access off a 16-byte address ends the kernel, in shared and in global memory."""
    room = torch.zeros(64, dtype=torch.uint8)  # torch aligns allocations to 64 bytes
    for memory in (None, room):
        raise_if(kernels.write_vector(16, pointer(memory)))
        for offset in (4, 8):
            with pytest.raises(ValueError, match=f"misaligned address: {offset} modulo 16"):
                raise_if(kernels.write_vector(offset, pointer(memory)))
    assert room.view(torch.int32)[:8].tolist() == [0, 0, 0, 0, 1, 2, 3, 4]


@pytest.mark.parametrize("left", [0, 1, 3])
def test_copies_that_nobody_waits_for_are_not_there(kernels: ctypes.CDLL, left: int) -> None:
    """As late as a device may do it: a kernel that forgets a wait reads nonsense here."""
    groups = 5
    room, found = torch.arange(groups * 128 + 16, dtype=torch.int32), torch.empty(groups * 128, dtype=torch.int32)
    copy = (ctypes.c_int(groups), ctypes.c_int(left))
    raise_if(kernels.copy_vectors(*copy, 0, pointer(room), pointer(found)))
    done = (groups - left) * 128
    assert torch.equal(found[:done], room[:done])
    assert bool((found[done:] == 0x7F7F7F7F).all())
    with pytest.raises(ValueError, match="misaligned address: 4 modulo 16"):
        raise_if(kernels.copy_vectors(*copy, 4, pointer(room), pointer(found)))
