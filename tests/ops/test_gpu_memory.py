"""What the loss allocates on a GPU, counted without one: its real products on tensors that have no memory."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from paths import ROOT
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bandit_rft.ops import head
from bandit_rft.ops.backend import Backend, Head
from bandit_rft.ops.core_backend import CudaBackend
from bandit_rft.ops.head_gradients import HeadGradients
from bandit_rft.ops.triton_backend import TritonBackend

sys.path.insert(0, str(ROOT / "benchmarks"))
from gpu_measurements import machine

GIB = 1 << 30
SHAPES = [(8192, 4096, 151936), (16384, 2048, 151936), (8192, 896, 151936), (8192, 4096, 128256)]


class Allocations(TorchDispatchMode):
    """Bytes of the storages that operations made and that still live; `peak` is the most at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        given = {self._storage(t)._cdata for t in tree_leaves((arguments, options)) if isinstance(t, torch.Tensor)}
        result = function(*arguments, **(options or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and self._storage(tensor)._cdata not in given:
                storage = self._storage(tensor)
                self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.live = {key: (ref, size) for key, (ref, size) in self.live.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return result

    @staticmethod
    def _storage(tensor: torch.Tensor) -> torch.UntypedStorage:
        return tensor.untyped_storage()


def test_the_count_is_right() -> None:
    with Allocations() as seen:
        a = torch.empty(1000, device="meta")
        a[:10].mul_(2)
        b = a + 1
        del b
        c = torch.empty(100, dtype=torch.int64, device="meta")
        assert (seen.peak, c.numel()) == (8000, 100)


@pytest.mark.parametrize("backend", [CudaBackend(None), TritonBackend()], ids=lambda backend: backend.name)
@pytest.mark.parametrize("skipped", [False, True], ids=["every row", "some rows skipped"])
@pytest.mark.parametrize("n, h, v", SHAPES)
def test_gradients_need_at_most_a_gib_and_a_quarter(
    n: int, h: int, v: int, skipped: bool, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "multiprocessors", lambda device: 132)
    monkeypatch.delenv("BANDIT_RFT_WORKSPACE_MIB", raising=False)
    hidden = torch.empty(n, h, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(v, h, dtype=torch.bfloat16, device="meta")
    index = torch.empty(n - 100, dtype=torch.int64, device="meta") if skipped else None
    sizes: list[int] = []
    with Allocations() as seen:
        gradients = HeadGradients(Head(hidden, weight, None), [True, True, False], backend)
        gradients.accumulate(index, lambda z, rows, into: sizes.append(len(z)))
        of_hidden, of_weight, _ = gradients.results()
    assert of_weight.dtype == torch.bfloat16 and of_weight.shape == weight.shape and of_hidden.shape == hidden.shape
    results = 2 * (n * h + v * h)
    assert sizes[0] == 2048
    predicted = GIB * machine.loss_memory(machine.H200, n, h, v) + (2 * 2 * 2048 * h + 8 * n if skipped else 8 * n)
    assert seen.peak - results == pytest.approx(predicted, rel=0.01)
    assert seen.peak - results <= 1.25 * GIB, f"{(seen.peak - results) / GIB:.2f} GiB"
