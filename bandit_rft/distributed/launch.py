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
from importlib import metadata

import torch
import torch.distributed as dist

from bandit_rft.distributed.ranks import RankError, Ranks
from bandit_rft.distributed.watch import Watch
from bandit_rft.launched import launched_rank

#: The first versions whose FSDP2 sums gradients as they are needed here, and whose save_file lets other threads run:
#: a rank that writes a long file must still give signs of life.
NEEDED = {"torch": (2, 13), "safetensors": (0, 8)}
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_RUNS = itertools.count()  # of this process: each has names of its own in the store


@contextmanager
def join_ranks(*, sharded: bool, timeout_s: float, gpu: bool) -> Iterator[Ranks]:
    """The ranks of this run, for as long as the block runs.

    Args:
        sharded: whether parameters and optimizer state are split over the ranks.
        timeout_s: the longest that ranks that are alive wait for each other in one call.
        gpu: whether each works on a GPU, that of its LOCAL_RANK.

    Raises:
        ValueError: the environment is incomplete, or a process group is there that serves GPUs alone.
        ImportError: torch or safetensors is too old for several ranks.
        RankError: the ranks could not meet, or another one died or failed meanwhile.
    """
    rank, world = launched_rank()
    if world == 1:
        yield Ranks()
        return
    if missing := [name for name in VARIABLES if name not in os.environ]:
        raise ValueError(f"WORLD_SIZE={world}, but {missing[0]} is not set: start the ranks with torchrun")
    for name, needed in NEEDED.items():
        has = metadata.version(name)
        if tuple(int(part) for part in has.split("+")[0].split(".")[:2]) < needed:
            raise ImportError(f"several ranks need {name} >= {needed[0]}.{needed[1]}; this is {has}")
    from bandit_rft.distributed.process import ProcessRanks

    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    given = dist.is_initialized()  # by the program that trains
    if given and not dist.get_backend_config().startswith("gloo") and "cpu:" not in dist.get_backend_config():
        raise ValueError(
            f"the process group that is there has {dist.get_backend_config()}, but ranks exchange host memory, too: "
            "init_process_group('cpu:gloo,cuda:nccl'), or leave it to the trainer"
        )
    server = "the launcher" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "rank 0"
    hosted = rank == 0 and server == "rank 0" and not given
    timeout = timedelta(seconds=timeout_s)
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store = dist.TCPStore(host, port, world, hosted, timeout, multi_tenant=True)  # type: ignore[attr-defined]
    except dist.DistError as error:
        what = str(error).strip().partition("\n")[0]
        raise RankError(
            f"rank {rank} could not meet the other ranks, of {world}, at {host}:{port}, which {server} serves "
            f"(distributed.timeout_s={timeout_s:g}): {what}"
        ) from error
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    mine = dist.PrefixStore(f"bandit_rft/{attempt}/{next(_RUNS)}", store)  # type: ignore[attr-defined]
    log = logging.getLogger("bandit_rft")
    loudness = log.level
    if rank:  # the first one speaks for all
        log.setLevel(logging.ERROR)
    try:
        with Watch(rank, world, mine, where=f"{store.host}:{store.port}", server=server):
            if not given:
                backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
                dist.init_process_group(backend, store=mine, rank=rank, world_size=world, timeout=timeout)
            yield ProcessRanks(sharded=sharded)
            dist.barrier()  # the first rank may serve the store: nobody leaves while others still need it
    finally:
        log.setLevel(loudness)
    if not given:  # after a failure, leaving the group would wait for ranks that are gone
        dist.destroy_process_group()
