"""The operations beside what else computes the same, on a CPU: float32, two threads. Run with `make bench`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from comparison import peers
from comparison.batch import Batch
from comparison.logit_rows import COPY, FILTERED, FILTERS, ROWS
from comparison.peers import LOGPROBS, LOGPROBS_LEARNED, LOSS, PLAIN, PRODUCT, PRODUCTS, role
from comparison.record import OURS

from bandit_rft.ops import backends

Measure = Callable[..., dict[str, Any]]
Shape = tuple[int, int, int]
FASTEST = "fastest peer"
pytestmark = [
    pytest.mark.skipif(backends.native is None, reason="measures the compiled core"),
    pytest.mark.timeout(900),  # torch.compile tries every algorithm, for every shape
]


def through(backend: str | None) -> str:
    return f", through {backend}" if backend else ""


def dimensions(shape: Shape) -> str:
    return " x ".join(map(str, shape))


@pytest.mark.parametrize("zero", [0.0, 0.7])
def test_policy_loss(side_by_side: Measure, each_shape: Shape, zero: float, backend: str | None) -> None:
    batch = Batch(*each_shape, zero=zero)
    answer = batch.answer()
    works, missing, errors = peers.working(LOSS, batch, lambda _: batch.gradient_error(answer))
    bars = [{"over": OURS, "under": FASTEST, "at_most": 0.35 if zero else 1.0}]
    if not zero:
        bars.append({"over": OURS, "under": PRODUCTS, "at_most": 1.15})
    share = f", {zero:.0%} of the sequences at advantage 0" if zero else ""
    side_by_side(
        f"linear_policy_loss, forward + backward{share}{through(backend)}, {dimensions(each_shape)}", works,
        group="loss", roles=role, rounds=5, bars=bars, missing=missing, errors=errors, shape=each_shape,
        zero=(batch.advantages == 0).double().mean().item(),
    )  # fmt: skip


def test_policy_loss_sparse_against_itself(side_by_side: Measure, shape: Shape) -> None:
    dense, sparse = Batch(*shape), Batch(*shape, zero=0.7)
    against = "the same without a 0"
    side_by_side(
        f"linear_policy_loss, 70% of the sequences at advantage 0, {dimensions(shape)}",
        {against: peers.ours_loss(dense), OURS: peers.ours_loss(sparse)}, group="loss itself", rounds=7,
        roles=lambda side: "ours" if side == OURS else "reference",
        bars=[{"over": OURS, "under": against, "at_most": 0.40}], shape=shape,
    )  # fmt: skip


def test_logprobs(side_by_side: Measure, each_shape: Shape, backend: str | None) -> None:
    batch = Batch(*each_shape)
    right = batch.answer().logprobs
    works, missing, errors = peers.working(LOGPROBS, batch, lambda found: (found - right).abs().max().item())
    side_by_side(
        f"linear_logprobs, forward{through(backend)}, {dimensions(each_shape)}", works, group="logprobs", roles=role,
        rounds=9, bars=[{"over": OURS, "under": PRODUCT, "at_most": 1.05}], missing=missing, errors=errors,
        shape=each_shape,
    )  # fmt: skip


def test_logprobs_backward(side_by_side: Measure, shape: Shape, backend: str | None) -> None:
    """Log-probabilities that somebody else's loss is made of: mean(A logp), whose gradients come from outside."""
    batch = Batch(*shape)
    answer = batch.answer()
    works, missing, errors = peers.working(LOGPROBS_LEARNED, batch, lambda _: batch.gradient_error(answer))
    side_by_side(
        f"linear_logprobs, forward + backward{through(backend)}, {dimensions(shape)}", works, group="logprobs",
        roles=role, rounds=5, missing=missing, errors=errors, shape=shape,
    )  # fmt: skip


CHUNKS = [(8, 896, 32000), (64, 896, 32000), (352, 896, 32000), (1024, 128, 512)]


@pytest.mark.parametrize("chunk", CHUNKS, ids=dimensions)
@pytest.mark.parametrize("product", ["logits", "dL/dhidden", "dL/dweight, added"])
def test_products_of_a_chunk(versus: Callable[..., float], product: str, chunk: Shape) -> None:
    """The loss's three, by the backend that serves (the core's own, or the vendor's) and by PyTorch."""
    rows, h, v = chunk
    hidden, weight, z = torch.randn(rows, h), torch.randn(v, h), torch.randn(rows, v)
    logits, of_hidden, of_weight = torch.empty_like(z), torch.empty_like(hidden), torch.zeros_like(weight)
    backend = backends.serving(hidden.device, hidden.dtype)
    sides: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "logits": (
            lambda: backend.logits(hidden, weight, None, logits),
            lambda: torch.mm(hidden, weight.T, out=logits),
        ),
        "dL/dhidden": (
            lambda: backend.add_hidden_gradient(z, weight, of_hidden),
            lambda: torch.mm(z, weight, out=of_hidden),
        ),
        "dL/dweight, added": (
            lambda: backend.add_weight_gradient(z, hidden, of_weight, accumulate=True),
            lambda: of_weight.addmm_(z.T, hidden),
        ),
    }
    label = f"the product of {product}, {dimensions(chunk)} / torch.mm"
    versus(label, *sides[product], bar=None, rounds=11, group="products")


READING = "reading the weight"


@pytest.mark.parametrize("rows", [1, 8, 32, 64])
def test_sample(side_by_side: Measure, shape: Shape, rows: int, backend: str | None) -> None:
    batch = Batch(rows, *shape[1:])
    hidden, weight = batch.hidden.detach(), batch.weight.detach()
    half = torch.empty_like(weight[: len(weight) // 2])
    truth = (hidden.double() @ weight.double().T).log_softmax(-1)
    works, missing, errors = peers.working(peers.DRAWS, batch, partial(peers.draw_error, truth))
    works[PRODUCT] = lambda: hidden @ weight.T
    works[READING] = lambda: half.copy_(weight[: len(half)])  # as many bytes, read and written
    works[PRODUCT](), works[READING]()
    side_by_side(
        f"linear_sample, {rows} rows{through(backend)}, {dimensions(shape[1:])}", works, group="sampling",
        roles=lambda side: "limit" if side == READING else "reference" if side == PRODUCT else role(side),
        rounds=25, bars=[{"over": OURS, "under": PLAIN, "at_most": 0.8}], missing=missing, errors=errors,
        shape=(rows, *shape[1:]),
    )  # fmt: skip


@pytest.mark.parametrize("name", FILTERS)
def test_filters(side_by_side: Measure, name: str) -> None:
    operation, shape = FILTERS[name], (8, 151936)
    batch = operation.logits(*shape)
    works, missing, errors = peers.working(operation.works(), batch, partial(operation.error, batch))
    side_by_side(
        name, works, group="filters", roles=role, rounds=9, missing=missing, errors=errors, shape=shape,
        bars=[{"over": OURS, "under": FILTERED, "at_most": 0.5}],
    )  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_rows(side_by_side: Measure, shape: Shape, name: str) -> None:
    """Beside a copy of as many bytes: what memory allows.

    A copy reads and writes every byte, as a backward does. What only reads rows is beside a copy of half of them.
    """
    operation, count = ROWS[name], 512
    batch = operation.logits(count, shape[2])
    copied = batch.z.detach()[: count if operation.learned else count // 2]
    into = torch.empty_like(copied)
    works, missing, errors = peers.working(operation.works(), batch, partial(operation.error, batch))
    works[COPY] = lambda: into.copy_(copied)
    side_by_side(
        f"{name}, {count} rows of {shape[2]}", works, group="rows", rounds=15, missing=missing, errors=errors,
        roles=lambda side: "limit" if side == COPY else role(side), shape=(count, shape[2]),
        bars=[{"over": OURS, "under": COPY, "at_most": 1 / 0.6}],
    )  # fmt: skip
