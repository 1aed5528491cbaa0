"""Copies between host memory and a device, and what they wait for: to the device nothing, back once for all together.

A copy from ordinary (pageable) memory makes the host wait, whatever `non_blocking` says: the driver stages it. So what
goes to a GPU goes through pinned memory, which PyTorch keeps for the next copy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def pins(device: torch.device) -> bool:
    """Whether copies to this device go through pinned memory."""
    return device.type == "cuda"


def to_device(values: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Values of the host on a device; the host waits for nothing.

    Args:
        values: a tensor (one that is there already is returned as it is), an array or a list of numbers.
        device: where to.
        dtype: of the result; by default that of the values.
    """
    host = torch.as_tensor(values, dtype=dtype)
    if host.device == device:
        return host
    if host.device.type == "cpu" and pins(device):
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


def to_host(*tensors: Tensor) -> list[Tensor]:
    """Tensors of one device in host memory, in one copy; the host waits once, for all that was asked before."""
    if all(x.device.type == "cpu" for x in tensors):
        return list(tensors)
    # Bytes one after another, the widest numbers first, so that each begins where its type may.
    order = sorted(range(len(tensors)), key=lambda i: -tensors[i].element_size())
    packed = torch.cat([tensors[i].detach().reshape(-1).view(torch.uint8) for i in order]).cpu()
    parts = packed.split([tensors[i].numel() * tensors[i].element_size() for i in order])
    found = {i: part.view(tensors[i].dtype).view(tensors[i].shape) for i, part in zip(order, parts, strict=True)}
    return [found[i] for i in range(len(tensors))]
