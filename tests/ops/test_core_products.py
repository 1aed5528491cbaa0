"""The core's own float32 products (csrc/cpu/products.cpp), on every instruction set, and where a backend uses them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ops_cases import CASES, OBJECTIVES, Case
from torch import Tensor
from torch.utils.dlpack import to_dlpack  # type: ignore[attr-defined]

from bandit_rft import linear_policy_loss
from bandit_rft.ops import backends, use_backend
from bandit_rft.ops.backend import Backend
from bandit_rft.ops.core_backend import CudaBackend

core: Any = backends.native
pytestmark = pytest.mark.skipif(core is None, reason="needs the compiled core")
#: (n, H, V): one of everything; around a tile; several stretches of a sum; more rows than are packed together; a weight
#: that is larger than what is packed
SHAPES = [
    (1, 1, 1),
    (12, 32, 32),
    (13, 33, 45),
    (100, 17, 3000),
    (50, 400, 130),
    (9, 2000, 900),
    (1500, 20, 40),
    (400, 1500, 30),
    (26, 300, 3000),
]


def near(got: Tensor, want: Tensor) -> bool:
    return bool((got.double() - want).norm() <= 1e-6 * want.norm())


def columns_of_wider(rows: int, columns: int) -> Tensor:
    """Rows that do not follow one another: what lies between is NaN, and must be neither read nor written."""
    return torch.full((rows, columns + 5), torch.nan)[:, :columns]


def nothing_between(rows: Tensor) -> bool:
    """Whether it still is."""
    return bool(rows.as_strided((len(rows), 5), (rows.stride(0), 1), rows.shape[1]).isnan().all())


@pytest.mark.usefixtures("each_instruction_set")
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_right(shape: tuple[int, int, int], threads: int) -> None:
    n, h, v = shape
    hidden, weight = columns_of_wider(n, h).copy_(torch.randn(n, h)), columns_of_wider(v, h).copy_(torch.randn(v, h))
    z, of_hidden, of_weight = columns_of_wider(n, v), columns_of_wider(n, h), columns_of_wider(v, h)
    core.logits_product(to_dlpack(hidden), to_dlpack(weight), to_dlpack(z), threads)
    assert near(z, hidden.double() @ weight.double().T)
    core.hidden_gradient_product(to_dlpack(z), to_dlpack(weight), to_dlpack(of_hidden), False, threads)
    assert near(of_hidden, z.double() @ weight.double())
    for accumulate in (False, True, True):
        before = of_weight.double() if accumulate else 0.0
        core.weight_gradient_product(to_dlpack(z), to_dlpack(hidden), to_dlpack(of_weight), accumulate, threads)
        assert near(of_weight, before + z.double().T @ hidden.double())
    assert all(map(nothing_between, (z, of_hidden, of_weight)))


@pytest.mark.usefixtures("each_instruction_set")
@pytest.mark.parametrize("width", [16, 128, 300, 512, 1024, 2048])
def test_rows_are_read_where_they_lie_or_packed_with_the_same_bits(width: int) -> None:
    """Where a weight is small its hidden states are not packed, unless their rows lie in the same sets of the cache."""
    hidden, weight = torch.randn(53, width), torch.randn(40, width)
    apart = torch.full((53, width + 1), torch.nan)[:, :width].copy_(hidden)
    found = [torch.empty(53, 40) for _ in range(2)]
    for h, z in zip((hidden, apart), found, strict=True):
        core.logits_product(to_dlpack(h), to_dlpack(weight), to_dlpack(z), 2)
    assert torch.equal(*found) and near(found[0], hidden.double() @ weight.double().T)
    for h in (hidden[:1].expand(53, width), torch.randn(53 + width).unfold(0, width, 1)[:53]):  # strides of 0 and 1
        core.logits_product(to_dlpack(h), to_dlpack(weight), to_dlpack(found[0]), 2)
        assert near(found[0], h.double() @ weight.double().T)


@pytest.mark.usefixtures("each_instruction_set")
@pytest.mark.parametrize("shape", [(3, 0, 5), (0, 4, 5), (3, 4, 0), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("threads", [0, 2])
def test_nothing_to_multiply(shape: tuple[int, int, int], threads: int) -> None:
    n, h, v = shape
    hidden, weight, z = torch.ones(n, h), torch.ones(v, h), torch.full((n, v), torch.nan)
    core.logits_product(to_dlpack(hidden), to_dlpack(weight), to_dlpack(z), threads)
    assert torch.equal(z, hidden @ weight.T)
    of_hidden, of_weight = torch.full_like(hidden, torch.nan), torch.full_like(weight, 2.0)
    core.hidden_gradient_product(to_dlpack(z), to_dlpack(weight), to_dlpack(of_hidden), False, threads)
    assert torch.equal(of_hidden, z @ weight)
    core.weight_gradient_product(to_dlpack(z), to_dlpack(hidden), to_dlpack(of_weight), True, threads)
    assert torch.equal(of_weight, 2 + z.T @ hidden)


@pytest.mark.usefixtures("each_instruction_set")
def test_a_row_has_the_same_bits_beside_any_others_and_on_any_threads() -> None:
    hidden, weight = torch.randn(77, 900), torch.randn(333, 900)
    whole, alone = torch.empty(77, 333), torch.empty(1, 333)
    core.logits_product(to_dlpack(hidden), to_dlpack(weight), to_dlpack(whole), 4)
    for i in (0, 11, 12, 76):
        core.logits_product(to_dlpack(hidden[i : i + 1]), to_dlpack(weight), to_dlpack(alone), 1)
        assert torch.equal(alone[0], whole[i])


def test_infinities_and_nans_stay_where_they_are() -> None:
    """What a tile computes beside them, or pads with, must not turn them into something else, nor spread them."""
    hidden, weight = torch.ones(9, 40), torch.ones(50, 40)
    hidden[3, 7], hidden[8, 0], weight[49, 39] = torch.inf, torch.nan, -torch.inf
    z = torch.empty(9, 50)
    core.logits_product(to_dlpack(hidden), to_dlpack(weight), to_dlpack(z), 2)
    torch.testing.assert_close(z, hidden @ weight.T, equal_nan=True)


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        (((3, 4), (5, 6), (3, 5)), "shapes do not fit"),
        (((3, 4), (5, 4), (3, 6)), "shapes do not fit"),
        (((3, 4), (5, 4), (4, 5)), "hidden \\[n, H\\] . weight \\[V, H\\]"),
    ],
    ids=["H", "V", "n"],
)
def test_shapes_that_do_not_fit_are_refused(shapes: tuple[tuple[int, int], ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        core.logits_product(*(to_dlpack(torch.zeros(shape)) for shape in shapes), 1)
    out = to_dlpack(torch.zeros(3, 5))
    with pytest.raises(ValueError, match="weight must be float32"):
        core.logits_product(to_dlpack(torch.zeros(3, 4)), to_dlpack(torch.zeros(5, 4).bfloat16()), out, 1)


class Native:
    """The core, which says that its products pay, or do not, whatever the processor; and which were called."""

    def __init__(self, pays: bool) -> None:
        self.pays = pays
        self.called: list[str] = []

    def products_pay(self) -> bool:
        return self.pays

    def __getattr__(self, name: str) -> Any:
        if name.endswith("_product"):
            self.called.append(name)
        return getattr(core, name)


ALL = {"logits_product", "hidden_gradient_product", "weight_gradient_product"}


def loss_gradients(case: Case, pays: bool, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Tensor], set[str]]:
    """Of one loss on the cpu backend: (gradients, the core's products that were called)."""
    native = Native(pays)
    monkeypatch.setattr(backends.named("cpu"), "native", native)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    leaves = case.leaves()
    with use_backend("cpu"):
        result = linear_policy_loss(
            *leaves[:2], case.targets, case.advantages, case.cu_seqlens, objective=OBJECTIVES["ppo-kl3-entropy"],
            behavior_logprobs=case.behavior, reference_logprobs=case.reference,
            bias=leaves[2] if case.bias is not None else None, **case.scaling,
        )  # fmt: skip
    result.loss.backward()
    return [leaf.grad for leaf in leaves if leaf.grad is not None], set(native.called)


@pytest.mark.parametrize("name", ["plain", "bias", "everything", "chunked"])
def test_the_loss_is_the_same_by_either_product(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BANDIT_RFT_WORKSPACE_MIB", "1")  # several chunks of "chunked"
    case = Case.make(**CASES[name])
    own, called = loss_gradients(case, True, monkeypatch)
    vendors, called_of_vendors = loss_gradients(case, False, monkeypatch)
    assert called == ALL and not called_of_vendors
    for ours, theirs in zip(own, vendors, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6 * float(theirs.abs().max()))


@pytest.mark.parametrize(
    "case",
    [Case.make(5, 24, 100), Case.make(40, 24, 100, dtype=torch.bfloat16), Case.make(40, 24, 5)],
    ids=["few rows", "16 bits", "few words"],
)
def test_what_they_do_not_serve_is_the_vendors(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not loss_gradients(case, True, monkeypatch)[1]


def test_gpu_backends_use_none_of_them() -> None:
    for name in ("logits", "add_hidden_gradient", "add_weight_gradient"):
        assert getattr(CudaBackend, name) is getattr(Backend, name)
