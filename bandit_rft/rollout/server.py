"""Rollouts from servers: the embedded engine's interface, with the drawing done by vLLM in processes of its own.

    generate   prompts over the servers by a hash of the prompt; a draw's seed comes from (seed, sequence id): a retry
               draws the same; every answer says which weights drew it, and any but the pushed ones are drawn again
    push       weights to every server, then a few completions of fixed prompts, which the trainer scores for itself
    failures   no connection, no answer in time, 5xx: again and again with longer pauses, for `retry_seconds`; garbage:
               a few times. A server that has lost its weights (it was restarted) gets them again. Then RolloutError

Late rollouts are waited for and none is dropped: dropping them would leave the short and easy ones.
"""

from __future__ import annotations

import logging
import random
import threading
import time
import uuid
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait

import torch
from torch import Tensor

from bandit_rft.model import Policy
from bandit_rft.rollout.client import (
    Answer,
    FailedError,
    GarbledError,
    RefusedError,
    Request,
    RolloutClient,
    ServerError,
)
from bandit_rft.rollout.engine import Sampling, Watch, sequence_ids
from bandit_rft.rollout.process import ServerProcess
from bandit_rft.rollout.push import WeightPush
from bandit_rft.rollout_batch import RolloutBatch

logger = logging.getLogger(__name__)

#: Answers that are none, or were drawn by other weights, before a request is given up.
GARBLED_LIMIT, STALE_LIMIT = 5, 5
HINT = "(docs/scaling.md says how a server has to be started)"
#: The random stream of the canaries' completions.
CANARY_STREAM = 2
CANARY_TOKENS = 16


class RolloutError(OSError):
    """Rollouts cannot be had. Nothing was learned from what was drawn of them; the run can be continued."""


class ServerEngine:
    """Draws completions from servers that are kept at the trainer's weights.

    Args:
        policy: whose weights are pushed, and whose stop tokens end a completion.
        clients: one a server.
        push: how weights get there.
        max_completion_length: tokens after which a completion is cut off.
        concurrency: requests under way at a time.
        retry_seconds: how long a server may fail before the run stops.
        temperature: at which the canaries are drawn.
        process: the server that belongs to this run, started again when it dies; None: they are somebody else's.
    """

    #: As RolloutEngine has it: prompts and completions of any length that the servers take.
    max_length: int | None = None

    def __init__(
        self, policy: Policy, clients: Sequence[RolloutClient], push: WeightPush, *, max_completion_length: int,
        concurrency: int = 64, retry_seconds: float = 600.0, temperature: float = 1.0,
        process: ServerProcess | None = None,
    ):  # fmt: skip
        self.policy, self.max_completion_length, self.temperature = policy, max_completion_length, temperature
        self.version: int | None = None
        self._clients, self._push, self._process = list(clients), push, process
        self._concurrency, self._retry_seconds = concurrency, retry_seconds
        self._run = uuid.uuid4().hex[:8]  # two runs must not take each other's weights for their own
        self._locks = [threading.Lock() for _ in clients]
        self._sent = [0 for _ in clients]  # how often weights were sent to each
        self._using = threading.Lock()  # a push waits for what is being drawn
        self._stopping = threading.Event()
        self._counts, self._count_lock = Counter[str](), threading.Lock()
        self._push_seconds = 0.0

    @property
    def _label(self) -> str:
        return f"{self._run}-{self.version}"

    # --- drawing ------------------------------------------------------------------------------------------------------

    def generate(
        self, prompts: Sequence[Sequence[int]], ids: Tensor, *, seed: int, sampling: Sampling | None = None, n: int = 1,
        watch: Watch | None = None,
    ) -> RolloutBatch:  # fmt: skip
        """Draw n completions of each of P prompts, B = P * n in prompt-major order.

        Args:
            prompts: P lists of token ids, none of them empty.
            ids: [B] int64, the random stream of each completion (see `sequence_ids`).
            seed: of all streams.
            sampling: its temperature, or `Sampling.greedy()`; nothing else, since a server's log-probabilities would be
                those of the tokens that are left.
            n: completions a prompt.
            watch: must be None: a server draws whole completions.

        Returns:
            The rollouts in host memory, with `query` the prompt's position in `prompts`. A server tells no entropy:
            `entropy` is its one-sample estimate, -logprob.

        Raises:
            RolloutError: a server did not answer rightly for too long.
        """
        total, sampling = len(prompts) * n, sampling or Sampling()
        if watch is not None:
            raise ValueError("watch must be None: a server draws whole completions")
        if ids.shape != (total,) or ids.dtype != torch.int64:
            raise ValueError(f"ids must be int64 [{total}], one a completion; got {ids.dtype} {list(ids.shape)}")
        if empty := [i for i, prompt in enumerate(prompts) if not prompt]:
            raise ValueError(f"prompt {empty[0]} has no tokens; every prompt needs at least one")
        if sampling.top_k > 1 or sampling.top_p < 1 or sampling.min_p > 0:
            raise ValueError("rollout.engine=vllm draws from the full softmax: top_k, top_p and min_p must be left out")
        if self.version is None:
            raise RuntimeError("push a version before the first completion is drawn")
        streams = (sequence_ids(seed, ids.numpy()) & (2**63 - 1)).tolist()
        requests = [
            (self._server_of(prompts[i // n]), self._request(prompts[i // n], streams[i], sampling))
            for i in range(total)
        ]
        with self._using:
            answers = self._draw_all(requests)
        of_rows = [prompts[i // n] for i in range(total)]
        logprobs = torch.tensor([x for answer in answers for x in answer.logprobs], dtype=torch.float32)
        return RolloutBatch.of(
            of_rows, torch.tensor([t for answer in answers for t in answer.tokens], dtype=torch.int64),
            [len(answer.tokens) for answer in answers], logprobs, -logprobs, [answer.truncated for answer in answers],
            query=[i // n for i in range(total)], attempt=[i % n for i in range(total)], weight_version=self.version,
        )  # fmt: skip

    def begin(
        self, prompts: Sequence[Sequence[int]], ids: Tensor, *, seed: int, sampling: Sampling | None = None, n: int = 1
    ) -> Callable[[], RolloutBatch]:
        """Start to draw, in a thread. What this returns waits for what `generate` would return or raise."""
        drawn = Future[RolloutBatch]()

        def work() -> None:
            try:
                drawn.set_result(self.generate(prompts, ids, seed=seed, sampling=sampling, n=n))
            except BaseException as error:
                drawn.set_exception(error)

        threading.Thread(target=work, name="rollout-ahead", daemon=True).start()
        return drawn.result

    def _request(self, prompt: Sequence[int], seed: int, sampling: Sampling) -> Request:
        temperature = 0.0 if sampling.top_k == 1 else sampling.temperature
        policy = self.policy
        return Request(
            prompt, seed, temperature, self.max_completion_length, policy.stop_tokens, policy.padding_token_ids,
            policy.vocab_size, self._push.adapter(self._label),
        )  # fmt: skip

    def _server_of(self, prompt: Sequence[int]) -> int:
        """The same server for the same prompt, so that it has its prefix; spread evenly over all."""
        return zlib.crc32(b"".join(token.to_bytes(4, "little") for token in prompt)) % len(self._clients)

    def _draw_all(self, requests: Sequence[tuple[int, Request]]) -> list[Answer]:
        """The answers in the order of the requests; the first that fails for good ends the others."""
        stopping = self._stopping = threading.Event()
        pool = ThreadPoolExecutor(max(1, min(self._concurrency, len(requests))), thread_name_prefix="rollout")
        try:
            futures = [pool.submit(self._draw, server, request, stopping) for server, request in requests]
            done, waiting = wait(futures, return_when=FIRST_EXCEPTION)
            if waiting or any(future.exception() for future in done):
                stopping.set()
                raise next(error for future in futures if future.done() and (error := future.exception()))
            return [future.result() for future in futures]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _draw(self, server: int, request: Request, stopping: threading.Event) -> Answer:
        """One completion by the weights that were pushed last, whatever happens to the server meanwhile."""
        failures = _Failures(self._clients[server].url, self._retry_seconds, stopping)
        while True:
            sent = self._sent[server]
            try:
                answer = self._clients[server].generate(request)
                if answer.versions == [self._label]:
                    return answer
                self._count("redrawn_stale")
                failures.stale(answer.versions, self._label)
                self._send_again(server, sent)
            except GarbledError as error:
                self._count("garbled")
                failures.garbled(error)
            except ServerError as error:
                self._count("retries")
                self._revive(server)
                failures.again(error)
            except RefusedError as error:
                if request.adapter is None or " 404 " not in str(error):
                    raise RolloutError(f"a request was refused: {error} {HINT}") from error
                self._count("redrawn_stale")  # a restarted server knows no adapter
                failures.stale([], self._label)
                self._send_again(server, sent)

    # --- weights ------------------------------------------------------------------------------------------------------

    def push(self, version: int, canary_prompts: Sequence[Sequence[int]] = ()) -> RolloutBatch | None:
        """Bring the policy's weights as they are now to every server, as this version.

        Args:
            version: of the weights, in rounds.
            canary_prompts: token ids each.

        Returns:
            A completion of every canary prompt from every server, to be compared with what the trainer says of it; its
            attempt is the server's number. None without such prompts.

        Raises:
            RolloutError: a server did not take them.
        """
        start = time.monotonic()
        with self._using:
            self._push.prepare(version)
            self.version = version
            if self._process is not None and not self._process.started:
                self._process.start(self._push.folder())
            for server, client in enumerate(self._clients):
                failures = _Failures(client.url, self._retry_seconds, threading.Event())
                while True:
                    try:
                        client.wait_ready(5.0)
                        self._send(server)
                        break
                    except GarbledError as error:
                        failures.garbled(error)
                    except ServerError as error:
                        if isinstance(error, FailedError) and failures.said is None:
                            logger.warning("the weights of round %s were not taken, now again: %s", version, error)
                        self._revive(server)
                        failures.again(error)
                    except RefusedError as error:
                        raise RolloutError(f"the weights of round {version} were refused: {error} {HINT}") from error
            canaries = self._canaries(canary_prompts) if canary_prompts else None
            if self._process is not None:
                self._process.proved()
        self._push_seconds += time.monotonic() - start
        return canaries

    def _canaries(self, prompts: Sequence[Sequence[int]]) -> RolloutBatch:
        assert self.version is not None
        servers = range(len(self._clients))
        streams = (sequence_ids(CANARY_STREAM, list(range(len(prompts)))) & (2**63 - 1)).tolist()
        sampling = Sampling(temperature=self.temperature)
        requests = [
            (server, self._request(prompt, stream, sampling)._replace(
                max_tokens=min(CANARY_TOKENS, self.max_completion_length)))
            for server in servers for prompt, stream in zip(prompts, streams, strict=True)
        ]  # fmt: skip
        answers = self._draw_all(requests)
        logprobs = torch.tensor([x for answer in answers for x in answer.logprobs], dtype=torch.float32)
        return RolloutBatch.of(
            [request.prompt for _, request in requests],
            torch.tensor([t for answer in answers for t in answer.tokens], dtype=torch.int64),
            [len(answer.tokens) for answer in answers], logprobs, -logprobs, [a.truncated for a in answers],
            query=[i % len(prompts) for i in range(len(requests))],
            attempt=[server for server, _ in requests], weight_version=self.version,
        )  # fmt: skip

    def _send(self, server: int) -> None:
        with self._locks[server]:
            self._push.send(self._clients[server], self._label)
            self._sent[server] += 1

    def _send_again(self, server: int, sent: int) -> None:
        """Give a server that has other weights the pushed ones; one of the threads that noticed does it.

        Args:
            server: its number.
            sent: how often weights had been sent to it when the request began that was answered by others. While
                they are sent, answers are by others: were they sent again for each of those, it would never end.
        """
        client = self._clients[server]
        with self._locks[server]:
            if self._sent[server] != sent:
                return
            if self._push.adapter(self._label) is None and client.version() == self._label:
                return
            if not self._push.repeatable:
                raise RolloutError(
                    f"{client.url} has lost the weights of round {self.version}, and rollout.push=nccl sends those "
                    "that the trainer has by now: continue the run from its checkpoint"
                )
            logger.warning("%s has other weights than those of round %s: they are sent again", client.url, self.version)
            self._push.send(client, self._label)
            self._sent[server] += 1

    def _revive(self, server: int) -> None:
        if self._process is not None:
            with self._locks[server]:
                if not self._process.running and self._process.started:
                    logger.warning("the rollout server has died (%s): it is started again", self._process.ended)
                    try:
                        self._process.start(self._push.folder())
                    except OSError as error:
                        raise RolloutError(str(error)) from error

    # --- the end ------------------------------------------------------------------------------------------------------

    def metrics(self) -> dict[str, float | int | None]:
        """What happened since the last call: pushes' seconds, retries, answers that were drawn again."""
        with self._count_lock:
            counts, self._counts = self._counts, Counter()
        seconds, self._push_seconds = self._push_seconds, 0.0
        names = ("retries", "garbled", "redrawn_stale")
        return {"seconds/push": seconds, **{f"rollout/{name}": counts[name] for name in names}}

    def close(self) -> None:
        """Break off what is being drawn, and end the server that belongs to this run."""
        self._stopping.set()
        for client in self._clients:
            client.close()
        if self._process is not None:
            self._process.stop()

    def _count(self, what: str) -> None:
        with self._count_lock:
            self._counts[what] += 1


class _Failures:
    """What went wrong with one request, and how long to wait before the next try."""

    def __init__(self, url: str, seconds: float, stopping: threading.Event):
        self._url, self._seconds, self._stopping = url, seconds, stopping
        self._first: float | None = None
        self._delay, self._garbled, self._stale = 0.1, 0, 0
        self.said: str | None = None  # by the server itself, of its latest failure

    def again(self, error: Exception) -> None:
        """Wait, longer each time; RolloutError when it has taken too long."""
        now = time.monotonic()
        self._first = now if self._first is None else self._first
        if isinstance(error, FailedError | GarbledError):
            self.said = str(error)
        if now - self._first + self._delay > self._seconds:
            # A server that said what was wrong and then died is not only one that does not answer.
            before = f"; before that: {self.said}" if self.said not in (None, str(error)) else ""
            waited = f"gave up after {now - self._first:.0f} s (rollout.retry_s={self._seconds:g})"
            raise RolloutError(f"{waited}: {error}{before}")
        # Threads that failed together should not come back together.
        if self._stopping.wait(self._delay * random.uniform(0.5, 1.0)):
            raise RolloutError(f"{self._url}: another request failed")
        self._delay = min(2 * self._delay, 30.0)

    def garbled(self, error: Exception) -> None:
        """As `again`, a few times."""
        self._garbled += 1
        if self._garbled > GARBLED_LIMIT:
            raise RolloutError(f"gave up after {self._garbled} answers that are none: {error}")
        self.again(error)

    def stale(self, versions: Sequence[str], label: str) -> None:
        """As `garbled`, for answers of other weights."""
        self._stale += 1
        if self._stale > STALE_LIMIT:
            told = " and ".join(versions) or "unknown"
            raise RolloutError(f"{self._url} goes on drawing with weights {told}; {label} were pushed")
        if self._stopping.is_set():
            raise RolloutError(f"{self._url}: another request failed")
