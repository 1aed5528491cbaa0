"""Run reward functions where they can do no harm: in worker processes with a time and a memory limit, killed at need.

A worker is a lean Python process (no fork of the trainer and its threads, no torch), started once and reused; it is
replaced after it had to be killed. Data cross its pipes as JSON: nothing is ever unpickled. Limits are kept by the
parent's clock, not by signals, so they hold from any thread.
"""

import contextlib
import json
import logging
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, Literal

from bandit_rft.rewards.spec import OUT_OF_MEMORY, Entry, RewardError, RewardFunction
from bandit_rft.text import printable

log = logging.getLogger(__name__)

# A worker's limit to import its functions: a large library's first import from a cold disk is slow.
STARTUP_S = 120.0
SLICE = 256  # completions sent to a worker at once, at most: workers then finish at about the same time
_ROOT = str(Path(__file__).parents[2])  # where this package lies


@dataclass(frozen=True)
class RewardResult:
    """The scores of N completions.

    total: [N], the weighted sum over functions. A function that returned None for a completion is left out of its sum;
      the total is None if all did so, or if one of them failed there.
    per_function: [N] a function, by name; None where it returned None or failed.
    failures: how many completions each function failed on, by name; 0 is listed too.
    """

    total: list[float | None]
    per_function: dict[str, list[float | None]]
    failures: dict[str, int]


class RewardRunner:
    """Scores completions with reward functions; a context manager.

    functions: RewardFunctions, functions, or texts that RewardFunction.parse reads.
    weights: one number a function; 1 each by default.
    timeout_s: seconds that one call of a function may take. A function that scores one completion at a time is called
      once for each, so the limit is for one completion; a function of a whole batch has it for the batch.
    memory_mb: MiB of private memory that a worker process may use.
    workers: processes. Functions that score one completion at a time are divided among them.
    on_error: what a failure leads to: a function that raised, hung, died, or returned the wrong count, NaN, infinity or
      something that is no number. "raise": RewardError. "none": None for the completions of that call, counted.
    isolation: "process", or "none" to call the functions here, without limits: for trusted and cheap functions.
    columns: names of the columns score() will get. If given, a function that needs another one is refused at the start.

    Workers start with the context, or with the first score(). Errors: ValueError or TypeError for impossible arguments;
    RewardError at the start for a function that cannot be loaded.
    """

    def __init__(
        self,
        functions: Sequence[RewardFunction | Callable[..., Any] | str],
        weights: Sequence[float] | None = None,
        *,
        timeout_s: float = 30.0,
        memory_mb: int = 2048,
        workers: int = 1,
        on_error: Literal["raise", "none"] = "raise",
        isolation: Literal["process", "none"] = "process",
        columns: Sequence[str] | None = None,
    ) -> None:
        if isinstance(functions, str) or not functions:
            raise ValueError(f"functions: expected a list of at least one reward function, got {functions!r}")
        self.functions = [RewardFunction.of(function) for function in functions]
        self.weights = [1.0] * len(self.functions) if weights is None else [float(weight) for weight in weights]
        if len(self.weights) != len(self.functions):
            raise ValueError(f"weights: expected {len(self.functions)}, one a function, got {len(self.weights)}")
        if not timeout_s > 0:
            raise ValueError(f"timeout_s: expected more than 0 seconds, got {timeout_s}")
        if memory_mb < 64:
            raise ValueError(f"memory_mb: expected at least 64, got {memory_mb}")
        if workers < 1:
            raise ValueError(f"workers: expected at least 1, got {workers}")
        if on_error not in ("raise", "none"):
            raise ValueError(f'on_error: expected "raise" or "none", got {on_error!r}')
        if isolation not in ("process", "none"):
            raise ValueError(f'isolation: expected "process" or "none", got {isolation!r}')
        self.timeout_s, self.memory_mb, self.on_error, self.isolation = timeout_s, memory_mb, on_error, isolation
        self.columns = None if columns is None else list(columns)
        self.names = _unique([function.name for function in self.functions])
        self._loaded: list[Callable[..., Any]] | None = None
        self._workers: list[_Worker] = []
        if isolation == "process":
            set_up = {
                "memory_mb": memory_mb,
                "columns": self.columns,
                "functions": [_fields(f) for f in self.functions],
            }
            label = ", ".join(function.target for function in self.functions)
            self._workers = [_Worker(set_up, label) for _ in range(workers)]
        self._killed: list[list[str]] = []  # a function: why calls were killed that a killed_score settles
        self._lock = threading.Lock()

    def __enter__(self) -> "RewardRunner":
        """Start the workers and load the functions."""
        try:
            if self.isolation == "none":
                self._load_here()
            else:
                with ThreadPoolExecutor(len(self._workers)) as pool:
                    list(pool.map(_Worker.start, self._workers))
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        """End the workers."""
        self.close()

    def close(self) -> None:
        """End the workers; score() would start them again."""
        for worker in self._workers:
            worker.kill()

    def score(
        self, prompts: Sequence[Any], completions: Sequence[Any], columns: Mapping[str, Sequence[Any]]
    ) -> RewardResult:
        """Score N completions. prompts: [N], texts or message lists; completions: [N], alike; columns: [N] each.

        Errors: ValueError for lengths that differ or a column that cannot be sent to a worker; RewardError where a
        function fails and on_error is "raise".
        """
        count = len(completions)
        for name, values in {"prompts": prompts, **columns}.items():
            if len(values) != count:
                raise ValueError(f"{name}: expected {count} entries, one a completion, got {len(values)}")
        if reserved := {"prompts", "completions", "prompt", "completion"} & set(columns):
            raise ValueError(f"columns: {sorted(reserved)} cannot be names of columns, the rewards get these apart")
        with self._lock:
            self._killed = [[] for _ in self.functions]
            entries = self._entries(prompts, completions, columns) if count else [[] for _ in self.functions]
            return self._result(entries)

    def _entries(
        self, prompts: Sequence[Any], completions: Sequence[Any], columns: Mapping[str, Sequence[Any]]
    ) -> list[list[Entry]]:
        """Return each function's entry for each completion."""
        count = len(completions)
        entries: list[list[Entry]] = [[None] * count for _ in self.functions]
        jobs = []
        for index, function in enumerate(self.functions):
            size = min(SLICE, -(-count // max(1, len(self._workers)))) if function.per_sample else count
            jobs += [(index, range(start, min(start + size, count))) for start in range(0, count, size)]

        if self.isolation == "none":
            loaded = self._load_here()
            for index, function in enumerate(self.functions):
                calls = function.calls(loaded[index], prompts, completions, columns)
                self._collect(index, range(count), calls, entries)
            return entries

        idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._workers:
            idle.put(worker)

        def work(job: tuple[int, range]) -> None:
            index, rows = job
            worker = idle.get()
            try:
                calls = self._calls_in(worker, index, rows, prompts, completions, columns)
                self._collect(index, rows, calls, entries)
            except BaseException:
                worker.kill()  # it is in the middle of a job that nobody waits for
                raise
            finally:
                idle.put(worker)

        if len(self._workers) == 1:
            for job in jobs:
                work(job)
        else:
            with ThreadPoolExecutor(len(self._workers)) as pool:
                futures = [pool.submit(work, job) for job in jobs]
                try:
                    for future in futures:
                        future.result()
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
        return entries

    def _collect(self, index: int, rows: range, calls: Iterator[list[Entry]], entries: list[list[Entry]]) -> None:
        """Store the entries of one function's calls; raise at the first failure if so configured."""
        done = 0
        for call in calls:
            for entry in call:
                if isinstance(entry, str) and self.on_error == "raise":
                    headline, newline, trace = entry.partition("\n")
                    where = f", on completion {rows[done]}" if len(call) == 1 or len(set(call)) > 1 else ""
                    raise RewardError(f"reward {self.names[index]!r} {headline}{where}{newline}{trace}")
                entries[index][rows[done]] = entry
                done += 1

    def _calls_in(
        self,
        worker: "_Worker",
        index: int,
        rows: range,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        columns: Mapping[str, Sequence[Any]],
    ) -> Iterator[list[Entry]]:
        """Yield the entries of each call, made in a worker; after a call that had to be killed the next ones go on."""
        function = self.functions[index]
        limit = function.timeout_s or self.timeout_s
        while rows:
            pick = slice(rows.start, rows.stop)
            request = {
                "function": index,
                "prompts": list(prompts[pick]),
                "completions": list(completions[pick]),
                "columns": {name: list(values[pick]) for name, values in columns.items()},
            }
            worker.start()
            deadline = time.monotonic() + limit
            try:
                worker.ask(request, deadline)
                first = rows.start
                while rows:
                    reply = worker.answer(deadline, row=rows.start - first)
                    entries: list[Entry] = reply["entries"]
                    yield entries
                    rows = rows[len(entries) :]
                    deadline = time.monotonic() + limit
            except _WorkerLost as lost:
                worker.kill()
                size = 1 if function.per_sample else len(rows)
                reason = f"{lost} (timeout_s={limit:g}, memory_mb={self.memory_mb})"
                if function.killed_score is None:
                    yield [reason] * size
                else:
                    self._killed[index] += [reason] * size
                    yield [function.killed_score] * size
                rows = rows[size:]

    def _result(self, entries: list[list[Entry]]) -> RewardResult:
        """Weigh and count."""
        count = len(entries[0])
        total: list[float | None] = [None] * count
        per_function: dict[str, list[float | None]] = {}
        failures: dict[str, int] = {}
        for name, weight, column, killed in zip(self.names, self.weights, entries, self._killed, strict=True):
            scores = per_function[name] = [None if isinstance(entry, str) else entry for entry in column]
            reasons = [entry for entry in column if isinstance(entry, str)] + killed
            failures[name] = len(reasons)
            if reasons:
                first = reasons[0].partition("\n")[0]
                log.warning("reward %r failed on %d of %d completions; the first %s", name, len(reasons), count, first)
            for row, score in enumerate(scores):
                if score is not None:
                    total[row] = (total[row] or 0.0) + weight * score
        failed = {row for column in entries for row, entry in enumerate(column) if isinstance(entry, str)}
        return RewardResult(
            [None if row in failed else value for row, value in enumerate(total)], per_function, failures
        )

    def _load_here(self) -> list[Callable[..., Any]]:
        """Import the functions into this process."""
        if self._loaded is None:
            self._loaded = [function.load() for function in self.functions]
            if self.columns is not None:
                for function, loaded in zip(self.functions, self._loaded, strict=True):
                    function.check_columns(loaded, self.columns)
        return self._loaded


class _WorkerLost(Exception):
    """A worker did not answer in time, or is gone; the text continues "reward 'name' "."""


class _Worker:
    """The parent's side of one worker process."""

    def __init__(self, set_up: dict[str, Any], label: str) -> None:
        self._set_up, self._label = set_up, label
        self._process: subprocess.Popen[bytes] | None = None
        self._pipes: tuple[FileIO, FileIO]  # our ends: to read replies from, to write requests to
        self._received = bytearray()
        self._asked = 0  # the number of the last request, never used again

    def start(self) -> None:
        """Start the process unless it runs already. Errors: RewardError with what kept a function from being loaded."""
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
        except _WorkerLost as lost:
            self.kill()
            raise RewardError(f"the worker that imports {self._label} {lost} before it had done so") from None
        if "error" in answer:
            self.kill()
            raise RewardError(answer["error"])

    def ask(self, request: dict[str, Any], deadline: float) -> None:
        """Send a request under a new number. Errors: _WorkerLost; ValueError for what JSON cannot hold."""
        self._asked += 1
        pipe = self._pipes[1].fileno()
        view = memoryview(_encode({"id": self._asked, **request}))
        while view:
            self._wait(pipe, select.POLLOUT, deadline)
            try:
                view = view[os.write(pipe, view) :]
            except BlockingIOError:
                continue
            except OSError:
                raise _WorkerLost(self._cause_of_death()) from None

    def answer(self, deadline: float, row: int = 0) -> dict[str, Any]:
        """Read the reply to the last request that starts at a row of it; no other is taken for it.

        Errors: _WorkerLost, also where something that is no such reply was written to the pipe.
        """
        line = self._line(deadline)
        try:
            reply = json.loads(line)
            if reply["id"] == self._asked and reply.get("row", 0) == row:
                return dict(reply)
        except (ValueError, TypeError, KeyError):
            pass
        found = printable(line.decode(errors="replace"), 80, one_line=True)
        raise _WorkerLost(f"wrote into its worker's pipe: {found!r} is no reply to what was asked")

    def _line(self, deadline: float) -> bytes:
        pipe = self._pipes[0].fileno()
        while (end := self._received.find(b"\n")) < 0:
            self._wait(pipe, select.POLLIN, deadline)
            data = os.read(pipe, 1 << 16)
            if not data:
                raise _WorkerLost(self._cause_of_death())
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
        """Wait until a pipe is ready. Errors: _WorkerLost at the deadline."""
        poll = select.poll()
        poll.register(pipe, event)
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise _WorkerLost("hung and was killed")

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


def _fields(function: RewardFunction) -> dict[str, Any]:
    """Return what a worker needs to know of a function. Errors: TypeError for one that cannot be imported by name."""
    if function.function is not None:
        raise TypeError(
            f"reward {function.name!r} is a lambda, a closure, an object or built interactively, which a worker "
            'process cannot import: define it with def at the top level of a file, or set isolation="none"'
        )
    keep = ("target", "kind", "options", "name")
    return {name: getattr(function, name) for name in keep}


def _encode(message: Any) -> bytes:
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


def _unique(names: list[str]) -> list[str]:
    """Number repeated names: reward, reward_2."""
    return [name if name not in names[:i] else f"{name}_{names[: i + 1].count(name)}" for i, name in enumerate(names)]
