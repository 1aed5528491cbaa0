"""The operations beside what else computes the same, on a CPU: float32, two threads. Run with `make bench`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from comparison import peers
from comparison.batch import Batch
from comparison.peers import COMPILED, LOGPROBS, LOGPROBS_LEARNED, LOSS, PLAIN, PRODUCT, PRODUCTS, role
from comparison.record import OURS

from bandit_rft import PolicyObjective, linear_sample, logprobs_from_logits, policy_loss_from_logits, sample_from_logits
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


def sampling(rows: int) -> dict[str, Any]:
    return {"seed": 1, "sequence_ids": torch.arange(rows), "positions": torch.zeros(rows, dtype=torch.int64)}


def draw(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    token = torch.multinomial(torch.softmax(logits, -1), 1)
    return token, torch.log_softmax(logits, -1).gather(1, token)


def draw_from_head(hidden: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return draw(hidden @ weight.T)


READING = "reading the weight"


@pytest.mark.parametrize("rows", [1, 8, 32, 64])
@torch.no_grad()
def test_sample(side_by_side: Measure, shape: Shape, rows: int, backend: str | None) -> None:
    batch = Batch(rows, *shape[1:])
    hidden, weight, stream = batch.hidden.detach(), batch.weight.detach(), sampling(rows)
    function = peers.compiled(draw_from_head)
    half = torch.empty_like(weight[: len(weight) // 2])
    sides = {
        OURS: lambda _: lambda: linear_sample(hidden, weight, **stream)[:2],
        PLAIN: lambda _: lambda: draw_from_head(hidden, weight),
        COMPILED: lambda _: lambda: function(hidden, weight),
        "FlashInfer sampling": peers.need_gpu("flashinfer", "flashinfer-python"),
        PRODUCT: lambda _: lambda: hidden @ weight.T,
        READING: lambda _: lambda: half.copy_(weight[: len(half)]),  # as many bytes, read and written
    }
    truth = (hidden.double() @ weight.double().T).log_softmax(-1)

    def error(drawn: Any) -> float:
        token, logprob = (part.view(-1) for part in drawn)
        return (truth.gather(1, token[:, None])[:, 0] - logprob).abs().max().item()

    limits = {PRODUCT: sides.pop(PRODUCT), READING: sides.pop(READING)}
    works, missing, errors = peers.working(sides, batch, error)
    works |= {name: make(batch) for name, make in limits.items()}
    for name in limits:
        works[name]()
    side_by_side(
        f"linear_sample, {rows} rows{through(backend)}, {dimensions(shape[1:])}", works, group="sampling",
        roles=lambda side: "limit" if side == READING else "reference" if side == PRODUCT else role(side),
        rounds=25, bars=[{"over": OURS, "under": PLAIN, "at_most": 0.8}], missing=missing, errors=errors,
        shape=(rows, *shape[1:]),
    )  # fmt: skip


ROWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "level": lambda z: z * 0.01,
    "normal": lambda z: z,
    "peaked": lambda z: z * 6,
    "half at -1e9": lambda z: z.masked_fill(torch.rand_like(z) < 0.5, -1e9),
}


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("top_k, top_p", [(0, 0.9), (50, 1.0), (1000, 0.9)])
def test_filters(side_by_side: Measure, top_k: int, top_p: float, kind: str) -> None:
    logits, stream = ROWS[kind](torch.randn(8, 151936)), sampling(8)

    def plain(logits: torch.Tensor) -> Any:
        z = logits
        if top_k:
            z = z.masked_fill(z < z.topk(top_k).values[:, -1:], -torch.inf)
        if top_p < 1:
            ordered, ids = z.sort(descending=True)
            probability = ordered.softmax(-1)
            drop = probability.cumsum(-1) - probability >= top_p
            z = z.masked_fill(drop.scatter(-1, ids, drop), -torch.inf)
        token = torch.multinomial(z.softmax(-1), 1)
        return token, logits.log_softmax(-1).gather(1, token)

    against, function = "topk, sort, cumsum, multinomial", peers.compiled(plain)
    works = {
        against: lambda: plain(logits),
        COMPILED: lambda: function(logits),
        OURS: lambda: sample_from_logits(logits, top_k=top_k, top_p=top_p, **stream),
    }
    for work in works.values():
        work()
    side_by_side(
        f"sample_from_logits, top_k {top_k}, top_p {top_p}, {kind}", works, group="filters", roles=role, rounds=9,
        bars=[{"over": OURS, "under": against, "at_most": 0.5}], shape=(8, 151936),
    )  # fmt: skip


class TestRows:
    """Operations on logits that exist, beside PyTorch's, and beside a copy of as many bytes: what memory allows.

    A copy reads and writes every byte, as policy rows do. What only reads rows is beside a copy of half of them.
    """

    count = 512
    COPY = "copying as many bytes"

    def measure(
        self, side_by_side: Measure, name: str, shape: Shape, ours: Any, plain: Any, arguments: tuple[Any, ...],
        copied: int,
    ) -> None:  # fmt: skip
        logits, into = arguments[0], torch.empty_like(arguments[0][:copied])
        function = peers.compiled(plain)
        sides: dict[str, Any] = {
            OURS: lambda _: lambda: ours(*arguments),
            PLAIN: lambda _: lambda: plain(*arguments),
            COMPILED: lambda _: lambda: function(*arguments),
            self.COPY: lambda _: lambda: into.copy_(logits.detach()[:copied]),
        }
        works, missing, _ = peers.working(sides, Batch(32, 8, 64))
        side_by_side(
            f"{name}, {self.count} rows of {shape[2]}", works, group="rows", rounds=15, missing=missing,
            roles=lambda side: "limit" if side == self.COPY else role(side),
            bars=[{"over": OURS, "under": self.COPY, "at_most": 1 / 0.6}], shape=(self.count, shape[2]),
        )  # fmt: skip

    @torch.no_grad()
    def test_logprob_rows(self, side_by_side: Measure, shape: Shape) -> None:
        logits = torch.randn(self.count, shape[2])
        targets = torch.randint(shape[2], (self.count,))

        def plain(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return z.log_softmax(-1).gather(1, t[:, None])[:, 0]

        name = "logprobs_from_logits, forward"
        self.measure(side_by_side, name, shape, logprobs_from_logits, plain, (logits, targets), self.count // 2)

    @pytest.mark.parametrize("operation", ["policy_loss_from_logits", "logprobs_from_logits"])
    def test_backward(self, side_by_side: Measure, shape: Shape, operation: str) -> None:
        logits = torch.randn(self.count, shape[2], requires_grad=True)
        targets, advantages = torch.randint(shape[2], (self.count,)), torch.randn(self.count)
        bounds, objective = torch.arange(0, self.count + 1, 16, dtype=torch.int32), PolicyObjective()

        def ours(z: torch.Tensor, t: torch.Tensor, a: torch.Tensor) -> None:
            z.grad = None
            if operation == "policy_loss_from_logits":
                policy_loss_from_logits(z, t, a, bounds, objective=objective).loss.backward()
            else:
                (-(a * logprobs_from_logits(z, t)).mean()).backward()

        def loss(z: torch.Tensor, t: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
            return -(a * z.log_softmax(-1).gather(1, t[:, None])[:, 0]).mean()

        function = peers.compiled(loss)

        def plain(z: torch.Tensor, t: torch.Tensor, a: torch.Tensor) -> None:
            z.grad = None
            loss(z, t, a).backward()

        def fast(z: torch.Tensor, t: torch.Tensor, a: torch.Tensor) -> None:
            z.grad = None
            function(z, t, a).backward()

        arguments, into = (logits, targets, advantages), torch.empty(self.count, shape[2])
        works, missing, _ = peers.working(
            {
                OURS: lambda _: lambda: ours(*arguments),
                PLAIN: lambda _: lambda: plain(*arguments),
                COMPILED: lambda _: lambda: fast(*arguments),
                self.COPY: lambda _: lambda: into.copy_(logits.detach()),
            },
            Batch(32, 8, 64),
        )
        side_by_side(
            f"{operation}, forward + backward, {self.count} rows of {shape[2]}", works, group="rows",
            rounds=15, missing=missing, roles=lambda side: "limit" if side == self.COPY else role(side),
            bars=[{"over": OURS, "under": self.COPY, "at_most": 1 / 0.6}], shape=(self.count, shape[2]),
        )  # fmt: skip

    @torch.no_grad()
    def test_sample_rows(self, side_by_side: Measure, shape: Shape) -> None:
        logits, stream = torch.randn(self.count, shape[2]), sampling(self.count)
        self.measure(
            side_by_side, "sample_from_logits", shape, lambda z: sample_from_logits(z, **stream), draw, (logits,),
            self.count // 2,
        )  # fmt: skip
