"""What runs inside a reward worker process: it loads the functions, then answers requests until its input ends.

Started as `python -m bandit_rft.rewards.worker_main READ WRITE`, the numbers of two inherited pipes, or, where the
functions cannot be imported, as the child of a fork (`main_of_fork`). Requests and replies are lines of JSON on these.
Standard output and error are a pipe of their own, which the parent shows: nothing that is printed, by a reward or by
what starts with the interpreter, is taken for a reply, and its control codes are escaped. A reply names its request and
the row it starts at, and comes from the process that was asked: a child that a reward forks has no pipe, and ends where
it would reply. Nothing here, nor what it imports, imports torch.
"""

import contextlib
import io
import json
import os
import queue
import resource
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

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


def main_of_fork(
    read: int, write: int, output: int, inherited: Sequence[RewardFunction], not_ours: Iterable[int]
) -> NoReturn:
    """What the child of a fork does, and nothing else of what its parent would go on to do.

    Args:
        read: the pipe that requests come from.
        write: the pipe for replies.
        output: the pipe for what is printed.
        inherited: the functions.
        not_ours: the parent's ends of its pipes, which would keep this process from seeing that the parent has ended.
    """
    try:
        os.setsid()  # Ctrl-C is the trainer's to handle, and what a reward starts is killed with this process
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        for end in not_ours:
            os.close(end)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for printed in (1, 2):
            os.dup2(output, printed)
        if "torch" in sys.modules:  # its threads did not come along, and waiting for them would be for ever
            sys.modules["torch"].set_num_threads(1)
        main(read, write, inherited)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def main(read: int, write: int, inherited: Sequence[RewardFunction] = ()) -> None:
    """Serve requests: the first line holds the set-up, every other one a function's number and what it is to score."""
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    pipe = Pipe(read, write)
    printed = open(2, "wb", closefd=False)  # noqa: SIM115  (open as long as the process lives)
    sys.stdout = sys.stderr = PrintableStream(printed, "utf-8", "backslashreplace", line_buffering=True)
    # A thread of its own reads on while a reward computes, so the parent never waits to write, and the end of the
    # input, which is also what a killed parent leaves behind, ends the worker in the middle of whatever it does.
    threading.Thread(target=pipe.lines, args=(requests,), daemon=True).start()
    try:
        set_up = json.loads(requests.get())
        functions = _set_up(set_up, inherited)
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


def _set_up(
    request: dict[str, Any], inherited: Sequence[RewardFunction]
) -> list[tuple[RewardFunction, Callable[..., Any]]]:
    """Limit the process and load its functions."""
    if not inherited:
        sys.path[:] = request["path"]
        if request["python_path"] is None:  # what a reward starts finds the environment as the user set it
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = request["python_path"]
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Private memory, not address space: libraries reserve far more of that than they ever use. A fork begins with all
    # that its parent has.
    limit = min(request["memory_mb"] * 2**20 + (_private_bytes() if inherited else 0), sys.maxsize)
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    with contextlib.suppress(ValueError, OSError):  # macOS knows no such limit
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    functions = []
    for function in inherited or [RewardFunction(**fields) for fields in request["functions"]]:
        loaded = function.load()
        if request["columns"] is not None:
            function.check_columns(loaded, request["columns"])
        functions.append((function, loaded))
    return functions


def _private_bytes() -> int:
    """What counts against RLIMIT_DATA now; 0 where the system does not say."""
    try:
        with open("/proc/self/statm") as sizes:
            return int(sizes.read().split()[5]) * resource.getpagesize()
    except (OSError, ValueError, IndexError):
        return 0


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
