"""Runs one operation of the installed bandit_rft against plain PyTorch, on a CPU and on a GPU if there is one."""

from __future__ import annotations

import sys
import warnings

import torch

import bandit_rft
from bandit_rft.ops import backends

assert backends.native is not None, f"the compiled module is missing: {backends.native_error}"
cuda = getattr(backends.native, "cuda", None)
if "+cu" in backends.native.version:
    assert cuda is not None, f"{backends.native.version} has no CUDA kernels"
devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
for device in devices:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hidden, weight = torch.randn(7, 16, device=device), torch.randn(1001, 16, device=device)
        targets = torch.arange(7, device=device)
        got = bandit_rft.linear_logprobs(hidden, weight, targets)
    want = torch.log_softmax(hidden @ weight.T, -1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
print(backends.describe())
if cuda is not None and not torch.cuda.is_available():
    print(f"without a GPU the CUDA kernels say: {cuda.refusal(0)}", file=sys.stderr)
