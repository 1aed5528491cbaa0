"""What runs inside a reward worker process: it loads the functions, then answers requests until its input ends.

Started as `python -m bandit_rft.rewards.worker_main READ WRITE`, the numbers of two inherited pipes. Requests and
replies are lines of JSON on these. Standard output and error are a pipe of their own, which the parent shows: nothing
that is printed, by a reward or by what starts with the interpreter, is taken for a reply, and its control codes are
escaped. A reply names its request and the row it starts at, and comes from the process that was asked: a child that a
reward forks has no pipe, and ends where it would reply. Nothing here, nor what it imports, imports torch.
"""

import contextlib
import io
import json
import os
import queue
import resource
import sys
import threading
from collections.abc import Callable
from typing import Any

from bandit_rft.rewards.spec import OUT_OF_MEMORY, RewardError, RewardFunction
from bandit_rft.text import printable


class Pipe:
    """This process's end of the two pipes; a forked child has none."""

    def __init__(self, read: int, write: int) -> None:
        self._read, self._write, self._owner = read, write, os.getpid()
        for pipe in (read, write):
            os.set_inheritable(pipe, False)  # what a reward starts does not get them either
        os.register_at_fork(after_in_child=self._close)

    def lines(self, requests: "queue.SimpleQueue[bytes]") -> None:
        """Pass on line by line what comes in; end the process when nothing more can come."""
        with open(self._read, "rb", closefd=False) as lines:
            for line in lines:
                requests.put(line)
        os._exit(0)

    def reply(self, message: Any) -> None:
        """Write one line. A child that a reward forked, and that came back from it, ends here."""
        if os.getpid() != self._owner:
            os._exit(1)
        view = memoryview(json.dumps(message).encode() + b"\n")
        while view:
            view = view[os.write(self._write, view) :]

    def _close(self) -> None:
        for pipe in (self._read, self._write):
            with contextlib.suppress(OSError):
                os.close(pipe)


class PrintableStream(io.TextIOWrapper):
    """Standard error for text that may quote what a model wrote."""

    def write(self, text: str) -> int:
        """Write a text with its control codes escaped."""
        super().write(printable(text))
        return len(text)


def main(read: int, write: int) -> None:
    """Serve requests: the first line holds the set-up, every other one a function's number and what it is to score."""
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    pipe = Pipe(read, write)
    sys.stdout = sys.stderr = PrintableStream(sys.stderr.buffer, "utf-8", "backslashreplace", line_buffering=True)
    # A thread of its own reads on while a reward computes, so the parent never waits to write, and the end of the
    # input, which is also what a killed parent leaves behind, ends the worker in the middle of whatever it does.
    threading.Thread(target=pipe.lines, args=(requests,), daemon=True).start()
    try:
        set_up = json.loads(requests.get())
        functions = _set_up(set_up)
        pipe.reply({"id": set_up["id"], "ready": True})
    except RewardError as error:
        pipe.reply({"id": set_up["id"], "error": str(error)})
        return
    while True:
        try:
            request = json.loads(requests.get())
            function, loaded = functions[request["function"]]
            row = 0
            for entries in function.calls(loaded, request["prompts"], request["completions"], request["columns"]):
                pipe.reply({"id": request["id"], "row": row, "entries": entries})
                row += len(entries)
        except MemoryError:
            os._exit(OUT_OF_MEMORY)


def _set_up(request: dict[str, Any]) -> list[tuple[RewardFunction, Callable[..., Any]]]:
    """Limit the process and load its functions."""
    sys.path[:] = request["path"]
    if request["python_path"] is None:  # what a reward starts finds the environment as the user set it
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = request["python_path"]
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Private memory, not address space: libraries reserve far more of that than they ever use.
    limit = min(request["memory_mb"] * 2**20, sys.maxsize)
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    with contextlib.suppress(ValueError, OSError):  # macOS knows no such limit
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    functions = []
    for fields in request["functions"]:
        function = RewardFunction(**fields)
        loaded = function.load()
        if request["columns"] is not None:
            function.check_columns(loaded, request["columns"])
        functions.append((function, loaded))
    return functions


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
