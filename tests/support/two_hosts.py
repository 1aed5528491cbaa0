"""Two machines on one: two network namespaces, joined by a cable that can be slow, lose packets, and be cut.

The cable is a pair of TUN devices, one in each namespace, and a thread that carries packets between them. Delay and
loss are made there, so no `tc netem` is needed, which many kernels lack. Needs root, iproute2 and /dev/net/tun.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import heapq
import os
import random
import select
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
CLONE_NEWNET = 0x40000000
MTU = 9000


class NoNamespacesError(Exception):
    """Namespaces, or a cable between them, cannot be made here."""


class TwoHosts:
    """Hosts 0 and 1, with addresses 10.77.0.1 and 10.77.0.2 that nothing else reaches; a context manager.

    Attributes:
        delay: seconds that every packet takes, one way.
        loss: the share of packets that do not arrive.
        carried: (packets, bytes) that arrived, by the host that sent them.
    """

    def __init__(self, seed: int = 0):
        self.names = [f"bandit-{os.getpid()}-{i}" for i in (0, 1)]
        self.addresses = ["10.77.0.1", "10.77.0.2"]
        self.devices = [f"cable{i}-{os.getpid()}" for i in (0, 1)]  # at most 15 characters
        self.delay = self.loss = 0.0
        self.carried = [(0, 0), (0, 0)]
        self._rng, self._left, self._fds = random.Random(seed), float("inf"), list[int]()
        self._closing, self._thread = threading.Event(), threading.Thread(target=self._carry, daemon=True)

    def __enter__(self) -> TwoHosts:
        try:
            for i, (name, device) in enumerate(zip(self.names, self.devices, strict=True)):
                _ip("netns", "add", name)
                self._fds.append(os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK))
                fcntl.ioctl(self._fds[i], TUNSETIFF, struct.pack("16sH", device.encode(), IFF_TUN | IFF_NO_PI))
                _ip("link", "set", device, "netns", name)
                _ip("-n", name, "addr", "add", f"{self.addresses[i]}/24", "dev", device)
                _ip("-n", name, "link", "set", device, "mtu", str(MTU), "up")
                _ip("-n", name, "link", "set", "lo", "up")
            self.run_on(0, lambda: None)
        except (OSError, subprocess.SubprocessError) as error:
            self._remove()
            raise NoNamespacesError(str(getattr(error, "stderr", "") or error).strip()) from error
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._thread.join()
        self._remove()

    def _remove(self) -> None:
        for fd in self._fds:
            os.close(fd)
        for name in self.names:
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                _ip("netns", "del", name)

    def command(self, host: int) -> list[str]:
        """What to put before a command so that it runs on a host."""
        return ["ip", "netns", "exec", self.names[host]]

    def run_on(self, host: int, work: Callable[[], Any]) -> Any:
        """What `work` returns or raises; the sockets that it opens, in threads of its own too, are the host's."""
        results: list[Any] = []

        def enter() -> None:
            try:
                fd = os.open(Path("/run/netns") / self.names[host], os.O_RDONLY)
                libc = ctypes.CDLL(None, use_errno=True)
                if libc.setns(fd, CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), "setns")
                os.close(fd)
                results.append((work(), None))
            except BaseException as error:
                results.append((None, error))

        thread = threading.Thread(target=enter)  # a namespace is a thread's: the caller stays where it is
        thread.start()
        thread.join()
        value, error = results[0]
        if error is not None:
            raise error
        return value

    def cut(self, after: int = 0) -> None:
        """Cut the cable once so many more packets have arrived."""
        self._left = after

    def join(self) -> None:
        """Put the cable in again."""
        self._left = float("inf")

    @property
    def is_cut(self) -> bool:
        """Whether nothing arrives any more."""
        return self._left <= 0

    def _carry(self) -> None:
        waiting: list[tuple[float, int, int, bytes]] = []  # when it arrives, its number, from where, the packet
        number = 0
        while not self._closing.is_set():
            now = time.monotonic()
            while waiting and waiting[0][0] <= now:
                _, _, host, packet = heapq.heappop(waiting)
                self._arrive(host, packet)
            timeout = min(0.05, waiting[0][0] - now) if waiting else 0.05
            for fd in select.select(self._fds, [], [], max(0.0, timeout))[0]:
                host = self._fds.index(fd)
                with contextlib.suppress(BlockingIOError):
                    while True:
                        packet, number = os.read(fd, MTU + 100), number + 1
                        heapq.heappush(waiting, (time.monotonic() + self.delay, number, host, packet))

    def _arrive(self, host: int, packet: bytes) -> None:
        if self.is_cut or self._rng.random() < self.loss:
            return
        self._left -= 1
        with contextlib.suppress(OSError):  # the device is gone, or full: lost, as a packet may be
            os.write(self._fds[1 - host], packet)
            packets, size = self.carried[host]
            self.carried[host] = packets + 1, size + len(packet)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=20)


def two_hosts_or_skip() -> Iterator[TwoHosts]:
    """A fixture: two hosts, or a skipped test where they cannot be made."""
    try:
        with TwoHosts() as hosts:
            yield hosts
    except NoNamespacesError as error:
        pytest.skip(f"no two network namespaces with a cable can be made here: {error}")
