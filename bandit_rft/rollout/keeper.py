"""Runs a command and ends it, with all that it started, when standard input closes: when whoever started this is gone.

A killed trainer cannot end its server; a pipe that it held closes however it ends.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

#: Seconds between asking a server to end and making it.
PATIENCE = 10.0


def main(command: list[str]) -> int:
    """The command's exit status, when nothing of it runs any more."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    threading.Thread(target=_watch, args=(process,), daemon=True).start()
    status = process.wait()
    _signal(process, signal.SIGKILL)  # what the command left behind
    return status if status >= 0 else 128 - status


def _watch(process: subprocess.Popen[bytes]) -> None:
    while os.read(0, 1):  # unbuffered: a buffer's lock, held by this thread, would abort the interpreter's end
        pass
    _signal(process, signal.SIGTERM)
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    _signal(process, signal.SIGKILL)


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)  # its session has its number


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
