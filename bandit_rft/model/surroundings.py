"""What may be set around a call and must not change what it computes: autocast and the default dtype.

A sampler that ran under autocast and a trainer that did not would be two policies, and a bfloat16 product in between
would not be seen by either. The weights' own dtype decides.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def plain_surroundings() -> Iterator[None]:
    """Within the block, no autocast on a CPU or a GPU, and float32 as the default dtype. Also a decorator."""
    before = torch.get_default_dtype()
    with contextlib.ExitStack() as stack:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        try:
            torch.set_default_dtype(torch.float32)
            yield
        finally:
            torch.set_default_dtype(before)
