"""The parent's side of one reward worker: a process with a private pair of pipes, asked, timed, and killed at need.

Data cross the pipes as JSON: nothing is ever unpickled. `worker_main.py` is the other side.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from bandit_rft.rewards.spec import OUT_OF_MEMORY, RewardError
from bandit_rft.text import printable

# A worker's limit to import its functions: a large library's first import from a cold disk is slow.
STARTUP_S = 120.0
_ROOT = str(Path(__file__).parents[2])  # where this package lies


class WorkerLost(Exception):
    """A worker did not answer in time, or is gone; the text continues "reward 'name' "."""


class Worker:
    """The parent's side of one worker process."""

    def __init__(self, set_up: dict[str, Any], label: str) -> None:
        self._set_up, self._label = set_up, label
        self._process: subprocess.Popen[bytes] | None = None
        self._pipes: tuple[FileIO, FileIO]  # our ends: to read replies from, to write requests to
        self._received = bytearray()
        self._asked = 0  # the number of the last request, never used again

    def start(self) -> None:
        """Start the process unless it runs already.

        Raises:
            RewardError: with what kept a function from being loaded.
        """
        if self._process is not None and not self._exited():
            return
        self.kill()
        path = [entry or os.getcwd() for entry in sys.path]
        environment = {
            "PYTHONHASHSEED": "0",  # the order of sets, on which sympy's results can depend
            **os.environ,
            "PYTHONPATH": os.pathsep.join([*path, *([] if _ROOT in path else [_ROOT])]),
        }
        child_read, write = os.pipe()
        read, child_write = os.pipe()
        self._pipes = FileIO(read, "rb"), FileIO(write, "wb")
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "bandit_rft.rewards.worker_main", str(child_read), str(child_write)],
                stdin=subprocess.DEVNULL,
                stdout=2,  # what is printed goes to standard error, and never between the replies
                pass_fds=(child_read, child_write),
                start_new_session=True,  # Ctrl-C is the trainer's to handle, and what a reward starts is killed with it
                env=environment,
            )
        finally:
            os.close(child_read)
            os.close(child_write)
        os.set_blocking(write, False)
        deadline = time.monotonic() + STARTUP_S
        try:
            self.ask({**self._set_up, "path": sys.path, "python_path": os.environ.get("PYTHONPATH")}, deadline)
            answer = self.answer(deadline)
        except WorkerLost as lost:
            self.kill()
            raise RewardError(f"the worker that imports {self._label} {lost} before it had done so") from None
        if "error" in answer:
            self.kill()
            raise RewardError(answer["error"])

    def ask(self, request: dict[str, Any], deadline: float) -> None:
        """Send a request under a new number.

        Raises:
            WorkerLost: the worker did not take it in time, or is gone.
            ValueError: the request holds what JSON cannot.
        """
        self._asked += 1
        pipe = self._pipes[1].fileno()
        view = memoryview(encode({"id": self._asked, **request}))
        while view:
            self._wait(pipe, select.POLLOUT, deadline)
            try:
                view = view[os.write(pipe, view) :]
            except BlockingIOError:
                continue
            except OSError:
                raise WorkerLost(self._cause_of_death()) from None

    def answer(self, deadline: float, row: int = 0) -> dict[str, Any]:
        """Read the reply to the last request that starts at a row of it; no other is taken for it.

        Raises:
            WorkerLost: no reply in time, or something that is no such reply was written to the pipe.
        """
        line = self._line(deadline)
        try:
            reply = json.loads(line)
            if reply["id"] == self._asked and reply.get("row", 0) == row:
                return dict(reply)
        except (ValueError, TypeError, KeyError):
            pass
        found = printable(line.decode(errors="replace"), 80, one_line=True)
        raise WorkerLost(f"wrote into its worker's pipe: {found!r} is no reply to what was asked")

    def _line(self, deadline: float) -> bytes:
        pipe = self._pipes[0].fileno()
        while (end := self._received.find(b"\n")) < 0:
            self._wait(pipe, select.POLLIN, deadline)
            data = os.read(pipe, 1 << 16)
            if not data:
                raise WorkerLost(self._cause_of_death())
            self._received += data
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        return line

    def kill(self) -> int:
        """End the process and whatever it started; return its exit status, its own if it had already ended."""
        process, self._process = self._process, None
        self._received.clear()
        if process is None:
            return 0
        # Only here is the process reaped: its number cannot belong to another one before.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        status = process.wait()
        for pipe in self._pipes:
            pipe.close()
        return status

    def _exited(self) -> bool:
        """Tell whether the process has ended, without reaping it."""
        assert self._process is not None
        return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def _wait(self, pipe: int, event: int, deadline: float) -> None:
        """Wait until a pipe is ready.

        Raises:
            WorkerLost: at the deadline.
        """
        poll = select.poll()
        poll.register(pipe, event)
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise WorkerLost("hung and was killed")

    def _cause_of_death(self) -> str:
        """Say how the process ended, which it just did or is about to do."""
        deadline = time.monotonic() + 1.0
        while not self._exited():
            if time.monotonic() > deadline:
                self.kill()
                return "closed the pipes of its worker process"
            time.sleep(0.005)
        status = self.kill()
        if status == OUT_OF_MEMORY:
            return "ran out of memory"
        if status < 0:
            return f"died in its worker process, of {signal.Signals(-status).name}"
        return f"ended its worker process, with exit status {status}"


def encode(message: Any) -> bytes:
    """Write a message as one line of JSON."""
    return json.dumps(message, default=_plain).encode() + b"\n"


def _plain(value: Any) -> Any:
    """Turn what JSON does not know into what it does: arrays, tensors, mappings, dates."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Mapping):
        return dict(value)
    if hasattr(value, "isoformat"):
        return value.isoformat()
    raise ValueError(
        f"columns: one holds a {type(value).__name__}, which cannot be sent to a reward worker; expected what JSON can "
        'hold (or set isolation="none")'
    )
