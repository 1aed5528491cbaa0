"""Run reward functions where they can do no harm: in worker processes with a time and a memory limit, killed at need.

A worker is a lean Python process (no fork of the trainer and its threads, no torch), started once and reused; it is
replaced after it had to be killed. Only where a function cannot be imported, as one of a notebook's cell, it is a fork.
Limits are kept by the parent's clock, not by signals, so they hold from any thread.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

from bandit_rft.rewards.spec import Entry, RewardError, RewardFunction
from bandit_rft.rewards.worker import Worker, WorkerLost

log = logging.getLogger(__name__)

SLICE = 256  # completions sent to a worker at once, at most: workers then finish at about the same time


@dataclass(frozen=True)
class RewardResult:
    """The scores of N completions.

    Attributes:
        total: [N], the weighted sum over functions. A function that returned None for a completion is left out of its
            sum; the total is None if all did so, or if one of them failed there.
        per_function: [N] a function, by name; None where it returned None or failed.
        failures: how many completions each function failed on, by name; 0 is listed too.
    """

    total: list[float | None]
    per_function: dict[str, list[float | None]]
    failures: dict[str, int]

    @staticmethod
    def join(parts: Sequence["RewardResult"]) -> "RewardResult":
        """The scores of several batches by the same functions, one after another; at least one."""
        return RewardResult(
            [x for part in parts for x in part.total],
            {name: [x for part in parts for x in part.per_function[name]] for name in parts[0].per_function},
            {name: sum(part.failures[name] for part in parts) for name in parts[0].failures},
        )


class RewardRunner:
    """Scores completions with reward functions; a context manager.

    Workers start with the context, or with the first score().

    Args:
        functions: RewardFunctions, functions, or texts that RewardFunction.parse reads.
        weights: one number a function; 1 each by default.
        timeout_s: seconds that one call of a function may take. A function that scores one completion at a time is
            called once for each, so the limit is for one completion; a function of a whole batch has it for the batch.
        memory_mb: MiB of private memory that a worker process may use.
        workers: processes. Functions that score one completion at a time are divided among them.
        on_error: what a failure leads to: a function that raised, hung, died, or returned the wrong count, NaN,
            infinity or something that is no number. "raise": RewardError. "none": None for the completions of that
            call, counted.
        isolation: "process": fresh processes, which import the functions. "fork": copies of this process, for functions
            that cannot be imported; the limits hold there too. "none": the functions are called here, without limits:
            for trusted and cheap functions.
        columns: names of the columns score() will get. If given, a function that needs another one is refused at the
            start.

    Raises:
        ValueError, TypeError: for impossible arguments.
        RewardError: at the start, for a function that cannot be loaded.
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
        isolation: Literal["process", "fork", "none"] = "process",
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
        if isolation not in ("process", "fork", "none"):
            raise ValueError(f'isolation: expected "process", "fork" or "none", got {isolation!r}')
        self.timeout_s, self.memory_mb, self.on_error, self.isolation = timeout_s, memory_mb, on_error, isolation
        self.columns = None if columns is None else list(columns)
        self.names = _unique([function.name for function in self.functions])
        self._loaded: list[Callable[..., Any]] | None = None
        self._workers: list[Worker] = []
        if isolation != "none":
            forked = self.functions if isolation == "fork" else []
            set_up = {
                "memory_mb": memory_mb,
                "columns": self.columns,
                "functions": [] if forked else [_fields(f) for f in self.functions],
            }
            label = ", ".join(function.target for function in self.functions)
            self._workers = [Worker(set_up, label, forked) for _ in range(workers)]
        self._killed: list[list[str]] = []  # a function: why calls were killed that a killed_score settles
        self._lock = threading.Lock()

    def __enter__(self) -> "RewardRunner":
        """Start the workers and load the functions."""
        try:
            if self.isolation == "none":
                self._load_here()
            else:
                with ThreadPoolExecutor(len(self._workers)) as pool:
                    list(pool.map(Worker.start, self._workers))
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
        """Score N completions.

        Args:
            prompts: [N], texts or message lists.
            completions: [N], alike.
            columns: [N] each.

        Returns:
            The scores of each completion, weighted and by function.

        Raises:
            ValueError: for lengths that differ, or a column that cannot be sent to a worker.
            RewardError: where a function fails and on_error is "raise".
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

        idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
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
        worker: Worker,
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
            except WorkerLost as lost:
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


def _fields(function: RewardFunction) -> dict[str, Any]:
    """Return what a worker needs to know of a function.

    Raises:
        TypeError: it cannot be imported by name.
    """
    if function.function is not None:
        raise TypeError(
            f"reward {function.name!r} is a lambda, a closure, an object or built interactively, which a worker "
            'process cannot import: define it with def at the top level of a file, or set isolation="fork" (a copy of '
            'this process, with the same limits) or isolation="none"'
        )
    keep = ("target", "kind", "options", "name")
    return {name: getattr(function, name) for name in keep}


def _unique(names: list[str]) -> list[str]:
    """Number repeated names: reward, reward_2."""
    return [name if name not in names[:i] else f"{name}_{names[: i + 1].count(name)}" for i, name in enumerate(names)]
