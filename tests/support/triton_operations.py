"""Triton kernels through the public operations: on the GPU where there is one, otherwise in Triton's interpreter.

Not collected by its name: test_triton_interpreter.py runs it where there is no GPU, gpu/test_triton_gpu.py where there
is one. Shapes are small because the interpreter is slow.
"""

from __future__ import annotations

import warnings
from importlib import import_module

import pytest
import stride_cases
import torch
from ops_cases import CASES, OBJECTIVES, Case, assert_close_to_truth, plain_in
from torch import Tensor

from bandit_rft import (
    Sample,
    linear_logprobs,
    linear_policy_loss,
    linear_sample,
    logprobs_from_logits,
    policy_loss_from_logits,
    sample_from_logits,
)
from bandit_rft.ops import backends, head, reference, use_backend
from bandit_rft.ops.philox import gumbel_noise, random_words

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FILTERS = [{}, {"top_k": 1}, {"top_k": 7}, {"top_p": 0.6}, {"min_p": 0.05}, {"top_k": 40, "top_p": 0.9, "min_p": 0.01}]
TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])


@pytest.fixture(autouse=True)
def _triton():
    with warnings.catch_warnings(), use_backend("triton"):
        # numpy, in the interpreter, tells of infinities in lanes that a mask then drops.
        warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"triton\..*")
        yield


def on_device(value: object) -> object:
    return value.to(DEVICE) if isinstance(value, Tensor) else value


def head_case(name: str, dtype: torch.dtype) -> Case:
    return Case.make(**{**CASES[name], "n": min(CASES[name]["n"], 40)}, dtype=dtype)


@TYPES
@pytest.mark.parametrize("name", ["one-token", "one-word", "rows-temperature", "everything", "confident"])
def test_linear_logprobs_is_as_exact_as_pytorch(name: str, dtype: torch.dtype) -> None:
    case = head_case(name, dtype)
    leaves = [t.detach().to(DEVICE).requires_grad_() for t in case.leaves()]
    scaling = {k: on_device(v) for k, v in case.scaling.items()}
    bias = leaves[2] if case.bias is not None else None
    logp, entropy = linear_logprobs(
        leaves[0], leaves[1], case.targets.to(DEVICE), bias=bias, return_entropy=True, **scaling
    )
    pull = torch.randn(2, len(logp))

    def gradients(logp: Tensor, entropy: Tensor, of: list[Tensor]) -> list[Tensor]:
        c = pull.to(logp)
        return list(torch.autograd.grad((c[0] * logp + c[1] * entropy).sum(), of))

    got = [logp, entropy, *gradients(logp, entropy, leaves)]
    exact = case.leaves(torch.float64)
    truth = list(
        reference.linear_logprobs(
            exact[0], exact[1], case.targets, bias=exact[2] if case.bias is not None else None, **case.doubled_scaling()
        )
    )
    truth += gradients(*truth, exact)
    p_logp, p_entropy, *p_leaves = plain_in(case, dtype)
    plain = [p_logp, p_entropy, *gradients(p_logp, p_entropy, p_leaves)]
    floor = 2e-6 if dtype == torch.float32 else 4e-3  # a result rounded to bfloat16 is off by up to 2^-9 of itself
    for label, g, p, t in zip(["logp", "entropy", "dhidden", "dweight", "dbias"], got, plain, truth, strict=False):
        allowed = floor if label.startswith("d") else 2e-6
        assert_close_to_truth(label, g.detach().cpu(), p.detach(), t.detach(), allowed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("name", [n for n, o in OBJECTIVES.items() if o.kind != "reinforce" or o.kl_coef])
def test_policy_loss_and_gradients(name: str, dtype: torch.dtype) -> None:
    objective, case = OBJECTIVES[name], Case.make(24, 12, 301, temperature="rows", dtype=dtype)
    case.advantages[1] = 0.0

    def loss_and_gradients(leaves: list[Tensor]) -> list[Tensor]:
        case_on = {k: on_device(getattr(case, k)) for k in ("targets", "advantages", "cu_seqlens")}
        result = linear_policy_loss(
            *leaves, *case_on.values(), objective=objective, behavior_logprobs=case.behavior.to(DEVICE),
            reference_logprobs=case.reference.to(DEVICE), temperature=case.scaling["temperature"].to(DEVICE),
        )  # fmt: skip
        result.loss.backward()
        return [result.loss.detach(), *(leaf.grad for leaf in leaves)]

    got = loss_and_gradients([t.detach().to(DEVICE).requires_grad_() for t in case.leaves()])
    with use_backend("torch"):
        truth = loss_and_gradients([t.detach().to(DEVICE).requires_grad_() for t in case.leaves(torch.float64)])
    share = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]
    for label, g, t in zip(["loss", "dhidden", "dweight"], got, truth, strict=True):
        allowed = 2e-6 if label == "loss" else share  # of the largest: gradients are rounded, the loss is not
        torch.testing.assert_close(
            g.double(), t, rtol=10 * allowed, atol=allowed * max(1.0, t.abs().max().item()), msg=label
        )


@TYPES
def test_rows_of_logits(dtype: torch.dtype) -> None:
    logits = (torch.randn(9, 9001) * 4).to(dtype).to(DEVICE)  # more than one block of 8192
    logits[3] = -1e4
    logits[4, 1::2] = -torch.inf
    logits[5, 17] = 1e4
    targets = torch.tensor([0, 9000, 8191, 8192, 4, 17, 5, 6, 7], device=DEVICE)
    pull = torch.randn(2, 9, device=DEVICE)

    def statistics(z: Tensor, weights: Tensor) -> list[Tensor]:
        z = z.requires_grad_()
        logp, entropy = logprobs_from_logits(z, targets, return_entropy=True)
        return [logp, entropy, *torch.autograd.grad((weights[0] * logp + weights[1] * entropy).sum(), z)]

    got = statistics(logits.clone(), pull)
    with use_backend("torch"):
        truth = statistics(logits.double(), pull.double())
    for label, g, t in zip(["logp", "entropy"], got, truth, strict=False):
        torch.testing.assert_close(g.double(), t, rtol=2e-6, atol=4e-6, msg=label)
    assert got[2].dtype == dtype and torch.isfinite(got[2]).all() and got[2][4, 1::2].eq(0).all()
    # Half a unit in the last place of bfloat16, or (in the interpreter, which truncates) a whole one.
    tolerance = 1e-5 if dtype == torch.float32 else 4e-3 if DEVICE == "cuda" else 8e-3
    torch.testing.assert_close(got[2].double(), truth[2], rtol=tolerance, atol=tolerance * 0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("vocabulary", [2, 130, 8192, 16385, 40_001])
def test_a_narrow_gradient_over_its_own_logits(vocabulary: int, dtype: torch.dtype) -> None:
    """It is written where later threads and blocks have yet to read: the same bits as beside the logits."""
    policy_rows = import_module("bandit_rft.kernels.policy_rows")
    rows = 3 if DEVICE == "cpu" else 300
    logits = (torch.randn(rows, vocabulary) * 3).to(DEVICE)
    targets = torch.randint(vocabulary, (rows,)).to(DEVICE)
    given = torch.randn(2, rows).to(DEVICE)
    beside = torch.empty(rows, vocabulary, dtype=dtype, device=DEVICE)
    arguments = targets, 0.7, None, None, 1.3, *given
    statistics = policy_rows.gradient_rows(logits, *arguments, beside)
    over = head.narrow_gradient(logits, dtype)
    assert over is not None
    assert all(map(torch.equal, statistics, policy_rows.gradient_rows(logits, *arguments, over)))
    assert torch.equal(over, beside) and beside.any()


def stream(rows: int, seed: int = 11) -> dict[str, Tensor]:
    vectors = {"seed": torch.tensor(seed), "sequence_ids": torch.arange(rows) * 7919 * 2**30 - 5}
    return {k: v.to(DEVICE) for k, v in {**vectors, "positions": torch.arange(rows) % 5}.items()}


def expected(z: Tensor, arguments: dict[str, Tensor], **filters: float) -> tuple[Sample, Tensor]:
    """The reference's draw in float64, and where the winner is clearly ahead of the runner-up."""
    noise = gumbel_noise(random_words(*arguments.values(), z.shape[1]), z.dtype)
    perturbed = (z + noise).masked_fill(~reference.kept_tokens(z, **filters), -torch.inf)
    top = perturbed.topk(min(2, z.shape[1]), -1).values
    ahead = top[:, 0] - top[:, 1] if z.shape[1] > 1 else torch.full((len(z),), torch.inf, device=z.device)
    return reference.sample(z, **arguments, **filters), ahead > 1e-4


def assert_same_draw(got: Sample, want: Sample, clear: Tensor) -> None:
    assert clear.float().mean() > 0.7
    assert torch.equal(got.tokens[clear], want.tokens[clear])
    for name in ("logprobs", "sampling_logprobs", "entropy", "kept_mass"):
        g, w = getattr(got, name)[clear], getattr(want, name)[clear]
        torch.testing.assert_close(g.double(), w.double(), rtol=2e-5, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


@TYPES
@pytest.mark.parametrize("filters", [{}, {"top_k": 40, "top_p": 0.9, "min_p": 0.01}], ids=str)
def test_linear_sample_equals_the_reference(filters: dict[str, float], dtype: torch.dtype) -> None:
    rows, h, v = 17, 40, 803
    hidden, weight = torch.randn(rows, h).to(dtype).to(DEVICE), (torch.randn(v, h) * 0.5).to(dtype).to(DEVICE)
    bias, temperature = torch.randn(v).to(dtype).to(DEVICE), (torch.rand(rows) + 0.5).to(DEVICE)
    got = linear_sample(
        hidden, weight, bias=bias, temperature=temperature, softcap=10.0, logit_scale=1.5, **stream(rows), **filters
    )
    z = reference.scaled_logits(
        reference.head_logits(hidden.double(), weight.double(), bias.double()), temperature.double(), 10.0, 1.5
    )
    assert_same_draw(got, *expected(z, stream(rows), **filters))


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("v", [1, 2100])
def test_sample_rows_equal_the_reference(v: int, filters: dict[str, float]) -> None:
    z = (torch.randn(8, v) * 3).to(DEVICE)
    assert_same_draw(sample_from_logits(z, **stream(8), **filters), *expected(z.double(), stream(8), **filters))


@pytest.mark.parametrize("filters", [{"top_k": 3}, {"top_p": 0.3}, {"top_k": 5, "top_p": 0.5}], ids=str)
def test_ties_are_kept_by_the_lower_id(filters: dict[str, float]) -> None:
    z = torch.zeros(24, 10, device=DEVICE)
    z[:, 4] = -0.0
    want = reference.kept_tokens(z[:1].double(), **filters)[0].nonzero()[:, 0].tolist()
    drawn = sample_from_logits(z, **stream(24), **filters)
    assert sorted(set(drawn.tokens.tolist())) == want
    torch.testing.assert_close(drawn.kept_mass, torch.full((24,), len(want) / 10, device=DEVICE))


@TYPES
def test_sampling_and_scoring_give_the_same_bits(dtype: torch.dtype) -> None:
    case = head_case("everything", dtype)
    hidden, weight, bias = (on_device(t) for t in (case.hidden, case.weight, case.bias))
    scaling = {k: on_device(v) for k, v in case.scaling.items()}
    drawn = linear_sample(hidden, weight, bias=bias, **stream(len(hidden)), **scaling)
    logp, entropy = linear_logprobs(hidden, weight, drawn.tokens, bias=bias, return_entropy=True, **scaling)
    assert torch.equal(drawn.logprobs, logp) and torch.equal(drawn.entropy, entropy)


def test_random_words_are_those_of_every_backend() -> None:
    import triton
    import triton.language as tl
    from bandit_rft.kernels.philox import gumbel_noise as device_noise
    from bandit_rft.kernels.philox import random_words as device_words

    # A kernel finds what it calls among its module's names.
    globals().update(device_words=device_words, device_noise=device_noise, tl=tl)

    @triton.jit
    def words_kernel(seed, sequences, positions, words, noise, ROWS: tl.constexpr, TOKENS: tl.constexpr):
        row = tl.arange(0, ROWS)
        word = device_words(
            tl.load(seed), tl.load(sequences + row), tl.load(positions + row), TOKENS, ROWS, TOKENS
        )  # the second tile: ids TOKENS ... 2 TOKENS - 1
        at = row[:, None] * TOKENS + tl.arange(0, TOKENS)[None, :]
        tl.store(words + at, word.to(tl.int64))
        tl.store(noise + at, device_noise(word))

    seed = torch.tensor(-0x123456789ABCDEF, device=DEVICE)
    sequences = torch.tensor([0, 1, -1, 2**62 + 12345], device=DEVICE)
    positions = torch.tensor([0, 7, 2**32 - 1, 2**31], device=DEVICE)
    words = torch.empty((4, 256), dtype=torch.int64, device=DEVICE)
    noise = torch.empty((4, 256), device=DEVICE)
    words_kernel[(1,)](seed, sequences, positions, words, noise, ROWS=4, TOKENS=256, enable_fp_fusion=False)
    want = random_words(seed, sequences, positions, 512)[:, 256:]
    assert torch.equal(words, want)
    torch.testing.assert_close(noise.double(), gumbel_noise(want, torch.float64), rtol=1e-6, atol=1e-6)


def test_a_target_out_of_range_gives_nan_not_a_number() -> None:
    from bandit_rft.kernels.linear_logprobs import linear_logprobs as fused
    from bandit_rft.kernels.policy_rows import logprob_rows

    targets = torch.tensor([0, -1, 70, 69], device=DEVICE)
    hidden, weight = torch.randn(4, 8, device=DEVICE), torch.randn(70, 8, device=DEVICE)
    for logp, entropy in (fused(hidden, weight, targets), logprob_rows(hidden @ weight.T, targets, 1.0, None, None, 1)):
        assert torch.isnan(logp).tolist() == [False, True, True, False]
        assert torch.isfinite(entropy).all()


def test_a_nan_logit_is_never_hidden() -> None:
    z = torch.randn(4, 300, device=DEVICE)
    z[1, 5], z[2, 7], z[3] = torch.nan, torch.inf, -torch.inf
    logp, entropy = logprobs_from_logits(z, torch.zeros(4, dtype=torch.int64, device=DEVICE), return_entropy=True)
    drawn = sample_from_logits(z, **stream(4))
    for statistic in (logp, entropy, drawn.logprobs, drawn.entropy):
        assert torch.isfinite(statistic).tolist() == [True, False, False, False]


def test_no_rows() -> None:
    hidden, weight = torch.randn(0, 8, device=DEVICE), torch.randn(70, 8, device=DEVICE)
    assert linear_logprobs(hidden, weight, torch.zeros(0, dtype=torch.int64, device=DEVICE)).shape == (0,)
    assert linear_sample(hidden, weight, **stream(0)).tokens.shape == (0,)
    assert sample_from_logits(hidden, **stream(0)).tokens.shape == (0,)


def test_a_small_workspace_changes_no_bit() -> None:
    from bandit_rft.kernels.linear_logprobs import linear_logprobs as fused

    hidden, weight = torch.randn(300, 8, device=DEVICE), torch.randn(130, 8, device=DEVICE)
    targets = torch.randint(130, (300,), device=DEVICE)
    whole, parts = fused(hidden, weight, targets), fused(hidden, weight, targets, workspace=1)  # 256 rows, then 44
    if DEVICE == "cuda":
        assert torch.equal(whole[0], parts[0]) and torch.equal(whole[1], parts[1])
    else:  # numpy's product may sum in another order for another shape
        torch.testing.assert_close(whole, parts)


def test_who_serves() -> None:
    """The interpreter is never chosen, only forced; what Triton cannot read is refused by name."""
    with pytest.raises(ValueError, match="float64"):
        backends.select(torch.device(DEVICE), torch.float64)
    token = backends._forced.set(None)
    try:
        assert backends.select(torch.device("cpu"), torch.float16) == "torch"
        assert backends.fusing(torch.device("cpu"), torch.float32) is None

    finally:
        backends._forced.reset(token)


def views_of(tensor: Tensor) -> dict[str, Tensor]:
    """The same values behind other strides and offsets; -7 fills what is skipped, which no argument may be."""
    filler = torch.full((3 * tensor.numel() + 7,), -7, dtype=tensor.dtype, device=tensor.device)
    offset = filler[1 : 1 + tensor.numel()].view(tensor.shape).copy_(tensor)
    wide = torch.full((*tensor.shape, 2), -7, dtype=tensor.dtype, device=tensor.device)
    wide[..., 1] = tensor
    found = {"offset": offset, "strided": wide[..., 1]}
    if tensor.dim() == 2:
        found["transposed"] = tensor.T.contiguous().T
        padded = torch.full((len(tensor), tensor.shape[1] + 3), -7, dtype=tensor.dtype, device=tensor.device)
        padded[:, 1:-2] = tensor
        found["padded"] = padded[:, 1:-2]
    return found


OPERATIONS = {
    "linear_logprobs": ("hidden", "weight", "targets", "bias", "temperature"),
    "linear_sample": ("hidden", "weight", "sequence_ids", "positions", "bias", "temperature"),
    "linear_sample, filtered": ("hidden", "weight", "sequence_ids", "positions", "bias", "temperature"),
    "logprobs_from_logits": ("logits", "targets", "temperature"),
    "sample_from_logits": ("logits", "sequence_ids", "positions", "temperature"),
    "linear_policy_loss": (
        "hidden", "weight", "targets", "advantages", "cu_seqlens", "behavior_logprobs", "reference_logprobs", "bias",
        "temperature",
    ),
}  # fmt: skip


def arguments_of(operation: str) -> dict[str, Tensor]:
    n, h, v = 6, 8, 70
    values: dict[str, Tensor] = {
        "hidden": torch.randn(n, h), "weight": torch.randn(v, h), "bias": torch.randn(v), "logits": torch.randn(n, v),
        "targets": torch.randint(v, (n,)), "temperature": torch.rand(n) + 0.5, "sequence_ids": torch.arange(n) + 3,
        "positions": torch.arange(n) * 2, "advantages": torch.randn(n), "cu_seqlens": torch.tensor([0, 2, n]),
        "behavior_logprobs": -torch.rand(n) - 3, "reference_logprobs": -torch.rand(n) - 3,
    }  # fmt: skip
    return {name: values[name].to(DEVICE) for name in OPERATIONS[operation]}


def results_of(operation: str, given: dict[str, Tensor], factor: float = 1.0) -> list[Tensor]:
    """Of one call, with the gradients of a loss times `factor`."""
    if "logprobs" in operation:
        function = linear_logprobs if operation.startswith("linear") else logprobs_from_logits
        return list(function(**given, return_entropy=True))
    if operation == "linear_policy_loss":
        given = {k: t.detach().requires_grad_(k in ("hidden", "weight", "bias")) for k, t in given.items()}
        objective = OBJECTIVES["ppo-kl3-entropy"]
        result = linear_policy_loss(**given, objective=objective)
        (factor * result.loss).backward()
        return [result.loss.detach(), result.logprobs, *(t.grad for t in given.values() if t.grad is not None)]
    filters = {"top_k": 9} if "filtered" in operation else {}
    function = linear_sample if operation.startswith("linear") else sample_from_logits
    return list(function(**given, seed=3, **filters))


@pytest.mark.parametrize("operation", stride_cases.OPERATIONS)
def test_any_strides_are_accepted(operation: str) -> None:
    """Every argument behind every view, and expanded: the values decide, never how they lie."""
    stride_cases.check_any_strides(operation, DEVICE)
    stride_cases.check_expanded(operation, DEVICE)


def test_row_kernels_take_any_strides_themselves() -> None:
    from bandit_rft.kernels.policy_rows import gradient_rows, logprob_rows
    from bandit_rft.kernels.sample_rows import sample_rows

    z, targets = torch.randn(5, 70, device=DEVICE), torch.randint(70, (5,), device=DEVICE)
    given = torch.randn(2, 5, device=DEVICE)
    ids = torch.arange(5, device=DEVICE)
    seed = torch.tensor(3, device=DEVICE)
    gradient = z.clone()
    gradient_rows(gradient, targets, 1.0, None, None, 1.0, given[0], given[1])
    for how, view in views_of(z).items():
        scored, drawn = (
            logprob_rows(z, targets, 1.0, None, None, 1.0),
            logprob_rows(view, targets, 1.0, None, None, 1.0),
        )
        torch.testing.assert_close(drawn, scored, msg=how)
        arguments = (1.0, None, None, 1.0, seed, ids, ids, 0, 1.0, 0.0)
        torch.testing.assert_close(sample_rows(view, *arguments), sample_rows(z, *arguments), msg=how)
        gradient_rows(view, targets, 1.0, None, None, 1.0, given[0], given[1])
        torch.testing.assert_close(view, gradient, msg=how)


def test_every_launch_is_on_the_tensors_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current device; that must be the tensors', not the process's first."""
    from contextlib import contextmanager
    from importlib import import_module

    import triton

    from bandit_rft import kernels

    entered: list[torch.device] = []
    launches: list[str] = []

    @contextmanager
    def device(of):
        entered.append(of.device)
        yield
        entered.pop()

    class Guarded:
        def __init__(self, name, kernel):
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid):
            def launch(*arguments, **options):
                assert entered, f"{self.name} was launched on whatever device is current"
                launches.append(self.name)
                return self.kernel[grid](*arguments, **options)

            return launch

    modules = [import_module(f"bandit_rft.kernels.{name}") for name in KERNEL_MODULES]
    for module in modules:
        if hasattr(module, "on_device_of"):
            monkeypatch.setattr(module, "on_device_of", device)
        for name, found in vars(module).copy().items():
            if isinstance(found, triton.runtime.KernelInterface) and name in LAUNCHED:
                monkeypatch.setattr(module, name, Guarded(name, found))
    for operation in OPERATIONS:
        results_of(operation, arguments_of(operation), factor=2.0)
    assert set(launches) == LAUNCHED
    monkeypatch.undo()
    seen = []
    monkeypatch.setattr(torch.cuda, "device", seen.append)
    kernels.on_device_of(type("OnSecond", (), {"is_cuda": True, "device": torch.device("cuda:1")})())
    assert seen == [torch.device("cuda:1")]


KERNEL_MODULES = ("head_tile", "linear_logprobs", "linear_sample", "policy_rows", "sample_rows", "scale_gradient")
LAUNCHED = {"score_tiles", "merge_tiles", "draw_tiles", "visit_rows", "draw_rows", "scale_all"}


def test_the_capability_is_that_of_the_asked_device(monkeypatch: pytest.MonkeyPatch) -> None:
    from bandit_rft import kernels

    of = {0: (9, 0), 1: (7, 5)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: of[index])
    kernels._capability.cache_clear()
    try:
        assert kernels.refusal("cuda", torch.bfloat16, 0) is None
        assert "7.5" in str(kernels.refusal("cuda", torch.bfloat16, 1))
        call = backends.Call("cuda", torch.bfloat16, 1)
        assert "7.5" in str(backends._triton_refusal(call))
    finally:
        kernels._capability.cache_clear()


def kernels_of_the_head():
    from bandit_rft.kernels import head_tile, linear_logprobs, linear_sample

    return head_tile, linear_logprobs, linear_sample


@pytest.mark.parametrize("rows,h,v", [(1, 64, 129), (8, 72, 128), (40, 41, 300), (70, 40, 515)])
def test_ragged_shapes_through_descriptors_and_pointers(
    rows: int, h: int, v: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles of few rows and of many; the same bits whether a bulk copy or pointers brought the operands."""
    head_tile, linear_logprobs, linear_sample = kernels_of_the_head()
    if DEVICE == "cpu":  # numpy sums 128 numbers in another order than twice 64; a GPU takes 16 at a time, ascending
        same = [(most, tile._replace(BLOCK_H=64), persistent) for most, tile, persistent in head_tile.DRAWING]
        monkeypatch.setattr(head_tile, "DRAWING", same)
    hidden, weight = torch.randn(rows, h).bfloat16().to(DEVICE), (torch.randn(v, h) * 0.4).bfloat16().to(DEVICE)
    z = hidden.double() @ weight.double().T
    want, clear = expected(z, stream(rows))
    drawn = Sample(*linear_sample.linear_sample(hidden, weight, **stream(rows)))
    assert_same_draw(drawn, want, clear)
    scored = linear_logprobs.linear_logprobs(hidden, weight, drawn.tokens)
    assert torch.equal(scored[0], drawn.logprobs) and torch.equal(scored[1], drawn.entropy)
    aligned = DEVICE == "cpu" or torch.cuda.get_device_capability() >= (9, 0)
    assert head_tile.describable(hidden, 90) == (h % 8 == 0) and aligned in (True, False)
    for how, view in views_of(weight).items():
        # A view that starts off the 16-byte grid, or has such rows, is read through pointers.
        again = Sample(*linear_sample.linear_sample(hidden, view, **stream(rows)))
        for name, a, b in zip(Sample._fields, again, drawn, strict=True):
            assert torch.equal(a, b), f"{how}: {name}"


def test_a_column_with_rivals_is_drawn_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a margin that every column is within, the exact branch draws; its draws are the same."""
    if DEVICE != "cpu":
        pytest.skip("a compiled kernel keeps its margin")
    import triton.language as tl

    _, _, linear_sample = kernels_of_the_head()
    hidden, weight = torch.randn(5, 16), torch.randn(200, 16)
    approximately = linear_sample.linear_sample(hidden, weight, **stream(5))
    monkeypatch.setattr(linear_sample, "MARGIN", tl.constexpr(1e4))
    exactly = linear_sample.linear_sample(hidden, weight, **stream(5))
    assert all(torch.equal(a, b) for a, b in zip(approximately, exactly, strict=True))


def test_nothing_is_filled_or_copied_around_a_draw() -> None:
    """One buffer of results, states and winners; no pass of PyTorch's over them."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: list[str] = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            seen.append(function.overloadpacket.__name__)
            return function(*arguments, **(options or {}))

    _, linear_logprobs, linear_sample = kernels_of_the_head()
    hidden, weight = torch.randn(5, 16, device=DEVICE), torch.randn(200, 16, device=DEVICE)
    targets = torch.randint(200, (5,), device=DEVICE)
    arguments = stream(5)
    for module, function in (
        (linear_sample, lambda: linear_sample.linear_sample(hidden, weight, **arguments)),
        (linear_logprobs, lambda: linear_logprobs.linear_logprobs(hidden, weight, targets)),
    ):
        kernels = [name for name in ("draw_tiles", "score_tiles") if hasattr(module, name)]
        launched = {name: getattr(module, name) for name in kernels}
        merge = module.launch_merge
        try:
            for name in kernels:
                setattr(module, name, {(n,): lambda *a, **k: None for n in range(1, 4096)})
            module.launch_merge = lambda *a, **k: None
            with Seen():
                function()
        finally:
            for name, kernel in launched.items():
                setattr(module, name, kernel)
            module.launch_merge = merge
    writes = set(seen) - {"empty", "slice", "select", "unbind", "detach", "alias", "view"}
    assert not writes, writes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_gradient_is_scaled_in_place_unless_by_one(dtype: torch.dtype) -> None:
    from bandit_rft.kernels.scale_gradient import BLOCK, scale_

    for count in (0, 1, BLOCK + 5, 3 * BLOCK):
        given = torch.randn(count, device=DEVICE).to(dtype)
        for factor in (1.0, 0.5, -2.0, 0.0):
            gradient = given.clone()
            version = gradient._version
            assert scale_(gradient, torch.tensor(factor, device=DEVICE)) is gradient
            assert torch.equal(gradient, given * factor) and gradient._version > version
    gradient = torch.ones(4, device=DEVICE).to(dtype)
    assert torch.isnan(scale_(gradient, torch.tensor(torch.nan, device=DEVICE))).all()
    strided = torch.ones(4, 6, device=DEVICE).to(dtype).T
    assert torch.equal(scale_(strided, torch.tensor(3.0, device=DEVICE)), torch.full_like(strided, 3.0))


@TYPES
def test_the_loss_scales_its_gradients_with_that_kernel(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scaled loss gives scaled gradients, each in one call of the kernel; so do the other backends, without it."""
    from bandit_rft.kernels import scale_gradient

    launch, calls = scale_gradient.scale_, []
    monkeypatch.setattr(scale_gradient, "scale_", lambda *a: calls.append(a[0].shape) or launch(*a))
    case = head_case("bias", dtype)
    found = {}
    for factor, backend in ((1.0, "triton"), (-2.0, "triton"), (-2.0, "torch")):
        calls.clear()
        leaves = [t.detach().to(DEVICE).requires_grad_() for t in case.leaves()]
        rest = [on_device(t) for t in (case.targets, case.advantages, case.cu_seqlens)]
        logits = torch.randn(len(case.hidden), 50, generator=torch.Generator().manual_seed(1))
        logits = logits.to(DEVICE, dtype).requires_grad_()
        with use_backend(backend):
            first = linear_policy_loss(*leaves[:2], *rest, objective=OBJECTIVES["reinforce"], bias=leaves[2]).loss
            second = policy_loss_from_logits(logits, rest[0] % 50, *rest[1:], objective=OBJECTIVES["reinforce"]).loss
        (factor * first).backward()  # outside: the choice was made with the loss
        (factor * second).backward()
        found[factor, backend] = [t.grad for t in (*leaves, logits)]
        # A CPU's factor is seen by the host, so 1 asks nothing of the kernel there.
        kernel = backend == "triton" and (factor != 1 or DEVICE != "cpu")
        assert sorted(calls) == (sorted(t.shape for t in (*leaves, logits)) if kernel else [])
    for one, two, plain in zip(*found.values(), strict=True):
        assert torch.equal(two, one * -2)
        torch.testing.assert_close(two, plain, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["given", "reinforce"])
def test_rows_whose_target_cannot_be_drawn_have_finite_gradients(kind: str) -> None:
    """A target's logit of -inf: log-probability -inf; the entropy's gradient as well is finite."""
    from bandit_rft.kernels.policy_rows import gradient_rows, policy_rows

    n, v = 3, 300
    z, targets = torch.randn(n, v), torch.tensor([7, 8, 299])
    z[range(n), targets] = -torch.inf
    rows, first, second = z.clone().to(DEVICE), torch.tensor([1.0, 2.0, -0.5]), torch.tensor([0.5, 1.0, 2.0])
    arguments = (rows, targets.to(DEVICE), 1.0, None, None, 1.0)
    if kind == "given":
        logp, _ = gradient_rows(*arguments, first.to(DEVICE), second.to(DEVICE))
        c, e = first.double(), -second.double()
    else:
        inputs = (first.to(DEVICE), second.to(DEVICE), None, None)
        logp, _ = policy_rows(*arguments, 1, 0.8, 1.2, 0.0, 0, 0.0, 0.25, *inputs)
        c, e = -first.double() * second, 0.25 * second.double()
    assert torch.equal(logp.cpu(), torch.full((n,), -torch.inf))
    p, finite = torch.softmax(z.double(), -1), torch.log_softmax(z.double(), -1).nan_to_num(neginf=0.0)
    of_entropy = p * (finite - (p * finite).sum(-1, keepdim=True))
    hot = torch.nn.functional.one_hot(targets, v)
    want = c[:, None] * (hot - p) + e[:, None] * of_entropy
    torch.testing.assert_close(rows.cpu().double(), want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("level", [-3e38, -1e31, -1e9, 1e9, 1e31, 1e38])
def test_rows_far_from_zero(level: float) -> None:
    """A softmax does not mind where its logits lie: as many likeliest tokens as there are share it."""
    from bandit_rft.kernels.policy_rows import logprob_rows

    z = torch.full((2, 300), level, device=DEVICE)
    z[:, 40:] = -torch.inf
    z[0, 40:290] = torch.finfo(torch.float32).min
    logp, entropy = logprob_rows(z, torch.tensor([3, 39], device=DEVICE), 1.0, None, None, 1.0)
    for found in (-logp, entropy):
        torch.testing.assert_close(found, torch.full_like(found, 40.0).log())


@pytest.mark.parametrize("name", ["ppo", "ppo-kl3-entropy", "gspo"])
def test_targets_that_are_not_counted(name: str) -> None:
    """A target of -100: loss, gradients and log-probabilities are those of the call without these tokens."""
    case, counted = Case.make(24, 12, 301), torch.arange(24) % 3 != 1
    lengths = torch.stack([part.sum() for part in counted.split(case.cu_seqlens.diff().tolist())])
    without = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()

    def everything(rows: Tensor, targets: Tensor, cu_seqlens: Tensor) -> list[Tensor]:
        hidden, weight = (t.detach().to(DEVICE).requires_grad_() for t in (case.hidden[rows], case.weight))
        told = [t.to(DEVICE) for t in (targets[rows], case.advantages, cu_seqlens)]
        old, initial = case.behavior[rows].to(DEVICE), case.reference[rows].to(DEVICE)
        options = {"objective": OBJECTIVES[name], "behavior_logprobs": old, "reference_logprobs": initial}
        result = linear_policy_loss(hidden, weight, *told, **options)
        of_logits = policy_loss_from_logits(hidden @ weight.T, *told, **options)
        logp = linear_logprobs(hidden, weight, told[0])
        (result.loss + of_logits.loss + logp.sum()).backward()
        return [result.loss.detach(), of_logits.loss.detach(), weight.grad, hidden.grad, result.logprobs, logp.detach()]

    every = torch.ones_like(counted)
    got = everything(every, case.targets.masked_fill(~counted, -100), case.cu_seqlens)
    want = everything(counted, case.targets, without)
    assert all(not per_token[~counted].any() for per_token in got[3:])
    got[3:] = [per_token[counted] for per_token in got[3:]]
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=2e-5, atol=2e-6)
