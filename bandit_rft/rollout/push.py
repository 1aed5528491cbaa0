"""How new weights reach a rollout server: as a folder, as a LoRA adapter, or over NCCL; one interface.

`prepare` is called once a version, `send` for each server, and again for one that was restarted and has lost them.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from bandit_rft.files import sync
from bandit_rft.rollout.client import RolloutClient, ServerError

#: Written last into a folder of weights: what reads such folders without being told takes one that has it.
MARKER = "COMPLETE"


class WeightPush(Protocol):
    """Brings one version of the weights to servers."""

    #: Whether an earlier `send` can be done again after the trainer's weights moved.
    repeatable: bool

    def prepare(self, version: int) -> None:
        """Have the trainer's weights as they are now ready to be sent, as this version."""

    def send(self, client: RolloutClient, label: str) -> None:
        """Bring what was prepared last to one server, which says `label` from now on."""

    def adapter(self, label: str) -> str | None:
        """The adapter that requests must name; None: the model itself."""

    def folder(self) -> Path | None:
        """The Hugging Face folder that a server may be started with; None before the first `prepare`."""


class FolderPush:
    """A Hugging Face folder that trainer and servers both see, written whole or not at all.

    Args:
        save: writes the weights to a folder.
        root: where folders step-<version> go; the latest two stay.
    """

    repeatable = True

    def __init__(self, save: Callable[[Path], None], root: Path):
        self._save, self.root = save, root.resolve()
        self._latest: Path | None = None

    def prepare(self, version: int) -> None:
        """Write step-<version>: to a folder aside, synced, renamed; then its marker."""
        target, partial = self.root / f"step-{version}", self.root / f"step-{version}.tmp"
        for leftover in (target, partial):  # of a run that was killed, or that is continued from before this version
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir(parents=True)
        self._save(partial)
        for path in (*sorted(partial.rglob("*")), partial):
            sync(path)
        partial.rename(target)
        (target / MARKER).touch()
        for path in (target / MARKER, target, self.root):
            sync(path)
        before, self._latest = self._latest, target
        for old in self.root.glob("step-*"):
            if old not in (target, before):
                shutil.rmtree(old, ignore_errors=True)

    def send(self, client: RolloutClient, label: str) -> None:
        """Nothing is drawn while weights are half old; what were, would say so."""
        assert self._latest is not None
        client.pause()
        client.set_version(f"loading {label}")
        client.load_weights(self._latest)
        _name(client, label)
        client.resume()

    def adapter(self, label: str) -> None:
        """None: the model itself is asked."""

    def folder(self) -> Path | None:
        """The folder written last."""
        return self._latest


class LoraPush(FolderPush):
    """A peft folder, loaded under a new name each version.

    A name used again would match prefixes that were cached with the old weights. The adapter before stays loaded, for
    whoever still asks for it, so the server needs `--max-loras` 2 or more (3 with a round drawn ahead).
    """

    def __init__(self, save: Callable[[Path], None], root: Path, base: Path | None = None):
        super().__init__(save, root)
        self._base, self._loaded = base, dict[str, list[str]]()

    def send(self, client: RolloutClient, label: str) -> None:
        """Load it beside the one before; let go of those before that."""
        assert self._latest is not None
        client.set_version(f"loading {label}")
        client.unload_adapter(label)  # sent to this server before, and perhaps not to its end
        client.load_adapter(label, self._latest)
        loaded = self._loaded.setdefault(client.url, [])
        loaded[:] = [name for name in loaded if name != label] + [label]
        for old in loaded[:-2]:
            client.unload_adapter(old)
        del loaded[:-2]
        _name(client, label)
        client.resume()

    def adapter(self, label: str) -> str:  # type: ignore[override]
        """Its name is the label."""
        return label

    def folder(self) -> Path | None:
        """The model that adapters go on top of."""
        return self._base


class NcclPush:
    """From the trainer's GPU to the servers' over NCCL, by vLLM's own transfer. Never run: it needs two GPUs.

    HTTP is called from this thread with a time limit; NCCL, which has none, is in a daemon thread: a server that died
    must not hang the trainer for ever.

    Args:
        module: whose parameters are sent.
        address: of this machine, as the servers reach it.
        timeout: seconds that one transfer may take.
    """

    repeatable = False

    def __init__(self, module: Any, address: str, timeout: float):
        self._module, self._address, self._timeout = module, address, timeout
        self._engines = dict[str, Any]()

    def prepare(self, version: int) -> None:
        """Nothing: what is sent is what the parameters hold then."""

    def send(self, client: RolloutClient, label: str) -> None:
        """One transfer, with the first one for a server also the rendezvous."""
        client.pause()
        client.set_version(f"loading {label}")
        workers = client.workers()
        self._within_limit(lambda: self._engine(client.url, workers).send_weights(), client.url)
        _name(client, label)
        client.resume()

    def adapter(self, label: str) -> None:
        """None: the model itself is asked."""

    def folder(self) -> None:
        """None: nothing is written."""

    def _engine(self, url: str, workers: int) -> Any:
        if url not in self._engines:
            import socket

            from vllm.distributed.weight_transfer.base import ModuleSource
            from vllm.distributed.weight_transfer.clients import HTTPVLLMWeightSyncClient
            from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
            from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

            with socket.socket() as free:
                free.bind(("", 0))
                port = free.getsockname()[1]
            info = NCCLTrainerInitInfo(self._address, port, world_size=1 + workers, rank=0)
            client = HTTPVLLMWeightSyncClient(url, timeout=self._timeout)
            self._engines[url] = WeightTransferTrainerFactory.trainer_init(
                info, client=client, source=ModuleSource(self._module)
            )
        return self._engines[url]

    def _within_limit(self, transfer: Callable[[], Any], url: str) -> None:
        failed = list[BaseException]()

        def work() -> None:
            try:
                transfer()
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=work, name="nccl-push", daemon=True)
        thread.start()
        thread.join(self._timeout)
        if thread.is_alive():
            self._engines.pop(url, None)
            raise ServerError(f"{url}: the weights did not arrive over NCCL within {self._timeout:g} s")
        if failed:
            self._engines.pop(url, None)
            raise ServerError(f"{url}: the weights did not arrive over NCCL: {failed[0]}") from failed[0]


def _name(client: RolloutClient, label: str) -> None:
    """Give the weights their name, and see that the server took it."""
    client.set_version(label)
    if (told := client.version()) != label:
        raise ServerError(f"{client.url} says that it has weights {told!r}; {label!r} were pushed")
