"""The CUDA backend's own path without a GPU: core_backend.py, the bindings, and the kernels behind them, emulated.

The module is csrc/cuda/exports.cpp over the emulated kernels; the backend is `CudaBackend` with CPU tensors and no
stream. So what Python hands over, and what the bindings make of it, is what a GPU would get.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from ops_cases import CASES, Case, assert_close_to_truth, plain_in
from stride_cases import OPERATIONS, check_any_strides, check_expanded, run, values
from torch import Tensor
from torch.utils.dlpack import to_dlpack  # type: ignore[attr-defined]

from bandit_rft import linear_logprobs
from bandit_rft.ops import backends, use_backend
from bandit_rft.ops.core_backend import CudaBackend

pytestmark = pytest.mark.slow  # emulation of a GPU


class EmulatedBackend(CudaBackend):
    """The CUDA backend on the emulated device, whose memory is the CPU's; it has one stream, 0."""

    def _place(self, logits: Tensor) -> int:
        return 0


@pytest.fixture(scope="module")
def module(emulated_cuda: Path) -> ModuleType:
    loader = ExtensionFileLoader("emulated_cuda", str(emulated_cuda))
    spec = spec_from_file_location("emulated_cuda", emulated_cuda, loader=loader)
    assert spec is not None
    found = module_from_spec(spec)
    loader.exec_module(found)
    return found


@pytest.fixture
def _cuda(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    emulated = EmulatedBackend(SimpleNamespace(cuda=module))
    entry = backends.Entry(emulated, "emulated CUDA kernels, CPU memory", lambda call: None)
    monkeypatch.setitem(backends._ENTRIES, "cuda", entry)
    with use_backend("cuda"):
        yield


@pytest.mark.usefixtures("_cuda")
@pytest.mark.parametrize("operation", OPERATIONS)
def test_any_strides(operation: str) -> None:
    check_any_strides(operation)


@pytest.mark.usefixtures("_cuda")
@pytest.mark.parametrize("operation", OPERATIONS)
def test_expanded(operation: str) -> None:
    check_expanded(operation)


@pytest.mark.usefixtures("_cuda")
@pytest.mark.parametrize("operation", OPERATIONS)
def test_results_are_those_of_plain_pytorch(operation: str) -> None:
    given = {k: values()[k] for k in OPERATIONS[operation][2]}
    found = run(operation, given)
    with use_backend("torch"):
        want = run(operation, {k: values()[k] for k in given})
    for got, plain in zip(found, want, strict=True):
        torch.testing.assert_close(got, plain, rtol=1e-4, atol=2e-5)


@pytest.mark.usefixtures("_cuda")
@pytest.mark.parametrize("name", ["one-word", "rows-temperature", "everything"])
def test_bfloat16_gradients_over_the_logits_second_half(name: str) -> None:
    """dL/dlogits in 16 bits over float32 logits: an offset view of their memory, handed over as one."""
    case = Case.make(**CASES[name], dtype=torch.bfloat16)
    leaves, truth = case.leaves(), case.leaves(torch.float64)
    options = case.scaling | {"bias": leaves[2] if len(leaves) > 2 else None}
    linear_logprobs(leaves[0], leaves[1], case.targets, **options).sum().backward()
    logp, _, *plain = plain_in(case, torch.bfloat16)
    logp.sum().backward()
    exact = plain_in(case, torch.float64)
    exact[0].sum().backward()
    assert truth
    for what, got, p, t in zip(("hidden", "weight", "bias"), leaves, plain, exact[2:], strict=False):
        assert got.grad is not None and p.grad is not None and t.grad is not None
        assert_close_to_truth(what, got.grad, p.grad, t.grad)


def test_what_bindings_cannot_read_is_refused(module: ModuleType) -> None:
    """Named, before a kernel reads it: columns that are not neighbours, a strided vector, another dtype or length."""
    z, n, v = torch.randn(6, 70), 6, 70
    targets, out = torch.randint(v, (n,)), torch.empty(2, n)
    given = {"logits": z, "targets": targets, "temperatures": None, "logprobs": out[0], "entropy": out[1]}

    def call(**changed: Tensor) -> None:
        a = {k: None if t is None else to_dlpack(t) for k, t in {**given, **changed}.items()}
        module.logprob_rows(**a, temperature=1.0, softcap=0.0, logit_scale=1.0, stream=0)

    call()
    pairs = torch.zeros(n, 2)
    for message, changed in {
        "logits must be contiguous in its last dimension": {"logits": torch.randn(v, n).T},
        "targets must be contiguous": {"targets": torch.zeros(n, 2, dtype=torch.int64)[:, 0]},
        "targets must be int64": {"targets": targets.int()},
        "targets must have length 6; got 5": {"targets": targets[:5]},
        "temperature must be contiguous": {"temperatures": pairs[:, 1]},
        "logprobs must be contiguous": {"logprobs": pairs[:, 1]},
        "entropy must be float32": {"entropy": torch.empty(n, dtype=torch.float64)},
        "logits must have 2 dimensions": {"logits": z[0]},
    }.items():
        with pytest.raises(ValueError, match=message):
            call(**changed)
