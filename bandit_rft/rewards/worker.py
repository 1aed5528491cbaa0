"""The parent's side of one reward worker: a process with a private pair of pipes, asked, timed, and killed at need.

Data cross the pipes as JSON: nothing is ever unpickled. `worker_main.py` is the other side, a fresh interpreter, or a
fork of this process where a function cannot be imported.
"""

import codecs
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any

from bandit_rft.rewards.spec import OUT_OF_MEMORY, RewardError, RewardFunction
from bandit_rft.text import printable

# A worker's limit to import its functions: a large library's first import from a cold disk is slow.
STARTUP_S = 120.0
LONGEST_WAIT_S = 1e6  # 11 days; poll() takes no more than 24
_ROOT = str(Path(__file__).parents[2])  # where this package lies


_making = threading.Lock()  # pipes and a fork are made one after another, so that a fork knows which ends are ours
_our_ends: set[int] = set()  # of the pipes of every worker: a fork that held one would keep a worker from ending


class WorkerLost(Exception):
    """A worker did not answer in time, or is gone; the text continues "reward 'name' "."""


class _Fork:
    """A forked child, with as much of Popen as a Worker needs."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def wait(self) -> int:
        """Reap it; the exit status, negative for a signal."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


class Worker:
    """The parent's side of one worker process.

    Args:
        set_up: what the process is told first.
        label: what it imports, for messages.
        inherited: functions that cannot be imported: the process is a fork of this one, which has them.
    """

    def __init__(self, set_up: dict[str, Any], label: str, inherited: Sequence[RewardFunction] = ()) -> None:
        self._set_up, self._label, self._inherited = set_up, label, list(inherited)
        self._process: subprocess.Popen[bytes] | _Fork | None = None
        self._pipes: tuple[FileIO, FileIO]  # our ends: to read replies from, to write requests to
        self._received = bytearray()
        self._output: threading.Thread  # shows what is printed
        self._asked = 0  # the number of the last request, never used again

    def start(self) -> None:
        """Start the process unless it runs already.

        Raises:
            RewardError: with what kept a function from being loaded.
        """
        if self._process is not None and not self._exited():
            return
        self.kill()
        with _making:
            child_read, write = os.pipe()
            read, child_write = os.pipe()
            self._pipes = FileIO(read, "rb"), FileIO(write, "wb")
            _our_ends.update((read, write))
            printed, output = os.pipe()
            try:
                make = self._fork if self._inherited else self._spawn
                self._process = make(child_read, child_write, output)
            finally:
                for end in (child_read, child_write, output):
                    os.close(end)
        self._output = threading.Thread(target=_show, args=(printed,), daemon=True)
        self._output.start()
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

    def _spawn(self, read: int, write: int, output: int) -> "subprocess.Popen[bytes]":
        """A fresh interpreter, which imports the functions."""
        path = [entry or os.getcwd() for entry in sys.path]
        environment = {
            "PYTHONHASHSEED": "0",  # the order of sets, on which sympy's results can depend
            **os.environ,
            "PYTHONPATH": os.pathsep.join([*path, *([] if _ROOT in path else [_ROOT])]),
        }
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "bandit_rft.rewards.worker_main", str(read), str(write)],
            stdin=subprocess.DEVNULL,
            stdout=output,  # whoever prints, the reward or what it starts, only `_show` reaches the terminal
            stderr=output,
            pass_fds=(read, write),
            start_new_session=True,  # Ctrl-C is the trainer's to handle, and what a reward starts is killed with it
            env=environment,
        )

    def _fork(self, read: int, write: int, output: int) -> _Fork:
        """A copy of this process, which has the functions; of its threads only the one that forks goes on."""
        from bandit_rft.rewards.worker_main import main_of_fork

        with warnings.catch_warnings():  # that a process with threads forks is known, and the child starts none of them
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:  # a reward may have rewards of its own: what was ours is not its, and the lock is open
            not_ours = list(_our_ends)
            _our_ends.clear()
            _making.release()
            main_of_fork(read, write, output, self._inherited, not_ours)
        return _Fork(pid)

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
        for kill in (os.killpg, os.kill):  # the second for a fork that was not yet the leader of its group
            with contextlib.suppress(ProcessLookupError, PermissionError):
                kill(process.pid, signal.SIGKILL)
        status = process.wait()
        with _making:
            for pipe in self._pipes:
                _our_ends.discard(pipe.fileno())
                pipe.close()
        self._output.join(1.0)  # a process that left the group may hold it open
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
        left = min(max(0.0, deadline - time.monotonic()), LONGEST_WAIT_S)
        if not poll.poll(left * 1000):
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
            return f"died in its worker process, of {_signal_name(-status)}"
        return f"ended its worker process, with exit status {status}"


def _show(pipe: int) -> None:
    """Write what comes out of a pipe to standard error, as text that does nothing but stand there."""
    decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
    with FileIO(pipe, "rb") as output:
        while data := output.read(1 << 16):
            shown = memoryview(printable(decoder.decode(data)).encode())
            with contextlib.suppress(OSError):  # nobody reads it; the reward need not care
                while shown:
                    shown = shown[os.write(2, shown) :]


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # real-time signals have no names
        return f"signal {number}"


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
