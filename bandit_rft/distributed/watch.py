"""What becomes of the other ranks when one dies: they end, within a minute, and say which one it was.

A rank that waits in a collective call for one that is gone hears of it late, or in words that name a socket. So each
rank leaves a sign of life in the store that the ranks met at, when it joins and every second, and looks for its
neighbour's. Who misses a neighbour, or fails, writes it down there for all; whoever reads it ends.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from bandit_rft.distributed.ranks import RankError
from bandit_rft.text import LIMIT, printable

#: Seconds between signs of life; without one after which a rank is taken for dead; for which a rank that has heard of
#: it may take to end by itself.
BEAT_S, DEAD_AFTER_S, GRACE_S = 1.0, 20.0, 5.0
#: Signs of life seen after an error that say that a rank was alive then: the first may have been left before it.
ALIVE = 3
#: What is wrong, in a message that all ranks read.
VERDICT = "verdict"


class Watch:
    """A context manager around everything that a rank does with the others.

    Args:
        rank: of this process.
        world: how many there are.
        store: where they met, with names of this run's own.
        where: its address.
        server: who serves it: "rank 0", or "the launcher".

    Raises:
        RankError: the server of the store died before this rank could join, or from an error inside the block that
            another rank's end explains.
    """

    def __init__(self, rank: int, world: int, store: Any, *, where: str, server: str):
        self._rank, self._world = rank, world
        self._where, self._server, self._serves = where, server, server == f"rank {rank}"
        self._gone = f"the store at {where} is gone: {server}, which serves it, died"
        self._me = f"rank {rank} (process {os.getpid()} on {socket.gethostname()})"
        self._joined = store
        self._verdict: str | None = None
        self._heard, self._over = threading.Event(), threading.Event()
        self._answered = time.monotonic()  # when the store last did

    def __enter__(self) -> Watch:
        self._start(self._judge)  # first: a server that is stopped by now leaves a new connection waiting without end
        try:
            self._store = dist.PrefixStore("watch", self._connection())  # type: ignore[attr-defined]
            self._sign(0)  # before this returns: a rank that is stopped from now on is missed
        except RuntimeError as error:
            self._over.set()
            why = f"{self._gone} ({_first_line(error)})"
            raise RankError(f"{why}. The run can be continued from its last checkpoint") from error
        self._start(self._look)
        return self

    def _connection(self) -> Any:
        """One of its own to the store: a call of the main thread may block for long."""
        patience, limit = self._joined.timeout, timedelta(seconds=DEAD_AFTER_S)
        self._joined.set_timeout(limit)  # for connecting, too
        connection = self._joined.clone()
        self._joined.set_timeout(patience)
        connection.set_timeout(limit)
        return connection

    def _start(self, work: Callable[[], None]) -> None:
        threading.Thread(target=work, name=f"watch of the ranks: {work.__name__}", daemon=True).start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError):
                self._await_verdict(error)  # a broken connection: whose end is it?
                of_the_group = type(error) is RuntimeError or isinstance(error, dist.DistError)
                if self._verdict is None and of_the_group and "timed out" in str(error).lower():  # as gloo says it
                    self._tell(
                        f"{self._me} waited for longer than distributed.timeout_s for another rank, which is alive"
                    )
                    self._heard.wait(3 * BEAT_S)
                if self._verdict is not None:
                    raise RankError(f"{self._verdict}. The run can be continued from its last checkpoint") from error
            if error is not None:
                self._tell(f"{self._me} failed ({type(error).__name__}: {_first_line(error)})")
        finally:
            self._over.set()
            if error is not None and self._serves:
                time.sleep(3 * BEAT_S)  # the store ends with this process: for the others to read the verdict

    def _await_verdict(self, error: RuntimeError) -> None:
        """Return when there is a verdict, or none to be expected: all others have given signs of life since the error.

        A rank that has not joined gives none. It is the verdict itself where the error says that it was waited for.
        """
        others = [rank for rank in range(self._world) if rank != self._rank]
        before, deadline = dict[int, int](), time.monotonic() + 3 * DEAD_AFTER_S  # by then `_judge` has spoken, too
        while not self._heard.wait(BEAT_S) and time.monotonic() < deadline:
            with contextlib.suppress(RuntimeError):  # the store is gone: `_look` and `_judge` say so
                signs = {rank: self._sign_of(rank) for rank in others}
                if isinstance(error, dist.DistStoreError) and (missing := [rank for rank in others if not signs[rank]]):
                    self._tell(f"rank {missing[0]} has not joined the others: it died, is stopped, or was not started")
                    continue
                beats = {rank: int(sign.partition(" ")[0]) for rank, sign in signs.items() if sign}
                before = before or beats
                if all(beats[rank] >= count + ALIVE for rank, count in before.items()):
                    return

    def _sign(self, beats: int) -> None:
        """Leave a sign of life: how many there were, and whose it is, in one, so that none is without the other."""
        self._store.set(f"sign/{self._rank}", f"{beats} {self._me}")

    def _sign_of(self, rank: int) -> str:
        """A rank's latest sign of life; "": it has not joined."""
        return self._store.get(f"sign/{rank}").decode() if self._store.check([f"sign/{rank}"]) else ""

    def _tell(self, verdict: str) -> None:
        """Write down for all why they cannot go on, unless somebody has."""
        with contextlib.suppress(RuntimeError):  # the store is gone: they will notice
            self._store.compare_set(VERDICT, "", verdict)

    def _look(self) -> None:
        """Leave a sign of life, look for the neighbour's and for a verdict; in a thread."""
        neighbour, seen, since, beats = (self._rank + 1) % self._world, "", time.monotonic(), 0
        while not self._over.wait(BEAT_S):
            beats += 1
            try:
                self._sign(beats)
                if self._store.check([VERDICT]):
                    self._hear(self._store.get(VERDICT).decode())
                    return
                sign = self._sign_of(neighbour)
                if sign != seen or not sign:  # one that has not joined yet is waited for where the ranks meet
                    seen, since = sign, time.monotonic()
                elif time.monotonic() - since > DEAD_AFTER_S:
                    name = sign.partition(" ")[2]
                    self._tell(f"{name} gave no sign of life for {DEAD_AFTER_S:.0f} seconds: it died, or is stopped")
                self._answered = time.monotonic()
            except RuntimeError:  # as torch reports a lost connection
                if self._over.wait(3 * BEAT_S):  # all is done, and the first rank has left
                    return
                self._hear(self._gone)
                return

    def _hear(self, verdict: str) -> None:
        self._verdict = verdict
        self._heard.set()

    def _judge(self) -> None:
        """End this process where it hangs after a verdict, or where the store does not even answer; in a thread."""
        while not self._over.wait(BEAT_S):
            if self._verdict is None and time.monotonic() - self._answered > 2 * DEAD_AFTER_S:
                self._hear(
                    f"the store at {self._where} has not answered for {2 * DEAD_AFTER_S:.0f} seconds: {self._server}, "
                    "which serves it, died, or is stopped"
                )
            if self._verdict is not None:
                if self._over.wait(GRACE_S):
                    return
                print(
                    f"bandit-rft: rank {self._rank} ends: {self._verdict}. The run can be continued from its last "
                    "checkpoint", file=sys.stderr, flush=True,
                )  # fmt: skip
                os._exit(1)  # the main thread waits in a call that will not return


def _first_line(error: BaseException) -> str:
    return printable(str(error).strip().partition("\n")[0], LIMIT)
