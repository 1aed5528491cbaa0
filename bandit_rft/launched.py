"""Which of a run's processes this one is, as torchrun, accelerate and others say it in the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping

#: What torchrun (2.13) tells a process of its place, besides names that begin with TORCHELASTIC_.
PLACE = frozenset({
    "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE",
    "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
})  # fmt: skip


def launched_rank() -> tuple[int, int]:
    """(rank, world): RANK and WORLD_SIZE of the environment; (0, 1) where it says nothing, or of one process."""
    world = int(os.environ.get("WORLD_SIZE") or 1)
    return (int(os.environ.get("RANK") or 0), world) if world > 1 else (0, 1)


def not_launched(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment for a program that is no rank of the run, though a rank starts it.

    init_process_group in it could take the rank's place, and fails where it expects the launcher to serve its store
    (TORCHELASTIC_USE_AGENT_STORE).
    """
    return {k: v for k, v in environment.items() if k not in PLACE and not k.startswith("TORCHELASTIC_")}
