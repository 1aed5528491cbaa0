"""Which runner works on which cell, agreed on through files alone, so that any number of machines can share a folder.

A claim is a file locks/<cell>.<generation>, created exclusively: of all runners exactly one creates generation g. Its
owner touches it every few seconds. A claim that was not touched for `timeout` seconds, or whose owner is known to be
dead, is superseded by creating generation g + 1. Nothing is ever renamed or removed, so there is no moment at which two
runners can both believe in the same claim. Times are compared on the clock of the file system, never on a machine's; a
claim that clock has not reached yet counts as silent once it has not changed for `timeout` seconds before our eyes.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

HEARTBEAT = 5.0
TIMEOUT = 60.0


@dataclass(frozen=True)
class Claim:
    """A cell that this process may work on."""

    path: Path

    def beat(self) -> bool:
        """Say that the owner lives; False when the claim was lost to another runner, which took this one for dead.

        Raises:
            OSError: the file system does not answer (ESTALE, EIO): whether the claim still holds is not known.
        """
        try:
            os.utime(self.path)
        except FileNotFoundError:  # somebody removed it
            return False
        return not _generation(self.path, 1).exists()

    def release(self) -> None:
        """Let anybody claim the cell at once."""
        os.utime(self.path, (0, 0))


class Claims:
    """The claims of one study folder, as one runner sees them."""

    def __init__(self, folder: Path, timeout: float = TIMEOUT):
        self.folder = folder / "locks"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.timeout = timeout
        self.owner = {"host": _host(), "pid": os.getpid(), "started": _started(os.getpid())}
        self._clock = self.folder / f".clock-{os.uname().nodename}-{os.getpid()}"
        self._seen: dict[Path, tuple[float, float]] = {}  # when claims were touched, and when we first saw that

    def take(self, cell: str) -> Claim | None:
        """Claim a cell; None where another runner holds it."""
        path = self.folder / f"{cell}.0"
        while _generation(path, 1).exists():
            path = _generation(path, 1)
        if path.exists():
            if not self._dead(path):
                return None
            path = _generation(path, 1)
        partial = self.folder / f".{path.name}-{self.owner['pid']}-{os.uname().nodename}"
        partial.write_text(json.dumps(self.owner))
        try:
            os.link(partial, path)  # whole and exclusive, on network file systems too
        except FileExistsError:
            return None
        finally:
            partial.unlink()
        return Claim(path)

    def _dead(self, path: Path) -> bool:
        self._clock.touch()
        touched, now = path.stat().st_mtime, time.monotonic()
        if self._seen.get(path, (None, 0))[0] != touched:
            self._seen[path] = touched, now
        if max(self._clock.stat().st_mtime - touched, now - self._seen[path][1]) > self.timeout:
            return True
        try:
            owner = json.loads(path.read_text())
            host, pid, started = owner["host"], int(owner["pid"]), owner["started"]
        except (ValueError, KeyError, TypeError):  # empty, or no claim of ours: its silence alone tells
            return False
        return bool(host == self.owner["host"] and _started(pid) != started)

    def close(self) -> None:
        """Remove this runner's clock file."""
        self._clock.unlink(missing_ok=True)


def _generation(path: Path, step: int) -> Path:
    stem, _, generation = path.name.rpartition(".")
    return path.with_name(f"{stem}.{int(generation) + step}")


def _host() -> str:
    """Name and boot of this machine and its PID namespace: where, and until when, a process number means something.

    Two containers may have one name and one boot, and still do not see each other's processes.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        boot = namespace = ""
    return f"{os.uname().nodename} {boot} {namespace}"


def _started(pid: int) -> str | None:
    """When a process was started, in the kernel's ticks; None when there is none. Tells reused numbers apart."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except FileNotFoundError:
        return None
    except OSError:
        return ""
