"""A rollout server that belongs to a run: started with it, started again when it dies, ended whenever the run ends."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from bandit_rft.launched import not_launched
from bandit_rft.rollout import keeper

logger = logging.getLogger(__name__)

#: How often a server is started without ever having worked.
STARTS = 5


class ServerProcess:
    """One server on this machine, on a free port of its own.

    Args:
        command: what starts it, with {model} for the folder of the weights and {port}.
        environment: what it gets besides this process's variables; of those, none that say which rank it is.
        log: where its output goes.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path):
        self._command, self._environment, self._log = list(command), dict(environment), log
        self._process: subprocess.Popen[bytes] | None = None
        self._starts = 0
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def started(self) -> bool:
        """Whether it was ever started."""
        return self._process is not None

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self._process is not None and self._process.poll() is None

    @property
    def ended(self) -> str:
        """How it ended, for a message."""
        code = self._process.returncode if self._process is not None else None
        return f"exit status {code}; {self._log} has its output"

    def start(self, model: Path | None) -> None:
        """Start it with the weights in a folder.

        Raises:
            OSError: it cannot be started, or was started too often.
        """
        self._starts += 1
        if self._starts > STARTS:
            raise OSError(f"the rollout server died {STARTS} times ({self.ended}): it is not started again")
        values = {"model": str(model), "port": str(self._port)}
        command = [_fill(part, values) for part in self._command]
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as log:
            log.write(f"$ {shlex.join(command)}\n".encode())
            log.flush()
            # The keeper ends the server, and what it started, as soon as this process is gone.
            self._process = subprocess.Popen(
                [sys.executable, "-I", keeper.__file__, *command], stdin=subprocess.PIPE, stdout=log, stderr=log,
                env={**not_launched(os.environ), **self._environment}, start_new_session=True,
            )  # fmt: skip
        logger.info("the rollout server starts on %s; its output is in %s", self.url, self._log)

    def proved(self) -> None:
        """It works: what it dies of later is counted anew."""
        self._starts = 0

    def stop(self) -> None:
        """End it and wait for that."""
        if self._process is None:
            return
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(keeper.PATIENCE + 10)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def _fill(part: str, values: Mapping[str, str]) -> str:
    for name, value in values.items():
        part = part.replace("{" + name + "}", value)
    return part


def vllm_command(python: str, *, dtype: str, max_length: int, lora_rank: int = 0, adapters: int = 2) -> list[str]:
    """What starts a vLLM server as this package needs it, by the Python of an environment that has vLLM."""
    command = [
        python, "-m", "vllm.entrypoints.openai.api_server", "--model", "{model}", "--host", "127.0.0.1", "--port",
        "{port}", "--dtype", dtype, "--max-model-len", str(max_length), "--logprobs-mode", "processed_logprobs",
        "--enable-scale-out",
    ]  # fmt: skip
    if lora_rank:
        command += ["--enable-lora", "--max-loras", str(adapters), "--max-lora-rank", str(max(8, lora_rank))]
    return command


def vllm_environment(lora: bool) -> dict[str, str]:
    """The variables that open the routes a trainer needs; they are for a server that nobody else reaches."""
    opened = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1"}
    return opened | ({"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"} if lora else {})
