"""The CUDA kernels' own source, run on a CPU by an emulation of a GPU's blocks, clusters, barriers and shuffles.

No GPU and no nvcc: csrc/cuda/*.cu is compiled by the host's compiler (tests/native/device_emulation.h) and held to the
reference in float64. Every case runs with the threads scheduled both ways round, so that a missing barrier shows.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ops_cases import OBJECTIVES, assert_close_to_truth
from torch import Tensor

from bandit_rft.ops import PolicyObjective, reference
from bandit_rft.ops.objective import token_coefficients

pytestmark = pytest.mark.slow  # emulation of a GPU

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
SM_80 = (8, 166912, 167936)  # major, shared memory bytes a block and a multiprocessor
SM_90 = (9, 232448, 233472)
#: Tiny shared memories make short rows take the paths of long ones: clusters, and rows that do not fit.
DEVICES = {
    "sm_80": SM_80,
    "sm_90": SM_90,
    "cluster": (9, 6000, 7000),
    "overflowing-cluster": (9, 4620, 9000),  # no span
    "overflowing-block": (8, 4620, 9000),
    "cluster-with-room": (9, 12000, 15500),  # two spans a block
    "partly-cached-block": (8, 8900, 9000),  # three spans
}
#: The same for filters, which take 70 KiB for themselves.
FILTERING = {
    "sm_80": SM_80,
    "sm_90": SM_90,
    "sm_120": (12, 101376, 102400),  # no room for two blocks: clusters of eight with a span or two each
    "cluster": (9, 90000, 150000),
    "partly-cached-block": (8, 76000, 80000),  # two spans
}


class Logits(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p), ("dtype", ctypes.c_int), ("count", ctypes.c_int64), ("vocabulary", ctypes.c_int64),
        ("stride", ctypes.c_int64), ("logit_scale", ctypes.c_float), ("softcap", ctypes.c_float),
        ("temperature", ctypes.c_float), ("temperatures", ctypes.c_void_p),
    )  # fmt: skip


@pytest.fixture(scope="module")
def kernels(emulated_cuda: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(emulated_cuda))
    for name in ("logprob_rows", "policy_rows", "sample_rows"):
        getattr(loaded, name).restype = ctypes.c_char_p
    loaded.exp2_approximate.restype = ctypes.c_float
    return loaded


def emulated(kernels: ctypes.CDLL, limits: tuple[int, int, int], order: str) -> Iterator[ctypes.CDLL]:
    """The kernels on a device with these limits, its threads scheduled `forwards` or `backwards`."""
    kernels.use_device(*limits, 64, ctypes.c_bool(order == "backwards"))
    yield kernels
    kernels.use_device(*SM_90, 64, ctypes.c_bool(False))


ORDERS = "forwards", "backwards"


@pytest.fixture(params=itertools.product(DEVICES, ORDERS), ids="-".join)
def device(request: pytest.FixtureRequest, kernels: ctypes.CDLL) -> Iterator[ctypes.CDLL]:
    yield from emulated(kernels, DEVICES[request.param[0]], request.param[1])


@pytest.fixture(params=itertools.product(FILTERING, ORDERS), ids="-".join)
def filtering(request: pytest.FixtureRequest, kernels: ctypes.CDLL) -> Iterator[ctypes.CDLL]:
    yield from emulated(kernels, FILTERING[request.param[0]], request.param[1])


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def argument(z: Tensor, scaling: dict[str, Any]) -> Logits:
    t = scaling.get("temperature", 1.0)
    return Logits(
        z.data_ptr(), DTYPES[z.dtype], z.shape[0], z.shape[1], z.stride(0), scaling.get("logit_scale", 1.0),
        scaling.get("softcap") or 0.0, 1.0 if isinstance(t, Tensor) else t,
        pointer(t).value if isinstance(t, Tensor) else None,
    )  # fmt: skip


def raise_if(error: bytes | None) -> None:
    if error is not None:
        raise ValueError(error.decode())


def place(values: Tensor, offset: int, pad: int) -> Tensor:
    """The same rows, `offset` elements into an allocation and `pad` elements apart."""
    n, v = values.shape
    room = torch.full((offset + n * (v + pad) + 8,), 3.0, dtype=values.dtype)
    rows = room[offset : offset + n * (v + pad)].view(n, v + pad)[:, :v]
    rows.copy_(values)
    return rows


#: rows, V, elements before the first row, elements between rows, scaling
SHAPES = [
    (3, 1, 0, 0, {}),
    (2, 3, 1, 2, {"temperature": 0.7}),
    (3, 769, 3, 0, {"softcap": 5.0}),
    (2, 4096, 0, 0, {"temperature": "rows", "logit_scale": -0.5}),
    (2, 2501, 5, 6, {"temperature": 1.3, "softcap": 8.0, "logit_scale": 0.5}),
]


def problem(shape: tuple[Any, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, dict[str, Any]]:
    n, v, offset, pad, scaling = shape
    g = torch.Generator().manual_seed(n * v)
    z = place((torch.randn(n, v, generator=g) * 4).to(dtype), offset, pad)
    scaling = dict(scaling)
    if scaling.get("temperature") == "rows":
        scaling["temperature"] = torch.rand(n, generator=g) + 0.5
    return z, torch.randint(v, (n,), generator=g), scaling


def scaled(z: Tensor, scaling: dict[str, Any]) -> Tensor:
    t = scaling.get("temperature", 1.0)
    t = t.to(z.dtype) if isinstance(t, Tensor) else t
    return reference.scaled_logits(z, t, scaling.get("softcap"), scaling.get("logit_scale", 1.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logprobs(device: ctypes.CDLL, shape: tuple[Any, ...], dtype: torch.dtype) -> None:
    z, targets, scaling = problem(shape, dtype)
    logp, entropy = torch.empty(len(z)), torch.empty(len(z))
    before = z.clone()
    raise_if(device.logprob_rows(argument(z, scaling), pointer(targets), pointer(logp), pointer(entropy)))
    assert torch.equal(z, before)
    truth = reference.logprobs_and_entropy(scaled(z.double(), scaling), targets)
    plain = reference.logprobs_and_entropy(scaled(z.float(), scaling), targets)
    for name, got, p, t in zip(("logp", "entropy"), (logp, entropy), plain, truth, strict=True):
        assert_close_to_truth(name, got, p, t)


GRADIENTS = ["in place", "other memory", "overlaid bf16", "overlaid f16", "bf16"]


@pytest.mark.parametrize("where", GRADIENTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients(device: ctypes.CDLL, shape: tuple[Any, ...], where: str) -> None:
    dtype = torch.bfloat16 if where == "bf16" else torch.float32
    z, targets, scaling = problem(shape, dtype)
    n, v = z.shape
    if where.startswith("overlaid"):
        z = place(z, 0, 0)  # rows without a gap: the half of a row is then the half of its memory
        narrow = torch.bfloat16 if where.endswith("bf16") else torch.float16
        gradient = z.view(narrow)[:, v:]
    else:
        gradient = torch.full((n, v + 3), 7.0)[:, :v] if where == "other memory" else z
    original = z.clone()
    given, of_entropy = torch.randn(n), torch.randn(n)
    logp, entropy = torch.empty(n), torch.empty(n)
    raise_if(
        device.policy_rows(
            argument(z, scaling), pointer(targets), 0, *[ctypes.c_float(0)] * 3, 0, *[ctypes.c_float(0)] * 2,
            pointer(given), pointer(of_entropy), None, None, pointer(gradient), DTYPES[gradient.dtype],
            ctypes.c_int64(gradient.stride(0)), pointer(logp), pointer(entropy),
        )
    )  # fmt: skip

    def differentiated(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        x = original.to(dtype).requires_grad_()
        logp, entropy = reference.logprobs_and_entropy(scaled(x, scaling), targets)
        ((logp * given.to(dtype)).sum() + (entropy * of_entropy.to(dtype)).sum()).backward()
        assert x.grad is not None
        return logp.detach(), entropy.detach(), x.grad

    truth, plain = differentiated(torch.float64), differentiated(torch.float32)
    assert_close_to_truth("logp", logp, plain[0], truth[0])
    assert_close_to_truth("entropy", entropy, plain[1], truth[1])
    assert_close_to_truth("dz", gradient, plain[2].to(gradient.dtype), truth[2])


@pytest.mark.parametrize("name", [n for n in OBJECTIVES if not n.startswith("gspo")])
def test_objectives(kernels: ctypes.CDLL, name: str) -> None:
    o: PolicyObjective = OBJECTIVES[name]
    n, v = 6, 700
    z, targets = torch.randn(n, v) * 3, torch.randint(v, (n,))
    truth_logp, truth_entropy = reference.logprobs_and_entropy(z.double(), targets)
    advantages, weights = torch.randn(n), torch.rand(n)
    advantages[2] = 0
    behavior, ref = ((truth_logp + 0.4 * torch.randn(n)).float() for _ in range(2))
    low, high = (o.importance_floor, o.importance_cap) if o.weighs_sampler else (1 - o.clip_low, 1 + o.clip_high)
    kind = ["", "reinforce", "importance", "ppo", "cispo", "importance_mask"].index(o.kind)
    kl = ["none", "k1", "k2", "k3"].index(o.kl)
    logp, entropy, gradient = torch.empty(n), torch.empty(n), z.clone()
    raise_if(
        kernels.policy_rows(
            argument(gradient, {}), pointer(targets), kind,
            *map(ctypes.c_float, (low, high, o.dual_clip or 0.0)), kl,
            *map(ctypes.c_float, (o.kl_coef, o.entropy_coef)),
            *map(pointer, (advantages, weights, behavior, ref)), None, 0, ctypes.c_int64(0),
            pointer(logp), pointer(entropy),
        )
    )  # fmt: skip
    nowhere = torch.empty(0, dtype=torch.int64)
    doubles = (t.double() for t in (truth_logp, advantages, weights, behavior, ref))
    c = token_coefficients(o, *doubles, nowhere, nowhere)
    every = torch.log_softmax(z.double(), -1)
    hot = torch.nn.functional.one_hot(targets, v)
    e = (o.entropy_coef * weights.double())[:, None]
    truth = c[:, None] * (hot - every.exp()) + e * every.exp() * (every + truth_entropy[:, None])
    torch.testing.assert_close(gradient.double(), truth, rtol=2e-4, atol=1e-6)
    assert torch.equal(gradient[2] == 0, torch.ones(v, dtype=torch.bool)) or o.every_token_counts


FILTERS = [{"top_k": 1}, {"top_k": 7}, {"top_p": 0.6}, {"min_p": 0.05}, {"top_k": 40, "top_p": 0.9, "min_p": 0.01}]


def drawn(device: ctypes.CDLL, z: Tensor, scaling: dict[str, Any], filters: dict[str, float]) -> tuple[Tensor, ...]:
    n = len(z)
    seed, sequences, positions = torch.tensor(-12345), torch.arange(n) * 2**33 + 7, torch.arange(n) % 3
    out = (torch.empty(n, dtype=torch.int64), *(torch.empty(n) for _ in range(4)))
    raise_if(
        device.sample_rows(
            argument(z, scaling), *map(pointer, (seed, sequences, positions)),
            ctypes.c_int64(int(filters.get("top_k", 0))), ctypes.c_double(filters.get("top_p", 1.0)),
            ctypes.c_float(filters.get("min_p", 0.0)), *map(pointer, out),
        )
    )  # fmt: skip
    want = reference.sample(
        scaled(z.double(), scaling), seed=seed, sequence_ids=sequences, positions=positions, **filters
    )
    assert torch.equal(out[0], want.tokens)
    for name, got, truth in zip(want._fields[1:], out[1:], want[1:], strict=True):
        torch.testing.assert_close(got.double(), truth, rtol=2e-5, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
    return out


def drawn_tokens(device: ctypes.CDLL, z: Tensor, scaling: dict[str, Any]) -> None:
    """As `drawn`, with the tokens alone compared."""
    n = len(z)
    seed, sequences, positions = torch.tensor(99), torch.arange(n), torch.arange(n) * 5
    out = (torch.empty(n, dtype=torch.int64), *(torch.empty(n) for _ in range(4)))
    raise_if(
        device.sample_rows(
            argument(z, scaling), *map(pointer, (seed, sequences, positions)), ctypes.c_int64(0), ctypes.c_double(1.0),
            ctypes.c_float(0.0), *map(pointer, out),
        )
    )  # fmt: skip
    want = reference.sample(scaled(z, scaling), seed=seed, sequence_ids=sequences, positions=positions)
    assert torch.equal(out[0], want.tokens)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_draws(device: ctypes.CDLL, shape: tuple[Any, ...]) -> None:
    z, _, scaling = problem(shape, torch.float32)
    drawn(device, z, scaling, {})


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_filtered_draws(filtering: ctypes.CDLL, shape: tuple[Any, ...], filters: dict[str, float]) -> None:
    z, _, scaling = problem(shape, torch.float32)
    drawn(filtering, z, scaling, filters)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("filters", [{}, {"top_k": 9, "top_p": 0.8}], ids=str)
def test_draws_from_narrow_logits(kernels: ctypes.CDLL, dtype: torch.dtype, filters: dict[str, float]) -> None:
    z, _, scaling = problem(SHAPES[4], dtype)
    drawn(kernels, z, scaling, filters)


@pytest.mark.parametrize("filters", [{"top_k": 5}, {"top_p": 0.3}, {"top_k": 300, "top_p": 0.5}], ids=str)
def test_equal_logits_are_kept_by_id(filtering: ctypes.CDLL, filters: dict[str, float]) -> None:
    z = torch.tensor([0.0, -0.0, 1.0, -torch.inf])[torch.randint(4, (2, 1000))]
    drawn(filtering, z, {}, filters)


def crowded(how: str) -> Tensor:
    """Two rows of 6,000 logits whose boundary runs through a bin of 1/64 (csrc/cuda/selection.h)."""
    row = -torch.arange(6000.0)
    if how == "evenly":  # 64 in every bin, whose ranks share their upper bits with those of the next
        row = row * 2.0**-12
    elif how == "edges":  # in every bin its upper edge, its middle, and what lies next to the edge of the bin below
        row = 0.3 + (row // 3) / 64 + torch.tensor([-(2.0**-20), 1 / 128, 2.0**-20])[torch.arange(6000) % 3]
        row[0] = 0.3
    elif how == "one bin":  # more than are listed, all different
        row = row * 2.0**-20
    elif how == "equal":
        row = torch.where(row < -2900, row * 2.0**-7 - 1, -0.5)
    elif how == "one far above":  # all others are more than 32 below it
        row = torch.where(row == 0, 0.0, -40 + row * 2.0**-10)
    elif how == "infinite":  # inf - inf is no bin
        row = torch.where(row > -4, torch.inf, row)
    return torch.stack([row[torch.randperm(6000)] for _ in range(2)])


@pytest.mark.parametrize("filters", [{"top_k": 65}, {"top_k": 66}, {"top_k": 2500}, {"top_p": 0.03}, {"top_p": 0.7},
                                     {"top_k": 3000, "top_p": 0.5}], ids=str)  # fmt: skip
@pytest.mark.parametrize("how", ["evenly", "edges", "one bin", "equal", "one far above"])
def test_boundaries_through_crowded_bins(filtering: ctypes.CDLL, how: str, filters: dict[str, float]) -> None:
    drawn(filtering, crowded(how), {}, filters)


@pytest.mark.parametrize("top_p", [0.5, 0.999])
def test_masses_of_what_is_listed_do_not_overflow(filtering: ctypes.CDLL, top_p: float) -> None:
    """A block adds up 2,001 members of one bin, of which it may have held a few itself."""
    row = torch.full((4000,), -100.0)
    row[:2001], row[0] = -129 * 2.0**-14, 0.0
    drawn(filtering, row[torch.randperm(4000)][None], {}, {"top_p": top_p})


@pytest.mark.parametrize("filters", [{"top_k": 2500}, {"top_k": 3000, "top_p": 0.5}], ids=str)
def test_boundaries_through_narrow_logits(filtering: ctypes.CDLL, filters: dict[str, float]) -> None:
    """bfloat16 has 128 values between two powers of 2: thousands of logits are equal."""
    drawn(filtering, (40 + 2 * torch.randn(2, 6000)).bfloat16(), {}, filters)


def test_infinite_logits_are_no_bin(kernels: ctypes.CDLL) -> None:
    z, out = crowded("infinite"), (torch.empty(2, dtype=torch.int64), *(torch.empty(2) for _ in range(4)))
    where = map(pointer, (torch.tensor(1), torch.arange(2), torch.arange(2)))
    raise_if(
        kernels.sample_rows(
            argument(z, {}), *where, ctypes.c_int64(3), ctypes.c_double(1.0), ctypes.c_float(0.0), *map(pointer, out)
        )
    )
    assert bool(out[1].isnan().all()) and bool(((out[0] >= 0) & (out[0] < 6000)).all())


def test_lost_rows_say_so(kernels: ctypes.CDLL) -> None:
    """NaN, an infinite logit, nothing finite, a target outside: NaN statistics, NaN gradients, no other row harmed."""
    z = torch.randn(5, 300)
    z[0, 17], z[1, 5], z[2] = torch.nan, torch.inf, -torch.inf
    targets = torch.tensor([3, 4, 5, 300, 7])
    logp, entropy = torch.empty(5), torch.empty(5)
    raise_if(
        kernels.policy_rows(
            argument(z, {}), pointer(targets), 0, *[ctypes.c_float(0)] * 3, 0, *[ctypes.c_float(0)] * 2,
            pointer(torch.ones(5)), None, None, None, None, 0, ctypes.c_int64(0), pointer(logp), pointer(entropy),
        )
    )  # fmt: skip
    assert logp.isnan().tolist() == [True, True, True, True, False]
    assert z.isnan().any(1).tolist() == [True, True, True, True, False]
    filters: dict[str, float]
    for filters in ({}, {"top_k": 3}, {"top_p": 0.5}):
        bad = torch.randn(3, 300)
        bad[0, 17], bad[1] = torch.nan, -torch.inf
        out = (torch.empty(3, dtype=torch.int64), *(torch.empty(3) for _ in range(4)))
        raise_if(
            kernels.sample_rows(
                argument(bad, {}), *map(pointer, (torch.tensor(1), torch.arange(3), torch.arange(3))),
                ctypes.c_int64(int(filters.get("top_k", 0))), ctypes.c_double(filters.get("top_p", 1.0)),
                ctypes.c_float(0.0), *map(pointer, out),
            )
        )  # fmt: skip
        assert out[1].isnan().tolist() == [True, True, False]
        assert bool(((out[0] >= 0) & (out[0] < 300)).all())


#: Rows whose largest logit is that far from zero; masked logits and what a mask of finite numbers leaves of a row.
FAR = [-3e38 / 4, -1e31, -1e30, -1e10, -1e9, 1e9, 1e10, 1e31, 3e38 / 4]


@pytest.mark.parametrize("scaling", [{}, {"temperature": 0.75}, {"temperature": "rows"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_far_from_zero(kernels: ctypes.CDLL, dtype: torch.dtype, scaling: dict[str, Any]) -> None:
    """A softmax does not mind where its logits lie: as many likeliest tokens as there are share it."""
    v = 700
    z = torch.tensor(FAR)[:, None].repeat(1, v).to(dtype)
    z[:, 40:] = (z[:, 40:] * torch.tensor([2.0 if x < 0 else 0.5 for x in FAR])[:, None]).to(dtype)
    z[:, 600:650], z[:, 650:] = torch.finfo(dtype).min, -torch.inf
    n = len(z)
    scaling = {k: torch.full((n,), 0.75) if t == "rows" else t for k, t in scaling.items()}
    targets, logp, entropy = torch.full((n,), 39), torch.empty(n), torch.empty(n)
    rows, given = z.clone(), torch.ones(n)
    raise_if(kernels.logprob_rows(argument(z, scaling), pointer(targets), pointer(logp), pointer(entropy)))
    for found in (logp, entropy):
        torch.testing.assert_close(found.abs(), torch.full((n,), 40.0).log())
    raise_if(
        kernels.policy_rows(
            argument(rows, scaling), pointer(targets), 0, *[ctypes.c_float(0)] * 3, 0, *[ctypes.c_float(0)] * 2,
            pointer(given), pointer(given), None, None, None, 0, ctypes.c_int64(0), pointer(logp), pointer(entropy),
        )
    )  # fmt: skip
    of_target = torch.zeros(n, v)
    of_target[:, :40], of_target[:, 39] = -1 / 40, 1 - 1 / 40
    chain = 1 / 0.75 if scaling else 1.0
    torch.testing.assert_close(
        rows.float(), of_target * chain, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-7
    )
    filters: dict[str, float]
    for filters in ({}, {"top_k": 60}, {"top_p": 0.9}, {"min_p": 0.5}):
        seed, ids, out = torch.tensor(4), torch.arange(n), (torch.empty(n, dtype=torch.int64), *torch.empty(4, n))
        raise_if(
            kernels.sample_rows(
                argument(z, scaling), *map(pointer, (seed, ids, ids)), ctypes.c_int64(int(filters.get("top_k", 0))),
                ctypes.c_double(filters.get("top_p", 1.0)), ctypes.c_float(filters.get("min_p", 0.0)),
                *map(pointer, out),
            )
        )  # fmt: skip
        assert bool((out[0] < 40).all()), filters
        torch.testing.assert_close(-out[1], torch.full((n,), 40.0).log())


@pytest.mark.parametrize("scaling", [{}, {"temperature": "rows"}], ids=str)
@pytest.mark.parametrize("kind", ["given", "reinforce", "ppo"])
def test_a_target_that_cannot_be_drawn(kernels: ctypes.CDLL, kind: str, scaling: dict[str, Any]) -> None:
    """A target's logit of -inf: log-probability -inf, and finite gradients, entropy's too."""
    n, v = 3, 300
    z, targets = torch.randn(n, v), torch.tensor([7, 8, 299])
    z[range(n), targets] = -torch.inf
    scaling = {k: torch.ones(n) for k in scaling}
    logp, entropy, behavior = torch.empty(n), torch.empty(n), torch.full((n,), -5.0)
    first, second = torch.tensor([1.0, 2.0, -0.5]), torch.tensor([0.5, 1.0, 2.0])
    number, coefficient = {"given": 0, "reinforce": 1, "ppo": 3}[kind], 0.25
    rows = z.clone()
    raise_if(
        kernels.policy_rows(
            argument(rows, scaling), pointer(targets), number, *map(ctypes.c_float, (0.8, 1.2, 0.0)), 0,
            *map(ctypes.c_float, (0.0, coefficient)), pointer(first), pointer(second),
            pointer(behavior if kind == "ppo" else None), None, None, 0, ctypes.c_int64(0), pointer(logp),
            pointer(entropy),
        )
    )  # fmt: skip
    assert torch.equal(logp, torch.full((n,), -torch.inf))
    p, finite = torch.softmax(z.double(), -1), torch.log_softmax(z.double(), -1).nan_to_num(neginf=0.0)
    c = {"given": first, "reinforce": -first * second, "ppo": torch.tensor([0.0, 0.0, 0.0])}[kind].double()
    e = (-second if kind == "given" else coefficient * second).double()
    hot = torch.nn.functional.one_hot(targets, v)
    of_entropy = p * (finite - (p * finite).sum(-1, keepdim=True))
    torch.testing.assert_close(rows.double(), c[:, None] * (hot - p) + e[:, None] * of_entropy, rtol=1e-4, atol=1e-7)


def test_gradient_memory_is_checked(kernels: ctypes.CDLL) -> None:
    z = torch.randn(4, 64)
    ones, out = torch.ones(4), torch.empty(4)
    for gradient in (z.view(torch.bfloat16)[:, :64], z.view(torch.bfloat16)[1:, 64:]):
        with pytest.raises(ValueError, match="gradient must be the logits' own memory"):
            raise_if(
                kernels.policy_rows(
                    argument(z, {}), pointer(torch.zeros(4, dtype=torch.int64)), 0, *[ctypes.c_float(0)] * 3, 0,
                    *[ctypes.c_float(0)] * 2, pointer(ones), None, None, None, pointer(gradient), 1,
                    ctypes.c_int64(gradient.stride(0)), pointer(out), pointer(out),
                )
            )  # fmt: skip


def test_few_tokens_need_their_exact_noise(kernels: ctypes.CDLL) -> None:
    """A warp asks for four tokens a lane at a time: about 1 + 1/2 + 1/3 + ... answers are yes, as records in a row."""
    counted = (ctypes.c_long * 2)()
    for scale in (0.0, 1.0, 8.0):  # a uniform distribution, a usual one, one with few likely tokens
        kernels.votes(counted)
        drawn(kernels, torch.randn(4, 32768) * scale, {}, {})
        kernels.votes(counted)
        asked, needed = counted
        assert asked == 4 * 32768 // 128
        assert 0 < needed <= 0.08 * asked, (scale, needed / asked)


def test_draws_where_logits_are_huge(kernels: ctypes.CDLL) -> None:
    """The bound on a token's noise has a margin that grows with the logits: none that could win is passed over."""
    z = torch.randint(-40, 40, (3, 2048)).float()
    for offset in (0.0, 3e3, -7e4):  # whole numbers: exact in float32 wherever they lie
        drawn_tokens(kernels, z + offset, {})
        drawn_tokens(kernels, z / 8 + offset, {"temperature": 0.5})


def test_model_of_the_approximate_exponential(kernels: ctypes.CDLL) -> None:
    """As wrong as ex2.approx.ftz.f32 may be: 2 units in the last place; exact at 0, and 0 for a subnormal result."""
    x = torch.cat([torch.linspace(-125, 3, 4001), torch.tensor([0.0, -0.0])])
    got = torch.tensor([kernels.exp2_approximate(ctypes.c_float(v)) for v in x.tolist()], dtype=torch.float64)
    units = (got / torch.exp2(x.double()) - 1).abs() * 2**23
    assert 1.0 < units.max() <= 2.6  # 2 units of the rounded result
    assert got[-2:].tolist() == [1.0, 1.0]
    special = {-torch.inf: 0.0, -127.0: 0.0, torch.inf: torch.inf}
    assert {v: kernels.exp2_approximate(ctypes.c_float(v)) for v in special} == special


def test_sure_tokens_keep_their_digits(kernels: ctypes.CDLL) -> None:
    """log p of a token that is nearly certain is about -(1 - p): no approximate exponential may drown it."""
    z = torch.full((4, 1000), -20.0)
    z[:, 7] = torch.tensor([0.0, 1.7, 13.3, 101.3])
    targets, logp, entropy = torch.full((4,), 7), torch.empty(4), torch.empty(4)
    raise_if(kernels.logprob_rows(argument(z, {"temperature": 0.9}), pointer(targets), pointer(logp), pointer(entropy)))
    truth, _ = reference.logprobs_and_entropy(z.double() / 0.9, targets)
    torch.testing.assert_close(logp.double(), truth, rtol=0.05, atol=1e-12)


def test_scaled_weights_reach_float16(kernels: ctypes.CDLL) -> None:
    """float16 has nothing between 0 and 6e-8: weights times 2^k give gradients times 2^k, and those arrive."""
    v = 4096
    z, targets = torch.randn(2, v), torch.tensor([3, 4000])
    found = []
    for scale in (1.0, 2.0**16):
        rows = z.clone()
        gradient = rows.view(torch.float16)[:, v:]
        advantages, weights, logp, entropy = torch.ones(2), torch.full((2,), scale * 2.0**-12), *torch.empty(2, 2)
        raise_if(
            kernels.policy_rows(
                argument(rows, {}), pointer(targets), 1, *[ctypes.c_float(0)] * 3, 0, *map(ctypes.c_float, (0, 0)),
                *map(pointer, (advantages, weights)), None, None, pointer(gradient), 2,
                ctypes.c_int64(gradient.stride(0)), pointer(logp), pointer(entropy),
            )
        )  # fmt: skip
        found.append(gradient.double() / scale)
    truth = (torch.softmax(z.double(), -1) - torch.nn.functional.one_hot(targets, v)) * 2.0**-12
    assert (found[0] == 0).double().mean() > 0.2
    assert not (found[1] == 0).any()
    torch.testing.assert_close(found[1], truth, rtol=2e-3, atol=0)
