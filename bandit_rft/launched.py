"""Which of a run's processes this one is, as torchrun, accelerate and others say it in the environment."""

from __future__ import annotations

import os


def launched_rank() -> tuple[int, int]:
    """(rank, world): RANK and WORLD_SIZE of the environment; (0, 1) where it says nothing, or of one process."""
    world = int(os.environ.get("WORLD_SIZE") or 1)
    return (int(os.environ.get("RANK") or 0), world) if world > 1 else (0, 1)
