"""Updates on a GPU: the optimizer that waits for nothing, losses in 16 bits, and attention of packed sequences."""

from __future__ import annotations

import pytest
import torch
from ops_cases import Case
from torch import Tensor, nn

from bandit_rft import PolicyObjective, linear_policy_loss
from bandit_rft.model.packing import Packing, packed_attention
from bandit_rft.ops import backends
from bandit_rft.optimizer import PolicyOptimizer

DEVICES = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not DEVICES, reason="no CUDA GPU")]
everywhere = pytest.mark.parametrize("device", DEVICES or ["cuda"])  # also where another one is the current device


def optimizer_of(device: str, dtype: torch.dtype) -> PolicyOptimizer:
    generator = torch.Generator().manual_seed(0)
    shapes = [(70, 1000), (3,), (40, 30)]
    parameters = [nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in shapes]
    parameters[2] = nn.Parameter(parameters[2].detach().t())
    return PolicyOptimizer([(str(i), p) for i, p in enumerate(parameters)], learning_rate=0.01, max_grad_norm=1.0)


def push(optimizer: PolicyOptimizer, by: float) -> None:
    torch.stack([(p * (p.detach() * by).cos()).sum() for p in optimizer.parameters]).sum().backward()


@everywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_steps_are_those_of_the_cpu(device: str, dtype: torch.dtype) -> None:
    ours, theirs = optimizer_of(device, dtype), optimizer_of("cpu", dtype)
    for by in (1.0, 2.0, 3.0):
        norms = []
        for optimizer in (ours, theirs):
            for q, p in zip(optimizer.parameters, theirs.parameters, strict=True):
                q.data.copy_(p)  # a rounding apart, they would be pushed elsewhere
            push(optimizer, by)
            norms.append(float(optimizer.step()))
        assert norms[0] == pytest.approx(norms[1], rel=1e-3 if dtype == torch.bfloat16 else 1e-5)
    for a, b in zip(ours.masters, theirs.masters, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-3, atol=1e-3)


@everywhere
def test_a_step_that_is_refused_leaves_everything_as_it_was(device: str) -> None:
    optimizer = optimizer_of(device, torch.bfloat16)
    push(optimizer, 1.0)
    optimizer.step()
    before = {name: tensor.clone() for name, tensor in optimizer.state_tensors().items()}
    optimizer.grad_buffer(optimizer.parameters[1])[0] = torch.nan
    optimizer.step()
    push(optimizer, 2.0)
    optimizer.step()  # refused as well, until it is asked
    assert float(optimizer.refused()) == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in optimizer.state_tensors().items())
    push(optimizer, 2.0)
    optimizer.step()
    assert float(optimizer.refused()) == 0
    assert not torch.equal(optimizer.state_tensors()["0|master"], before["0|master"])


@everywhere
@pytest.mark.parametrize("threshold", [0.0, 2.0**-12])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["f16", "bf16"])
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_gradients_in_16_bits(backend: str, dtype: torch.dtype, threshold: float, device: str) -> None:
    case = Case.make(3000, 64, 1500, dtype=dtype)
    if reason := backends._ENTRIES[backend].refusal(backends.Call("cuda", dtype, torch.device(device).index or 0)):
        pytest.skip(reason)

    def gradients(of: Case, place: str, threshold: float) -> list[Tensor]:
        leaves = [t.detach().to(place).requires_grad_() for t in of.leaves(torch.float64 if place == "cpu" else None)]
        linear_policy_loss(
            *leaves, case.targets.to(place), case.advantages.to(place), case.cu_seqlens.to(place),
            objective=PolicyObjective(), gradient_threshold=threshold,
        ).loss.backward()  # fmt: skip
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    with backends.use_backend(backend):
        got = gradients(case, device, threshold)
    share = 0.02 if dtype == torch.bfloat16 else 0.005
    for ours, exact in zip(got, gradients(case, "cpu", 0.0), strict=True):
        assert (ours.cpu().double() - exact).norm() <= share * exact.norm()


@everywhere
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_attention_of_packed_sequences(dtype: torch.dtype, window: int | None, device: str) -> None:
    """Whichever kernel this torch has for it, forward and backward, beside each sequence alone in float64."""
    lengths = [9, 130, 2]
    inputs = [torch.randn(1, heads, sum(lengths), 64) for heads in (6, 2, 2)]
    inputs = [x.to(dtype) for x in inputs]
    pull = torch.randn(1, sum(lengths), 6, 64)
    ours = [x.detach().to(device).requires_grad_() for x in inputs]
    got = packed_attention(Packing.of(lengths, torch.device(device)), *ours, 0.3, window)
    got.backward(pull.to(got))
    exact, start = [x.detach().double().requires_grad_() for x in inputs], 0
    rows = []
    for length in lengths:
        q, k, v = (x[0, :, start : start + length] for x in exact)
        k, v = (x.repeat_interleave(3, 0) for x in (k, v))
        behind = torch.arange(length)[:, None] - torch.arange(length)
        seen = (behind >= 0) & (behind < (window or length))
        rows.append(((q @ k.transpose(1, 2) * 0.3).masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(0, 1))
        start += length
    want = torch.cat(rows)[None]
    want.backward(pull.double())
    share = 0.02 if dtype == torch.bfloat16 else 1e-4
    pairs = [(got, want), *((a.grad, b.grad) for a, b in zip(ours, exact, strict=True))]
    for a, b in pairs:
        assert a is not None and b is not None
        assert (a.cpu().double() - b).norm() <= share * b.norm()
