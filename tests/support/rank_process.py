"""A process that has imported everything once and forks the ranks of a run for every line it reads.

stdin: one JSON object a line, {"world": K, "config": {...}} and, for faults, {"patch": {name in watch.py: value},
"reward": name in tiny_rewards.py, "stop": [rank, round in which it is asked to stop], "save": rounds after which to
save, whatever save_steps says, "halt": [rank, "before" or "after" its first sign of life, where SIGSTOP halts it],
"late": rank that joins two seconds after the others, "fault": rank that raises in the first round, "fault_in": the
method of its trainer that does, else "draw", "saving": seconds that a checkpoint takes longer to write}; stdout: the
process ids of the ranks, then, when all have ended, their exit statuses. What still runs after LIMIT_S is killed, so
that the next line is read whatever became of this one.
Rank r writes to the file errors-r in the folder of the first argument.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet  # noqa: F401
import tiny_rewards
import torch
from tiny_models import sums

from bandit_rft import checkpoint, evaluate, model, records, rollout, trainer  # noqa: F401  (loaded before the fork)
from bandit_rft.config import build_config
from bandit_rft.distributed import process, watch  # noqa: F401
from bandit_rft.tasks import Task

#: Seconds that the ranks of one run may take: less than a test may (pyproject.toml).
LIMIT_S = 150


def train(order: dict[str, Any], rank: int) -> None:
    for name, value in order.get("patch", {}).items():
        assert hasattr(watch, name)
        setattr(watch, name, value)
    if order.get("halt", [None])[0] == rank:
        halt(order["halt"][1])
    if order.get("late") == rank:
        join_late()
    task = sums()
    reward = getattr(tiny_rewards, order.get("reward", "starts_with_vowel"))
    run = trainer.Trainer(build_config(order["config"]), task=Task(task.name, task.splits, [reward]))
    finish = run._finish_round

    def finish_and_save(*of: Any) -> None:
        finish(*of)
        if run.round in order.get("save", ()):
            run.records.checkpoint()

    run._finish_round = finish_and_save  # type: ignore[method-assign]
    if order.get("fault") == rank:

        def fail(*of: Any, **options: Any) -> None:
            raise RuntimeError(f"of rank {rank}'s own")

        setattr(run, order.get("fault_in", "draw"), fail)
    if "saving" in order:
        save = records.save_checkpoint

        def save_slowly(*of: Any) -> None:
            time.sleep(order["saving"])
            save(*of)

        records.save_checkpoint = save_slowly
    at = order.get("stop")
    if at is not None and at[0] == rank:
        number, draw = at[1], run.draw

        def draw_and_stop(of: int, clock: Any) -> Any:
            run.stop_requested = run.stop_requested or of == number
            return draw(of, clock)

        run.draw = draw_and_stop  # type: ignore[method-assign]
    run.run()


def halt(moment: str) -> None:
    """Stop this process as it joins the others: no later than that can a moment be chosen without a race."""
    enter = watch.Watch.__enter__

    def enter_and_halt(of: watch.Watch) -> watch.Watch:
        if moment == "before":
            os.kill(os.getpid(), signal.SIGSTOP)
        entered = enter(of)
        os.kill(os.getpid(), signal.SIGSTOP)
        return entered

    watch.Watch.__enter__ = enter_and_halt  # type: ignore[method-assign]


def join_late() -> None:
    begin = watch.Watch.__init__

    def wait_and_begin(of: watch.Watch, *args: Any, **options: Any) -> None:
        time.sleep(2)
        begin(of, *args, **options)

    watch.Watch.__init__ = wait_and_begin  # type: ignore[method-assign]


def fork(order: dict[str, Any], rank: int, port: int, errors: Path) -> int:
    with (errors / f"errors-{rank}").open("w") as file:  # before the fork: whoever looks finds no earlier run's
        child = os.fork()
        if child:
            return child
        os.dup2(file.fileno(), 2)
    world = order["world"]
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        train(order, rank)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def end_of(ranks: list[int]) -> list[int]:
    """The exit statuses of processes, each within LIMIT_S of the call."""
    deadline = time.monotonic() + LIMIT_S
    statuses = list[int]()
    for rank in ranks:
        ended, status = os.waitpid(rank, os.WNOHANG)
        while not ended:
            if time.monotonic() > deadline:
                os.kill(rank, signal.SIGKILL)
            time.sleep(0.01)
            ended, status = os.waitpid(rank, os.WNOHANG)
        statuses.append(status)
    return statuses


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        order = json.loads(line)
        port = free_port()
        ranks = [fork(order, rank, port, Path(sys.argv[1])) for rank in range(order["world"])]
        print(*ranks, flush=True)
        print(*end_of(ranks), flush=True)
