"""How a process joins the others of its run, and how it leaves them.

torchrun, accelerate and others say in the environment who a process is: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
MASTER_PORT. Without them it is alone, and there is no process group.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from bandit_rft.distributed.ranks import Ranks
from bandit_rft.distributed.watch import Watch
from bandit_rft.launched import launched_rank

#: The first version whose FSDP2 sums gradients as they are needed here.
NEEDED = (2, 13)
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_RUNS = itertools.count()  # of this process: each has names of its own in the store


@contextmanager
def join_ranks(*, sharded: bool, timeout_s: float) -> Iterator[Ranks]:
    """The ranks of this run, for as long as the block runs.

    Args:
        sharded: whether parameters and optimizer state are split over the ranks.
        timeout_s: the longest that ranks that are alive wait for each other in one call.

    Raises:
        ValueError: the environment is incomplete.
        ImportError: torch is too old for several ranks.
        RankError: another rank died or failed meanwhile.
    """
    rank, world = launched_rank()
    if world == 1:
        yield Ranks()
        return
    if missing := [name for name in VARIABLES if name not in os.environ]:
        raise ValueError(f"WORLD_SIZE={world}, but {missing[0]} is not set: start the ranks with torchrun")
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < NEEDED:
        raise ImportError(f"several ranks need torch >= {NEEDED[0]}.{NEEDED[1]}; this is {torch.__version__}")
    from bandit_rft.distributed.process import ProcessRanks

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    given = dist.is_initialized()  # by the program that trains
    hosted = rank == 0 and not given and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    timeout = timedelta(seconds=timeout_s)
    store = dist.TCPStore(  # type: ignore[attr-defined]
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world, hosted, timeout, multi_tenant=True
    )
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    mine = dist.PrefixStore(f"bandit_rft/{attempt}/{next(_RUNS)}", store)  # type: ignore[attr-defined]
    log = logging.getLogger("bandit_rft")
    loudness = log.level
    if rank:  # the first one speaks for all
        log.setLevel(logging.ERROR)
    with Watch(rank, world, mine, where=f"{store.host}:{store.port}", hosted=hosted):
        if not given:
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, store=mine, rank=rank, world_size=world, timeout=timeout)
        yield ProcessRanks(sharded=sharded)
        dist.barrier()  # the first rank may serve the store: nobody leaves while others still need it
    log.setLevel(loudness)
    if not given:  # after a failure, leaving the group would wait for ranks that are gone
        dist.destroy_process_group()
