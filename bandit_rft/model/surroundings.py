"""What may be set around a call and must not change what it computes: autocast and the default dtype.

A sampler that ran under autocast and a trainer that did not would be two policies, and a bfloat16 product in between
would not be seen by either. The weights' own dtype decides.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

_lock = threading.Lock()
_inside, _before = 0, torch.float32  # blocks under way, in all threads, and the default dtype around them


@contextlib.contextmanager
def plain_surroundings() -> Iterator[None]:
    """Within the block, no autocast on a CPU or a GPU, and float32 as the default dtype. Also a decorator."""
    with contextlib.ExitStack() as stack:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(_float32())
        yield


@contextlib.contextmanager
def _float32() -> Iterator[None]:
    """The default dtype is the whole process's: the first thread that comes sets it, the last to leave restores it."""
    global _inside, _before
    with _lock:
        if _inside == 0:
            _before = torch.get_default_dtype()
            torch.set_default_dtype(torch.float32)
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                torch.set_default_dtype(_before)
