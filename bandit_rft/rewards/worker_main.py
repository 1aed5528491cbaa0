"""What runs inside a reward worker process: it loads the functions, then answers requests until its input ends.

Requests and replies are lines of JSON on the pipes that were standard input and output when the process started.
Whatever a reward function prints goes to standard error. Nothing here, nor what it imports, imports torch.
"""

import contextlib
import json
import os
import queue
import resource
import threading
from collections.abc import Callable
from typing import Any

from bandit_rft.rewards.spec import RewardError, RewardFunction

OUT_OF_MEMORY = 77  # the exit status that tells the parent so


def main() -> None:
    """Serve requests: the first line holds the set-up, every other one a function's number and what it is to score."""
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    pipe_in, pipe_out = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    # A thread of its own reads on while a reward computes, so the parent never waits to write, and the end of the
    # input, which is also what a killed parent leaves behind, ends the worker in the middle of whatever it does.
    threading.Thread(target=_read, args=(pipe_in, requests), daemon=True).start()
    with open(pipe_out, "wb") as out:
        try:
            functions = _set_up(json.loads(requests.get()))
            _reply(out, "ready")
        except RewardError as error:
            _reply(out, {"error": str(error)})
            return
        while True:
            try:
                request = json.loads(requests.get())
                function, loaded = functions[request["function"]]
                for entries in function.calls(loaded, request["prompts"], request["completions"], request["columns"]):
                    _reply(out, entries)
            except MemoryError:
                os._exit(OUT_OF_MEMORY)


def _set_up(request: dict[str, Any]) -> list[tuple[RewardFunction, Callable[..., Any]]]:
    """Limit the process and load its functions."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Private memory, not address space: libraries reserve far more of that than they ever use.
    limit = request["memory_mb"] * 2**20
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


def _read(pipe: int, requests: "queue.SimpleQueue[bytes]") -> None:
    """Pass on line by line what comes in; end the process when nothing more can come."""
    with open(pipe, "rb") as lines:
        for line in lines:
            requests.put(line)
    os._exit(0)


def _reply(out: Any, message: Any) -> None:
    out.write(json.dumps(message).encode() + b"\n")
    out.flush()


if __name__ == "__main__":
    main()
