"""What a rollout server must be able to do, in ten calls, and vLLM's way of doing it over HTTP.

Nothing here trusts the other side: every call has a time limit from its first byte to its last, an answer has a largest
size, and what is in it is looked at entry by entry before it becomes a rollout. Nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import ssl
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeGuard
from urllib.parse import urlencode, urlsplit

#: Bytes of an answer that are read at most; 100,000 tokens with their log-probabilities are about 10 MiB.
LARGEST_ANSWER = 64 * 2**20


class ServerError(RuntimeError):
    """A call that failed in a way that may pass: no connection, no answer in time, out of memory, restarted."""


class FailedError(ServerError):
    """The server answered that it failed (5xx), or to come again later."""


class GarbledError(ServerError):
    """An answer that is none: not JSON, of wrong types, tokens that do not exist, numbers that are not finite."""


class RefusedError(RuntimeError):
    """The server understood and said no; it would say so again."""


class Request(NamedTuple):
    """One completion to draw."""

    prompt: Sequence[int]
    seed: int  # of this completion alone, in [0, 2^63)
    temperature: float  # 0: the most likely token each time
    max_tokens: int
    stop_tokens: Sequence[int]
    excluded: Sequence[int]  # tokens that must not be drawn
    vocabulary: int
    adapter: str | None  # the name it was loaded under; None: the model itself


class Answer(NamedTuple):
    """One completion, checked."""

    tokens: list[int]
    logprobs: list[float]  # at the sampling temperature
    truncated: bool  # ended by max_tokens
    versions: list[str]  # of the weights that drew it, in order


class RolloutClient(Protocol):
    """One server. Every call raises ServerError where trying again may help, and RefusedError where it would not."""

    url: str

    def wait_ready(self, seconds: float) -> None:
        """Return when the server takes requests."""

    def generate(self, request: Request) -> Answer:
        """Draw one completion; called from many threads."""

    def pause(self) -> None:
        """Let what is being drawn come to its end, and begin nothing new."""

    def resume(self) -> None:
        """Go on drawing."""

    def load_weights(self, folder: Path) -> None:
        """Take the weights of a Hugging Face folder, and forget what was computed with the old ones."""

    def load_adapter(self, name: str, folder: Path) -> None:
        """Take a LoRA adapter under a name that was never used before."""

    def unload_adapter(self, name: str) -> None:
        """Let go of an adapter; one that is not there is no error."""

    def set_version(self, label: str) -> None:
        """Name the weights that it has now; its answers say the name."""

    def version(self) -> str:
        """The name given last."""

    def workers(self) -> int:
        """How many processes hold the model."""

    def close(self) -> None:
        """Break off every call that is under way, from any thread."""


class VllmClient:
    """A vLLM server (`--enable-scale-out`, `--logprobs-mode processed_logprobs`, VLLM_SERVER_DEV_MODE=1).

    Args:
        url: such as http://127.0.0.1:8000; a path in it is put before every route.
        timeout: seconds for one call, from the connection to the last byte of its answer.
    """

    def __init__(self, url: str, timeout: float):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"a server's address must be http://host:port or https://host:port; got {url!r}")
        self.url, self.timeout = url.rstrip("/"), timeout
        self._parts, self._live, self._lock = parts, set[http.client.HTTPConnection](), threading.Lock()
        self._closed = False

    # --- the interface ------------------------------------------------------------------------------------------------

    def wait_ready(self, seconds: float) -> None:
        """Ask for /health until it answers."""
        deadline, pause = time.monotonic() + seconds, 0.1
        while True:
            try:
                self._call("GET", "/health", timeout=min(5.0, self.timeout))
                return
            except ServerError as error:
                if time.monotonic() + pause > deadline or self._closed:
                    raise ServerError(f"{self.url} was not ready within {seconds:g} s: {error}") from error
            time.sleep(pause)
            pause = min(2 * pause, 2.0)

    def generate(self, request: Request) -> Answer:
        """POST /inference/v1/generate: tokens in, tokens out."""
        r = request
        sampling: dict[str, Any] = {
            "temperature": r.temperature, "seed": r.seed, "max_tokens": r.max_tokens, "min_tokens": 0, "n": 1,
            "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "logprobs": 0, "detokenize": False,
            # The policy's own stop tokens, whatever the server's generation config says.
            "ignore_eos": True, "stop_token_ids": list(r.stop_tokens),
        }  # fmt: skip
        if r.excluded:
            sampling["logit_bias"] = {str(token): -100.0 for token in r.excluded}
        body: dict[str, Any] = {"token_ids": list(r.prompt), "sampling_params": sampling}
        if r.adapter is not None:
            body["model"] = r.adapter
        return read_answer(self._call("POST", "/inference/v1/generate", body), request)

    def pause(self) -> None:
        """POST /pause?mode=wait."""
        self._call("POST", "/pause", query={"mode": "wait"})

    def resume(self) -> None:
        """POST /resume."""
        self._call("POST", "/resume")

    def load_weights(self, folder: Path) -> None:
        """`reload_weights` on every worker, then the prefix cache, which the reload leaves as it is."""
        self._call(
            "POST", "/collective_rpc",
            {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}, "timeout": self.timeout},
        )  # fmt: skip
        answer = self._call("POST", "/reset_prefix_cache")
        if isinstance(answer, Mapping) and answer.get("success") is False:
            raise ServerError(f"{self.url} could not forget the prefixes of the old weights")

    def load_adapter(self, name: str, folder: Path) -> None:
        """POST /v1/load_lora_adapter (VLLM_ALLOW_RUNTIME_LORA_UPDATING=True)."""
        self._call("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)}, plain=True)

    def unload_adapter(self, name: str) -> None:
        """POST /v1/unload_lora_adapter."""
        try:
            self._call("POST", "/v1/unload_lora_adapter", {"lora_name": name}, plain=True)
        except RefusedError as error:
            if " 404 " not in f" {error} ":
                raise

    def set_version(self, label: str) -> None:
        """POST /update_weight_version."""
        self._call("POST", "/update_weight_version", {"new_version": label})

    def version(self) -> str:
        """GET /weight_info."""
        answer = self._call("GET", "/weight_info")
        version = answer.get("weight_version") if isinstance(answer, Mapping) else None
        if not isinstance(version, str):
            raise GarbledError(f"{self.url}/weight_info names no weight_version: {_short(answer)}")
        return version

    def workers(self) -> int:
        """GET /get_world_size."""
        answer = self._call("GET", "/get_world_size")
        count = answer.get("world_size") if isinstance(answer, Mapping) else None
        if not _whole(count) or count < 1:
            raise GarbledError(f"{self.url}/get_world_size: {_short(answer)}")
        return count

    def close(self) -> None:
        """Close the connections: a call that waits on one ends at once."""
        self._closed = True
        with self._lock:
            for connection in self._live:
                if connection.sock is not None:
                    with contextlib.suppress(OSError):
                        connection.sock.shutdown(socket.SHUT_RDWR)

    # --- one call -----------------------------------------------------------------------------------------------------

    def _call(
        self, method: str, route: str, body: Any = None, *, query: Mapping[str, str] | None = None,
        timeout: float | None = None, plain: bool = False,
    ) -> Any:  # fmt: skip
        """What the server answers, from JSON; None where it answers nothing, or (plain) in words."""
        seconds = self.timeout if timeout is None else timeout
        deadline = time.monotonic() + seconds
        target = self._parts.path.rstrip("/") + route + (f"?{urlencode(query)}" if query else "")
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} if data is not None else {}
        connection = self._connection(seconds)
        try:
            connection.request(method, target, data, headers)
            response = connection.getresponse()
            text = self._read(connection, response, deadline)
        except (OSError, http.client.HTTPException) as error:  # timeouts among them
            what = str(error) or type(error).__name__
            raise ServerError(f"{self.url}{route}: {what}") from error
        finally:
            with self._lock:
                self._live.discard(connection)
            connection.close()
        if response.status >= 400:
            # 408, 425, 429: later, perhaps. 404: a route or an adapter that is not there.
            kind = FailedError if response.status >= 500 or response.status in (408, 425, 429) else RefusedError
            raise kind(f"{self.url}{route} answered {response.status} {response.reason}: {_short(text)}")
        if response.status >= 300:
            raise RefusedError(f"{self.url}{route} answered {response.status} {response.reason}: not followed")
        if plain:
            return None
        try:
            return json.loads(text) if text.strip() else None
        except (ValueError, RecursionError) as error:
            raise GarbledError(f"{self.url}{route} answered what is no JSON: {_short(text)}") from error

    def _connection(self, seconds: float) -> http.client.HTTPConnection:
        host, port = self._parts.hostname or "", self._parts.port
        connection: http.client.HTTPConnection
        if self._parts.scheme == "https":
            context = ssl.create_default_context()
            connection = http.client.HTTPSConnection(host, port, timeout=seconds, context=context)
        else:
            connection = http.client.HTTPConnection(host, port, timeout=seconds)
        with self._lock:
            if self._closed:
                raise ServerError(f"{self.url}: this client was closed")
            self._live.add(connection)
        return connection

    def _read(
        self, connection: http.client.HTTPConnection, response: http.client.HTTPResponse, deadline: float
    ) -> bytes:
        """The whole body, within the deadline however slowly it drips."""
        parts, size = list[bytes](), 0
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"no whole answer within {self.timeout:g} s")
            if connection.sock is not None:
                connection.sock.settimeout(left)
            part = response.read1(1 << 16)
            if not part:
                break
            parts.append(part)
            size += len(part)
            if size > LARGEST_ANSWER:
                raise http.client.HTTPException(f"an answer of more than {LARGEST_ANSWER} bytes")
        if response.length:  # read1 does not say that a body ended early
            raise http.client.IncompleteRead(b"", response.length)
        return b"".join(parts)


def read_answer(answer: Any, request: Request) -> Answer:
    """The completion in an answer of /inference/v1/generate.

    Raises:
        GarbledError: it is no completion of the request: this says what is wrong.
    """

    def need(condition: bool, what: str) -> None:
        if not condition:
            raise GarbledError(f"/inference/v1/generate: {what}")

    choices = answer.get("choices") if isinstance(answer, Mapping) else None
    need(isinstance(choices, list) and len(choices) == 1, f"one choice was asked for; got {_short(answer)}")
    assert isinstance(choices, list)
    choice = choices[0]
    need(isinstance(choice, Mapping), f"a choice must be an object; got {_short(choice)}")
    tokens, logprobs, spans = (choice.get(key) for key in ("token_ids", "logprobs", "weight_versions"))
    need(
        isinstance(tokens, list) and all(_whole(t) for t in tokens), f"token_ids must be numbers; got {_short(tokens)}"
    )
    n = len(tokens)
    need(0 < n <= request.max_tokens, f"1 to {request.max_tokens} tokens were asked for; got {n}")
    excluded = set(request.excluded)
    outside = [t for t in tokens if not 0 <= t < request.vocabulary or t in excluded]
    need(not outside, f"token {outside[:1]} is none of the vocabulary of {request.vocabulary}")
    content = logprobs.get("content") if isinstance(logprobs, Mapping) else None
    need(isinstance(content, list) and len(content) == n, f"{n} log-probabilities must come along; {_short(logprobs)}")
    assert isinstance(content, list)
    values = list[float]()
    for token, entry in zip(tokens, content, strict=True):
        value: Any = entry.get("logprob") if isinstance(entry, Mapping) else None
        number = isinstance(value, int | float) and not isinstance(value, bool)
        # What is a little above 0 was rounded; -9999 is what vLLM writes for -inf. NaN is in no range.
        if not number or not -9000 < value <= 1e-3:
            raise GarbledError(f"/inference/v1/generate: a log-probability is {_short(value)}")
        need(
            entry.get("token_id", token) == token, f"the log-probability of token {entry.get('token_id')}, not {token}"
        )
        values.append(min(float(value), 0.0))
    need(isinstance(spans, list) and bool(spans), f"no weight_versions say what drew it: {_short(spans)}")
    end, versions = 0, list[str]()
    for span in spans:
        fits = isinstance(span, Mapping) and isinstance(span.get("version"), str)
        need(fits and _whole(span.get("start")) and _whole(span.get("end")), f"a span of versions is {_short(span)}")
        need(span["start"] == end and span["end"] > end, f"the spans of versions have a gap: {_short(spans)}")
        end = span["end"]
        versions.append(span["version"])
    need(end == n, f"the spans of versions end at {end}, the tokens at {n}")
    stops = set(request.stop_tokens)
    early = [i for i, t in enumerate(tokens[:-1]) if t in stops]
    need(not early, "tokens go on behind a stop token")
    stopped = tokens[-1] in stops
    need(
        stopped or n == request.max_tokens,
        f"it ended after {n} tokens, neither by a stop token nor by the limit: {len(request.prompt)} of the prompt and "
        f"{request.max_tokens} of a completion must fit into the server's --max-model-len",
    )
    return Answer(tokens, values, not stopped, versions)


def _whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _short(value: Any) -> str:
    text = value.decode(errors="replace") if isinstance(value, bytes) else repr(value)
    shown = "".join(c if c.isprintable() else " " for c in text[:200])
    return shown + (" ..." if len(text) > 200 else "")
