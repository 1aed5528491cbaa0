"""The operations against plain PyTorch on a CPU: float32, two threads. Run with `make bench`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bandit_rft import (
    PolicyObjective,
    linear_logprobs,
    linear_policy_loss,
    linear_sample,
    logprobs_from_logits,
    sample_from_logits,
)
from bandit_rft.ops import backends, rows
from bandit_rft.ops.rows import Scaling, TokenInputs

B = 32
Versus = Callable[..., float]
pytestmark = pytest.mark.skipif(backends.native is None, reason="measures the compiled core")


def through(backend: str | None) -> str:
    return f" through {backend}" if backend else ""


class Batch:
    """A batch of 32 sequences of equal length and its head; in `sparse`, 70% of the sequences have advantage 0."""

    def __init__(self, tokens: int, hidden_size: int, vocabulary: int) -> None:
        self.length = max(1, tokens // B)
        n = B * self.length
        self.hidden = torch.randn(n, hidden_size, requires_grad=True)
        self.weight = (torch.randn(vocabulary, hidden_size) * 0.03).requires_grad_()
        self.targets = torch.randint(vocabulary, (n,))
        self.cu_seqlens = torch.arange(0, n + 1, self.length, dtype=torch.int32)
        self.advantages = torch.randn(B)
        self.sparse = self.advantages.clone()
        self.sparse[torch.randperm(B)[: int(0.7 * B)]] = 0

    def clear(self) -> None:
        self.hidden.grad = self.weight.grad = None

    def plain(self, advantages: torch.Tensor) -> None:
        self.clear()
        logprobs = torch.log_softmax(self.hidden @ self.weight.T, -1).gather(1, self.targets[:, None])[:, 0]
        (-(advantages.repeat_interleave(self.length) * logprobs).mean()).backward()

    def fused(self, advantages: torch.Tensor) -> None:
        self.clear()
        linear_policy_loss(
            self.hidden, self.weight, self.targets, advantages, self.cu_seqlens, objective=PolicyObjective()
        ).loss.backward()


@pytest.fixture
def batch(shape: tuple[int, int, int]) -> Batch:
    return Batch(*shape)


def test_policy_loss(versus: Versus, batch: Batch, backend: str | None) -> None:
    versus(
        f"linear_policy_loss, forward + backward{through(backend)} / plain PyTorch",
        lambda: batch.fused(batch.advantages), lambda: batch.plain(batch.advantages), bar=1.0,
    )  # fmt: skip


def test_policy_loss_sparse(versus: Versus, batch: Batch) -> None:
    versus(
        "the same, 70% of sequences at advantage 0 / plain PyTorch",
        lambda: batch.fused(batch.sparse), lambda: batch.plain(batch.sparse), bar=0.40,
    )  # fmt: skip


def test_policy_loss_sparse_against_itself(versus: Versus, batch: Batch) -> None:
    versus(
        "the same, 70% at advantage 0 / no advantage 0",
        lambda: batch.fused(batch.sparse), lambda: batch.fused(batch.advantages), bar=0.40,
    )  # fmt: skip


def test_policy_loss_against_bare_products(versus: Versus, batch: Batch) -> None:
    def products() -> None:
        with torch.no_grad():
            z = batch.hidden @ batch.weight.T
            z @ batch.weight, z.T @ batch.hidden

    versus(
        "linear_policy_loss / its three bare matrix products",
        lambda: batch.fused(batch.advantages), products, bar=1.15,
    )  # fmt: skip


def test_logprobs(versus: Versus, batch: Batch, backend: str | None) -> None:
    @torch.no_grad()
    def product() -> Any:
        return batch.hidden @ batch.weight.T

    @torch.no_grad()
    def ours() -> Any:
        return linear_logprobs(batch.hidden, batch.weight, batch.targets)

    versus(f"linear_logprobs forward{through(backend)} / bare product", ours, product, bar=1.05, rounds=15)


def sampling(rows: int) -> dict[str, Any]:
    return {"seed": 1, "sequence_ids": torch.arange(rows), "positions": torch.zeros(rows, dtype=torch.int64)}


@pytest.mark.parametrize("rows", [1, 32])
def test_sample(versus: Versus, batch: Batch, rows: int, backend: str | None) -> None:
    hidden, weight, stream = torch.randn(rows, batch.hidden.shape[1]), batch.weight.detach(), sampling(rows)

    def plain() -> Any:
        logits = hidden @ weight.T
        token = torch.multinomial(torch.softmax(logits, -1), 1)
        return torch.log_softmax(logits, -1).gather(1, token)

    versus(
        f"linear_sample, {rows} rows{through(backend)} / matmul + softmax + multinomial + log_softmax + gather",
        lambda: linear_sample(hidden, weight, **stream), plain, bar=0.8, rounds=25,
    )  # fmt: skip


ROWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "level": lambda z: z * 0.01,
    "normal": lambda z: z,
    "peaked": lambda z: z * 6,
    "half at -1e9": lambda z: z.masked_fill(torch.rand_like(z) < 0.5, -1e9),
}


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("top_k, top_p", [(0, 0.9), (50, 1.0), (1000, 0.9)])
def test_filters(versus: Versus, top_k: int, top_p: float, kind: str) -> None:
    logits, stream = ROWS[kind](torch.randn(8, 151936)), sampling(8)

    def plain() -> Any:
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

    versus(
        f"sample_from_logits, top_k {top_k}, top_p {top_p}, {kind} / topk, sort, multinomial",
        lambda: sample_from_logits(logits, top_k=top_k, top_p=top_p, **stream), plain, bar=0.5, rounds=9,
    )  # fmt: skip


class TestBandwidth:
    """Bytes a second of a row kernel, as a share of what copying the same rows reaches (60% is a ratio of 1.67).

    A copy reads and writes every byte. Kernels that only read a row are also shown against a copy of half the bytes,
    i.e. at equal traffic.
    """

    count = 512

    @pytest.fixture
    def logits(self, shape: tuple[int, int, int]) -> torch.Tensor:
        return torch.randn(self.count, shape[2])

    def test_policy_rows(self, versus: Versus, logits: torch.Tensor) -> None:
        targets, work, copy = (
            torch.randint(logits.shape[1], (self.count,)),
            torch.empty_like(logits),
            torch.empty_like(logits),
        )
        inputs = TokenInputs(torch.randn(self.count), torch.ones(self.count), None, None)
        versus(
            "policy rows in place / copy (equal traffic)",
            lambda: rows.policy_(work, targets, Scaling(), PolicyObjective(), inputs), lambda: copy.copy_(logits),
            bar=1 / 0.6, rounds=15,
        )  # fmt: skip

    def test_logprob_rows(self, versus: Versus, logits: torch.Tensor) -> None:
        targets, half = torch.randint(logits.shape[1], (self.count,)), torch.empty_like(logits[: self.count // 2])
        versus(
            "log-probability rows / copy of half the rows (equal traffic)",
            lambda: logprobs_from_logits(logits, targets), lambda: half.copy_(logits[: self.count // 2]),
            bar=1 / 0.6, rounds=15,
        )  # fmt: skip

    def test_sample_rows(self, versus: Versus, logits: torch.Tensor) -> None:
        stream, half = sampling(self.count), torch.empty_like(logits[: self.count // 2])
        versus(
            "sample_from_logits / copy of half the rows (equal traffic)",
            lambda: sample_from_logits(logits, **stream), lambda: half.copy_(logits[: self.count // 2]),
            bar=1 / 0.6, rounds=15,
        )  # fmt: skip
