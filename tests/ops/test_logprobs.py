"""linear_logprobs and logprobs_from_logits against the float64 truth."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_cases import BACKENDS, CASES, Case, assert_close_to_truth, plain_in
from torch.utils.dlpack import to_dlpack

from bandit_rft import linear_logprobs, logprobs_from_logits
from bandit_rft.ops import backends, head, reference, use_backend
from bandit_rft.ops.backend import Head, RowStatistics, Scaling
from bandit_rft.ops.core_backend import CpuBackend


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name: str, backend: str, dtype: torch.dtype) -> None:
    case = Case.make(**CASES[name], dtype=dtype)
    n = len(case.targets)
    pull_logp, pull_entropy = torch.randn(n), torch.randn(n)

    def gradients(logp: torch.Tensor, entropy: torch.Tensor, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
        total = (pull_logp.to(logp.dtype) * logp).sum() + (pull_entropy.to(logp.dtype) * entropy).sum()
        return list(torch.autograd.grad(total, leaves))

    leaves = case.leaves()
    with use_backend(backend):
        logp, entropy = linear_logprobs(
            leaves[0], leaves[1], case.targets, bias=leaves[2] if case.bias is not None else None,
            return_entropy=True, **case.scaling,
        )  # fmt: skip
        got = [logp, entropy, *gradients(logp, entropy, leaves)]
    assert logp.dtype == entropy.dtype == torch.float32
    assert [g.dtype for g in got[2:]] == [t.dtype for t in leaves]

    exact = case.leaves(torch.float64)
    t_logp, t_entropy = reference.linear_logprobs(
        exact[0], exact[1], case.targets, bias=exact[2] if case.bias is not None else None, **case.doubled_scaling()
    )
    truth = [t_logp, t_entropy, *gradients(t_logp, t_entropy, exact)]
    p_logp, p_entropy, *p_leaves = plain_in(case, dtype)
    plain = [p_logp, p_entropy, *gradients(p_logp, p_entropy, p_leaves)]
    floor = 2e-6 if dtype == torch.float32 else 4e-3  # a result rounded to bfloat16 is off by up to 2^-9 of itself
    for label, g, p, t in zip(["logp", "entropy", "dhidden", "dweight", "dbias"], got, plain, truth, strict=False):
        assert_close_to_truth(label, g.detach(), p.detach(), t.detach(), floor if label.startswith("d") else 2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_from_logits(backend: str, dtype: torch.dtype) -> None:
    logits = (torch.randn(33, 1500) * 4).to(dtype).requires_grad_()
    targets, temperature = torch.randint(1500, (33,)), torch.rand(33) + 0.5
    pull = torch.randn(2, 33)
    with use_backend(backend):
        logp, entropy = logprobs_from_logits(logits, targets, temperature=temperature, return_entropy=True)
        (gradient,) = torch.autograd.grad((pull[0] * logp + pull[1] * entropy).sum(), logits)
    exact = logits.detach().double().requires_grad_()
    t_logp, t_entropy = reference.logprobs_and_entropy(exact / temperature.double()[:, None], targets)
    (t_gradient,) = torch.autograd.grad((pull[0] * t_logp + pull[1] * t_entropy).sum(), exact)
    torch.testing.assert_close(logp.double(), t_logp, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(entropy.double(), t_entropy, rtol=2e-6, atol=4e-6)
    assert gradient.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(gradient.double(), t_gradient, rtol=tolerance, atol=tolerance * 0.1)


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(0, 40), h=st.integers(1, 70), v=st.integers(1, 1700), backend=st.sampled_from(BACKENDS),
    temperature=st.floats(0.1, 3.0), seed=st.integers(0, 2**20),
)  # fmt: skip
def test_any_shape(n: int, h: int, v: int, backend: str, temperature: float, seed: int) -> None:
    case = Case.make(n, h, v, temperature=temperature, seed=seed)
    with use_backend(backend):
        logp, entropy = linear_logprobs(
            case.hidden, case.weight, case.targets, return_entropy=True, temperature=temperature
        )
    truth = case.truth()
    plain = plain_in(case, torch.float32)
    assert_close_to_truth("logp", logp, plain[0].detach(), truth[0].detach(), floor=4e-6)
    assert_close_to_truth("entropy", entropy, plain[1].detach(), truth[1].detach(), floor=4e-6)


@pytest.mark.skipif(backends.native is None, reason="needs the compiled core")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_tiles_of_columns_are_one_softmax(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The core never has a whole row: targets lie in the first, a middle and the last tile, of one column."""
    monkeypatch.setattr(head, "_TILE_ROWS", 600)  # two stretches of rows
    n, h, v = 1100, 16, 3 * head.columns_a_tile(600) + 1
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(n, h, generator=generator).to(dtype)
    weight, bias = torch.randn(v, h + 1, generator=generator)[:, :h].to(dtype), torch.randn(v).to(dtype)
    weight[7] = 60 * hidden[0] / hidden[0].norm()  # row 0: all others' exponentials are nothing beside it
    targets = torch.randint(v, (n,), generator=generator)
    targets[:4] = torch.tensor([7, 0, v - 1, v // 2])
    options = {"softcap": 30.0, "logit_scale": 1.1, "temperature": torch.rand(n, generator=generator) + 0.5}
    with use_backend("cpu"):
        got = linear_logprobs(hidden, weight, targets, bias=bias, return_entropy=True, **options)
    options["temperature"] = options["temperature"].double()
    exact = reference.linear_logprobs(hidden.double(), weight.double(), targets, bias=bias.double(), **options)
    for g, e in zip(got, exact, strict=True):
        torch.testing.assert_close(g.double(), e, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(backends.native is None, reason="needs the compiled core")
@pytest.mark.parametrize("where", [0, 1, 2])
def test_a_tile_of_minus_infinity_and_a_nan_in_one(where: int) -> None:
    n, h = 600, 4
    columns = head.columns_a_tile(n)
    v = 3 * columns
    hidden, weight, bias = torch.randn(n, h), torch.randn(v, h), torch.zeros(v)
    targets = torch.randint(columns, (n,)) + (where + 1) % 3 * columns
    bias[where * columns : (where + 1) * columns] = -torch.inf
    with use_backend("cpu"):
        got = linear_logprobs(hidden, weight, targets, bias=bias, return_entropy=True)
    exact = linear_logprobs(hidden.double(), weight.double(), targets, bias=bias.double(), return_entropy=True)
    for g, e in zip(got, exact, strict=True):
        torch.testing.assert_close(g.double(), e, rtol=1e-5, atol=1e-5)
    hidden[5] = torch.nan
    with use_backend("cpu"):
        assert linear_logprobs(hidden, weight, targets, bias=bias).isnan().tolist() == [i == 5 for i in range(n)]


@pytest.mark.skipif(backends.native is None, reason="needs the compiled core")
def test_rows_of_a_kernel_that_inherits_from_the_core_are_whole() -> None:
    class Mine(CpuBackend):
        def logprob_rows(self, logits: torch.Tensor, targets: torch.Tensor, scaling: Scaling) -> RowStatistics:
            return RowStatistics(torch.full((len(logits),), float(logits.shape[1])), torch.zeros(len(logits)))

    of = Head(torch.randn(5, 4), torch.randn(3000, 4), None)
    seen = Mine(backends.native).head_logprobs(of, torch.zeros(5, dtype=torch.int64), Scaling.of(1.0))
    assert seen.logprobs.tolist() == [3000.0] * 5


def test_tiles_that_do_not_fit_the_sums_are_refused() -> None:
    core = pytest.importorskip("bandit_rft._C")
    sums = core.TiledLogprobs(3)
    logits, targets = torch.zeros(2, 4), torch.zeros(3, dtype=torch.int64)
    plain = (0, 1.0, None, 0.0, 1.0, 1)
    with pytest.raises(ValueError, match="logits must have as many rows as the sums"):
        sums.add(to_dlpack(logits), to_dlpack(targets), *plain)
    with pytest.raises(ValueError, match="targets must have length 2; got 3"):
        core.TiledLogprobs(2).add(to_dlpack(logits), to_dlpack(targets), *plain)
    with pytest.raises(ValueError, match="rows must be 0 or more; got -1"):
        core.TiledLogprobs(-1)
    sums.add(to_dlpack(torch.zeros(3, 4)), to_dlpack(targets + 4), *plain)
    out = torch.zeros(2, 3)
    sums.finish(to_dlpack(out[0]), to_dlpack(out[1]))
    assert out[0].isnan().all()  # no tile has held the target
    torch.testing.assert_close(out[1], torch.full((3,), 4.0).log())


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_logits(backend: str) -> None:
    very_negative = torch.full((1, 900), -1e4)  # every logit: a peer gave NaN here
    one_peak = torch.zeros(1, 900)
    one_peak[0, 7] = 1e4
    masked = torch.randn(1, 900)
    masked[0, 1::2] = -torch.inf
    logits = torch.cat([very_negative, one_peak, masked]).requires_grad_()
    targets = torch.tensor([3, 7, 4])
    with use_backend(backend):
        logp, entropy = logprobs_from_logits(logits, targets, return_entropy=True)
        (gradient,) = torch.autograd.grad(logp.sum() + entropy.sum(), logits)
    truth = reference.logprobs_and_entropy(logits.detach().double(), targets)
    torch.testing.assert_close(logp.detach().double(), truth[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(entropy.detach().double(), truth[1], rtol=1e-6, atol=2e-6)
    assert torch.isfinite(gradient).all()
    assert gradient[2, 1::2].eq(0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_frozen_input_gets_no_gradient(backend: str, frozen: str) -> None:
    case = Case.make(12, 8, 100)
    hidden, weight = case.leaves()
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    with use_backend(backend):
        linear_logprobs(hidden, weight, case.targets).sum().backward()
    assert (hidden.grad is None, weight.grad is None) == (frozen == "hidden", frozen == "weight")


def test_tied_weight_gets_both_gradients() -> None:
    embedding = torch.nn.Embedding(50, 8)
    ids, targets = torch.randint(50, (6,)), torch.randint(50, (6,))
    linear_logprobs(embedding(ids), embedding.weight, targets).sum().backward()
    mine = embedding.weight.grad.clone()
    embedding.weight.grad = None
    torch.log_softmax(embedding(ids) @ embedding.weight.T, -1).gather(1, targets[:, None]).sum().backward()
    torch.testing.assert_close(mine, embedding.weight.grad, rtol=1e-5, atol=1e-6)


def test_gradcheck_of_the_reference() -> None:
    hidden, weight, bias = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((4, 5), (7, 5), (7,))
    )
    targets = torch.tensor([0, 3, 6, 3])

    def both(h: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return reference.linear_logprobs(h, w, targets, bias=b, temperature=0.7, softcap=2.0, logit_scale=1.3)

    assert torch.autograd.gradcheck(both, (hidden, weight, bias))


def test_gradcheck_of_the_operation() -> None:
    hidden, weight = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((4, 5), (7, 5)))
    targets = torch.tensor([0, 3, 6, 3])
    assert torch.autograd.gradcheck(
        lambda h, w: linear_logprobs(h, w, targets, softcap=3.0, return_entropy=True), (hidden, weight)
    )


@pytest.mark.skipif("cpu" not in BACKENDS, reason="needs the compiled core")
@pytest.mark.usefixtures("each_instruction_set")
def test_every_instruction_set() -> None:
    for name in ("everything", "confident", "one-word"):
        test_values_and_gradients(name, "cpu", torch.float32)
        test_values_and_gradients(name, "cpu", torch.bfloat16)


def test_more_rows_than_a_grid_dimension() -> None:
    logits = torch.randn(65_600, 3)
    targets = torch.randint(3, (65_600,))
    expected = torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(logprobs_from_logits(logits, targets), expected)
