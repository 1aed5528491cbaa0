"""The Triton kernels on a GPU: triton_operations.py, which tests/kernels runs in the interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from paths import ROOT, SUPPORT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
    pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton"),
]


def test_operations_on_the_gpu() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(SUPPORT / "triton_operations.py")]
    command += ["-k", "not rivals"]  # needs a margin that a compiled kernel does not have
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-2000:]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("hidden_size,rows", [(896, 1), (896, 24), (4096, 24), (896, 40), (2048, 300)])
def test_a_drawn_token_has_the_logprob_that_scoring_gives(hidden_size: int, rows: int, dtype: torch.dtype) -> None:
    """One tile order for both fused kernels: the same bits, whatever the number of rows around a row."""
    from bandit_rft.kernels.linear_logprobs import linear_logprobs
    from bandit_rft.kernels.linear_sample import linear_sample

    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(rows, hidden_size, device="cuda", dtype=dtype, generator=generator)
    weight = torch.randn(32001, hidden_size, device="cuda", dtype=dtype, generator=generator) * 0.03
    ids = torch.arange(rows, device="cuda")
    tokens, logprobs, _, entropy, _ = linear_sample(
        hidden, weight, seed=torch.tensor(5, device="cuda"), sequence_ids=ids, positions=torch.zeros_like(ids)
    )
    scored = linear_logprobs(hidden, weight, tokens)
    assert torch.equal(logprobs, scored[0])
    assert torch.equal(entropy, scored[1])
