"""Any strides are accepted: every argument of every operation as a view, on every backend that reads CPU memory.

tests/support/triton_operations.py does the same for Triton, tests/csrc/test_bindings.py for the CUDA backend.
"""

from __future__ import annotations

import pytest
import torch
from ops_cases import BACKENDS
from stride_cases import OPERATIONS, check_any_strides, check_expanded

from bandit_rft.ops import use_backend


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_any_strides(operation: str, backend: str) -> None:
    with use_backend(backend):
        check_any_strides(operation)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_expanded(operation: str, backend: str) -> None:
    with use_backend(backend):
        check_expanded(operation)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="needs the compiled core")
def test_attention_takes_any_strides() -> None:
    from bandit_rft.ops.attention import packed_attention

    q, k, v, cu = torch.randn(5, 4, 6), torch.randn(5, 2, 6), torch.randn(5, 2, 6), torch.tensor([0, 2, 5])
    want = packed_attention(q, k, v, cu, 0.5)
    strided = torch.stack([cu, cu - 9], 1)[:, 0]
    transposed = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
    assert torch.equal(packed_attention(*transposed, strided, 0.5), want)
