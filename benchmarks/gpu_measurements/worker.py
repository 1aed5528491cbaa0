"""Measurements in a process of their own: what faults, hangs or poisons its CUDA context costs one measurement.

The worker takes one name a line from its standard input and answers on a pipe with lines of JSON: {"result": ...}, then
{"end": status, "text": ...}. Its own output goes to a log. One worker serves until it dies, hangs, or can no longer
reach the device; starting another takes seconds.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from .record import CRASHED, DONE, FAILED, TIMED_OUT

START_SECONDS = 120.0
PR_SET_PDEATHSIG = 1  # of Linux's prctl
PACKAGES = (
    "bandit_rft", "torch", "triton", "transformers", "liger-kernel", "trl", "cut-cross-entropy", "flashinfer-python",
    "quack-kernels",
)  # fmt: skip


class Worker:
    """One process, from the parent's side."""

    def __init__(self, command: Sequence[str], log: Path):
        self.log = log
        reader, writer = os.pipe()
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [*command, "--worker", str(writer)], stdin=subprocess.PIPE, stdout=output, stderr=output,
                pass_fds=[writer], start_new_session=True,
            )  # fmt: skip
        os.close(writer)
        self.reader, self.buffer = reader, b""
        self.about: dict[str, Any] = {}

    def start(self) -> None:
        """Wait until it is ready; RuntimeError with the end of its log otherwise."""
        message = self._message(time.monotonic() + START_SECONDS)
        if not isinstance(message, dict):
            self.stop()
            raise RuntimeError(f"the measuring process did not start: {self.log_tail()}")
        self.about = message["machine"]

    def run(self, name: str, seconds: float, keep: Callable[[dict[str, Any]], None]) -> tuple[str, str, bool]:
        """(status, text, whether this worker can go on); each result is handed to `keep` when it comes."""
        deadline = time.monotonic() + seconds
        assert self.process.stdin is not None
        try:
            self.process.stdin.write((name + "\n").encode())
            self.process.stdin.flush()
        except BrokenPipeError:
            return CRASHED, self.log_tail(), False
        while True:
            message = self._message(deadline)
            if message is None:
                self.stop()
                return TIMED_OUT, f"no end after {seconds:.0f} s", False
            if message is False:
                code = self.process.wait()
                how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
                return CRASHED, f"{how}; {self.log_tail()}", False
            assert isinstance(message, dict)
            if "result" in message:
                keep(message["result"])
            else:
                return message["end"], message["text"], message["usable"]

    def _message(self, deadline: float) -> dict[str, Any] | bool | None:
        """The next message; None after the deadline, False where the process has ended."""
        while b"\n" not in self.buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.reader], [], [], left)[0]:
                return None
            received = os.read(self.reader, 1 << 16)
            if not received:
                return False
            self.buffer += received
        line, self.buffer = self.buffer.split(b"\n", 1)
        message: dict[str, Any] = json.loads(line)
        return message

    def stop(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        if self.process.stdin is not None:
            self.process.stdin.close()
        if self.reader >= 0:
            os.close(self.reader)
            self.reader = -1

    def log_tail(self) -> str:
        return self.log.read_bytes()[-600:].decode(errors="replace").strip()


def serve(pipe: int, measurements: dict[str, Callable[[Any], Iterator[dict[str, Any]]]], setting: Any) -> None:
    """The worker's side."""
    if sys.platform == "linux":  # one that hangs must not keep the device when the checker is killed
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    def send(message: dict[str, Any]) -> None:
        os.write(pipe, (json.dumps(message) + "\n").encode())

    send({"machine": about(setting)})
    for line in sys.stdin:
        name = line.strip()
        print(f"--- {name}", flush=True)
        status, text = DONE, ""
        try:
            for result in measurements[name](setting):
                send({"result": result})
        except Exception as error:
            status, text = FAILED, f"{type(error).__name__}: {error}"[:1000]
        usable = _usable(setting)
        send({"end": status, "text": text, "usable": usable})
        if not usable:
            return


def _usable(setting: Any) -> bool:
    """An error of a kernel stays with the context: then nothing after it in this process can be trusted."""
    if setting.device.type != "cuda":
        return True
    import gc

    import torch

    try:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
    except Exception as error:
        print(f"the device cannot be reached any more: {error}", file=sys.stderr)
        return False
    return True


def about(setting: Any) -> dict[str, Any]:
    import torch
    from comparison.machine import measured

    from bandit_rft import ops

    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    name = torch.cuda.get_device_name() if setting.device.type == "cuda" else platform.machine() + " CPU"
    return {
        "device": name, "dtype": str(setting.dtype).removeprefix("torch."), "versions": versions,
        "backends": ops.describe().splitlines(), "commit": measured()["commit"],
    }  # fmt: skip
