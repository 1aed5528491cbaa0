"""The compiled CUDA kernels on a GPU: the operations' test table, streams, graphs, and the sanitizer's tools."""

from __future__ import annotations

import shutil
import subprocess
import sys
from typing import Any

import pytest
import torch
from ops_cases import CASES, OBJECTIVES, Case, assert_close_to_truth, plain_in
from paths import ROOT
from torch import Tensor

from bandit_rft import linear_logprobs, linear_policy_loss, sample_from_logits
from bandit_rft.ops import backends, reference, rows, use_backend
from bandit_rft.ops.rows import Scaling


def _refusal() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA GPU"
    return backends._cuda_refusal(backends.Call("cuda", torch.float32, torch.cuda.current_device()))


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(_refusal() is not None, reason=str(_refusal()))]
FILTERS = [{}, {"top_k": 1}, {"top_k": 7}, {"top_p": 0.6}, {"min_p": 0.05}, {"top_k": 40, "top_p": 0.9, "min_p": 0.01}]


def on_gpu(value: Any) -> Any:
    return value.cuda() if isinstance(value, Tensor) else value


def gpu_leaves(case: Case) -> list[Tensor]:
    return [t.detach().cuda().requires_grad_() for t in case.leaves()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_logprobs(name: str, dtype: torch.dtype) -> None:
    case = Case.make(**CASES[name], dtype=dtype)
    g = torch.randn(2, len(case.hidden))
    truth, plain = _differentiated(case, g)
    hidden, weight, *bias = gpu_leaves(case)
    with use_backend("cuda"):
        scaling = {k: on_gpu(v) for k, v in case.scaling.items()}
        got = linear_logprobs(
            hidden, weight, case.targets.cuda(), bias=bias[0] if bias else None, return_entropy=True, **scaling
        )
        ((got[0] * g[0].cuda()).sum() + (got[1] * g[1].cuda()).sum()).backward()
    results = [*got, hidden.grad, weight.grad, *(b.grad for b in bias)]
    names = ["logprobs", "entropy", "hidden.grad", "weight.grad", "bias.grad"]
    for what, r, p, t in zip(names, results, plain, truth, strict=False):
        assert r is not None
        assert_close_to_truth(f"{name} {what}", r.detach().cpu(), p, t, floor=1e-5)


def _differentiated(case: Case, g: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """(truth in float64, plain PyTorch in the case's dtype): logprobs, entropy and the gradients of the leaves."""
    found = []
    for dtype in (torch.float64, case.hidden.dtype):
        logp, entropy, *leaves = plain_in(case, dtype)
        ((logp * g[0].to(dtype)).sum() + (entropy * g[1].to(dtype)).sum()).backward()
        found.append([logp.detach(), entropy.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)])
    return found[0], found[1]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_policy_loss_equals_the_torch_backend(name: str) -> None:
    case = Case.make(n=61, h=48, v=1003)
    results = []
    for backend in ("torch", "cuda"):
        hidden, weight = gpu_leaves(case)
        with use_backend(backend):
            got = linear_policy_loss(
                hidden, weight, case.targets.cuda(), case.advantages.cuda(), case.cu_seqlens.cuda(),
                objective=OBJECTIVES[name], behavior_logprobs=case.behavior.cuda(),
                reference_logprobs=case.reference.cuda(),
            )  # fmt: skip
        got.loss.backward()
        results.append([got.loss.detach(), got.logprobs, hidden.grad, weight.grad])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("v", [1, 1603, 40_003, 151_936])
def test_draws(filters: dict[str, float], v: int, dtype: torch.dtype) -> None:
    z = (torch.randn(9, v, device="cuda") * 2).to(dtype)
    stream = {"sequence_ids": torch.arange(9, device="cuda") * 7919, "positions": torch.arange(9, device="cuda")}
    with use_backend("cuda"):
        got = sample_from_logits(z, seed=5, **stream, **filters)
    want = reference.sample(z.double(), seed=torch.tensor(5, device="cuda"), **stream, **filters)
    assert (got.tokens == want.tokens).float().mean() >= 8 / 9  # two perturbed logits may lie within rounding
    same = got.tokens == want.tokens
    for a, b in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(a[same].double(), b[same].double(), rtol=5e-5, atol=5e-5)


@pytest.mark.parametrize("v", [1, 5, 1001, 32_000, 128_256, 151_936, 500_001])
def test_gradient_in_place_and_narrow(v: int) -> None:
    """Rows in one block's, in a cluster's and in nobody's shared memory; bfloat16 over the row's own second half."""
    z, targets = torch.randn(5, v, device="cuda") * 3, torch.randint(v, (5,), device="cuda")
    x = z.double().requires_grad_()
    logp, entropy = reference.logprobs_and_entropy(x, targets)
    given, of_entropy = torch.randn(5, device="cuda"), torch.randn(5, device="cuda")
    ((logp * given).sum() + (entropy * of_entropy).sum()).backward()
    assert x.grad is not None
    with use_backend("cuda"):
        full, narrow = z.clone(), z.clone()
        got = rows.gradient_(full, targets, Scaling(), given, of_entropy)
        half = narrow.view(torch.bfloat16)[:, v:]
        rows.gradient_(narrow, targets, Scaling(), given, of_entropy, half)
    torch.testing.assert_close(got[0].double(), logp.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(full.double(), x.grad, rtol=1e-3, atol=1e-6)
    # A lane of the narrow kernel has 8 neighbours where the other's has 4, for 16-byte stores: float32 sums in another
    # order, so the last bit of a row's constants may differ, and with it now and then the rounding to bfloat16: by one
    # unit, or by float32's rounding of terms that cancel.
    every = torch.log_softmax(x.detach(), -1)
    terms = every.exp() * (given.abs()[:, None] + of_entropy.abs()[:, None] * (entropy.detach()[:, None] - every))
    off = (half.double() - full.to(torch.bfloat16).double()).abs()
    assert bool((off <= 2**-7 * full.double().abs() + 2**-20 * terms).all())
    assert int((off > 0).sum()) <= 3 + 1e-4 * off.numel()


def test_more_rows_than_a_grid_dimension_once_had() -> None:
    z, targets = torch.randn(70_001, 33, device="cuda"), torch.randint(33, (70_001,), device="cuda")
    with use_backend("cuda"):
        logp, _ = rows.logprobs(z, targets, Scaling())
    want = torch.log_softmax(z.double(), -1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(logp.double(), want, rtol=1e-5, atol=1e-5)


def test_work_is_on_the_callers_stream() -> None:
    """The kernel reads what an unfinished kernel of the same stream is going to write."""
    side, targets = torch.cuda.Stream(), torch.arange(64, device="cuda")
    logits = torch.zeros(64, 50_000, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(side), use_backend("cuda"):
        torch.cuda._sleep(50_000_000)
        logits.scatter_(1, targets[:, None], 30.0)
        logp, _ = rows.logprobs(logits, targets, Scaling())
    side.synchronize()
    assert bool((logp > -1e-3).all())


def test_graph_capture_and_replay() -> None:
    z = torch.randn(6, 20_000, device="cuda")
    seed = torch.tensor(1, device="cuda")
    ids, positions = torch.arange(6, device="cuda"), torch.zeros(6, dtype=torch.int64, device="cuda")

    def draw() -> Tensor:
        return sample_from_logits(z, seed=seed, sequence_ids=ids, positions=positions, top_p=0.9).tokens

    with use_backend("cuda"):
        draw()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = draw()
        for number in (7, 8):
            seed.fill_(number)
            positions.fill_(number)
            graph.replay()
            replayed = captured.clone()
            assert torch.equal(replayed, draw())


SANITIZED = """
import torch
from bandit_rft import sample_from_logits
from bandit_rft.ops import rows, use_backend
with use_backend("cuda"):
    for v in (1, 7, 1003, 66001):
        z, t = torch.randn(3, v, device="cuda"), torch.zeros(3, dtype=torch.int64, device="cuda")
        ones = torch.ones(3, device="cuda")
        rows.logprobs(z, t, rows.Scaling())
        sample_from_logits(z, seed=1, sequence_ids=t, positions=t, top_k=3, top_p=0.9)
        sample_from_logits(z.round(), seed=1, sequence_ids=t, positions=t, top_k=v // 2 + 1, top_p=0.9)
        sample_from_logits(z, seed=1, sequence_ids=t, positions=t)
        rows.gradient_(z.clone(), t, rows.Scaling(), ones, ones)
        rows.gradient_(z, t, rows.Scaling(), ones, ones, z.view(torch.bfloat16)[:, v:])
torch.cuda.synchronize()
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    done = subprocess.run(
        [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", SANITIZED],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    if tool == "racecheck":  # whose exit status tells of errors alone
        assert "0 hazards displayed" in done.stdout, done.stdout[-3000:]
