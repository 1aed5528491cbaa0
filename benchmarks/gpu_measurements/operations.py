"""The machine's limits and the operations, each a generator of results that are kept as soon as they are yielded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

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

from . import peers
from .clock import Clock, Time

Result = dict[str, Any]
SEQUENCE = 512  # tokens of a sequence


class Setting:
    """Where and how finely to measure. `small`: whether it runs, not how fast; bars are for the full shapes."""

    def __init__(self, device: torch.device, small: bool):
        self.device, self.small = device, small
        self.dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        self.generator = torch.Generator(device).manual_seed(0)

    @cached_property
    def clock(self) -> Clock:
        return Clock(self.device, 0.02 if self.small else 0.7)

    def normal(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        drawn = torch.randn(*shape, generator=self.generator, device=self.device, dtype=self.dtype)
        return drawn.mul_(scale)

    def integers(self, high: int, count: int) -> torch.Tensor:
        return torch.randint(high, (count,), generator=self.generator, device=self.device)

    def stream(self, count: int) -> dict[str, Any]:
        ids = torch.arange(count, device=self.device)
        return {
            "seed": torch.ones((), dtype=torch.int64, device=self.device),
            "sequence_ids": ids,
            "positions": ids * 0,
        }


class Batch:
    """N tokens of sequences of 512, their head and their advantages; gradients are wanted."""

    def __init__(self, setting: Setting, n: int, h: int, v: int):
        self.hidden = setting.normal(n, h).requires_grad_()
        self.weight = setting.normal(v, h, scale=h**-0.5).requires_grad_()
        self.targets = setting.integers(v, n)
        sequences = max(2, n // SEQUENCE)
        self.bounds = torch.linspace(0, n, sequences + 1).int().to(setting.device)
        self.advantages = torch.randn(sequences, generator=setting.generator, device=setting.device)
        self.of_token = self.advantages.repeat_interleave(self.bounds.diff().long())
        self.sparse = self.advantages.clone()
        self.sparse[: round(0.7 * sequences)] = 0

    def clear(self) -> None:
        self.hidden.grad = self.weight.grad = None

    def loss(self, advantages: torch.Tensor, skip: bool = False) -> None:
        """As a trainer calls it, who has left out zero rows; `skip`: the device is asked for them, and waited for."""
        self.clear()
        linear_policy_loss(
            self.hidden, self.weight, self.targets, advantages, self.bounds, objective=PolicyObjective(),
            skip_zero_rows=skip,
        ).loss.backward()  # fmt: skip

    @torch.no_grad()
    def three_products(self) -> None:
        z = self.hidden @ self.weight.T
        z @ self.weight
        z.T @ self.hidden

    @torch.no_grad()
    def product(self) -> Any:
        return self.hidden @ self.weight.T


def compared(
    setting: Setting, case: str, shape: Any, against: str, ours: Callable[[], Any], other: Callable[[], Any],
    bar: float | None = None, predict: list[Any] | None = None,
) -> Iterator[Result]:  # fmt: skip
    times = setting.clock.alternately({"ours": ours, "other": other})
    yield row(setting, case, shape, against, times["ours"], times["other"].device, bar=bar, predict=predict)


def row(setting: Setting, case: str, shape: Any, against: str, ours: Time, other: float, **more: Any) -> Result:
    if setting.small:
        more["bar"] = None
    share = more.get("at_least", False)
    ratio = other / ours.device if share else ours.device / other
    return {
        "case": case, "shape": str(tuple(shape)), "against": against, "ours_ms": ours.device, "host_ms": ours.host,
        "other_ms": other, "ratio": ratio, **more,
    }  # fmt: skip


def versus_peer(
    setting: Setting, case: str, shape: tuple[int, int, int], peer: str, make: Callable[[Batch], Any],
    ours: Callable[[Batch], None],
) -> Iterator[Result]:  # fmt: skip
    """Against a peer that may not be there, or not able to do this."""
    batch = Batch(setting, *shape)
    try:
        other = make(batch)
        other()
    except Exception as error:  # whatever a peer raises, its text is the result
        text = f"{type(error).__name__}: {error}"
        yield {"case": case, "shape": str(shape), "against": peer, "missing": text[:500]}
        if setting.device.type == "cuda":
            torch.cuda.synchronize()  # raises where the peer has broken the process: it is replaced then
        return
    yield from compared(setting, case, shape, peer, lambda: ours(batch), other, bar=1.0)


# --- limits, errors ---------------------------------------------------------------------------------------------------


def limit_copy(setting: Setting, count: int) -> Iterator[Result]:
    source, target = torch.ones(count, device=setting.device), torch.empty(count, device=setting.device)
    ms = setting.clock.alternately({"copy": lambda: target.copy_(source)})["copy"].device
    yield {"limits": {"copy GB/s": 8 * count / ms / 1e6}}


@torch.no_grad()
def limit_product(setting: Setting, n: int, h: int, v: int) -> Iterator[Result]:
    a, b = setting.normal(n, h), setting.normal(v, h)
    ms = setting.clock.alternately({"product": lambda: a @ b.T})["product"].device
    yield {"limits": {f"{str(setting.dtype).removeprefix('torch.')} product TFLOP/s": 2 * n * h * v / ms / 1e9}}


def errors(setting: Setting, n: int, h: int, v: int, dtype: torch.dtype) -> Iterator[Result]:
    """The 2x rule: the gradient's distance from float64 against that of plain PyTorch in the same dtype."""
    exact = [setting.normal(n, h).to(dtype).double(), setting.normal(v, h, scale=h**-0.5).to(dtype).double()]
    targets = setting.integers(v, n)
    bounds = torch.tensor([0, n // 3, n], dtype=torch.int32, device=setting.device)
    advantages = torch.tensor([1.3, -0.7], device=setting.device)
    of_token = advantages.repeat_interleave(bounds.diff().long())
    gradients = {}
    for name, kind in (("truth", torch.float64), ("plain", dtype), ("ours", dtype)):
        hidden, weight = (t.detach().clone().to(kind).requires_grad_() for t in exact)
        if name == "ours":
            loss = linear_policy_loss(hidden, weight, targets, advantages, bounds, objective=PolicyObjective()).loss
        else:
            logits = hidden @ weight.T
            logits = logits if kind == torch.float64 else logits.float()
            loss = -(of_token * logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]).mean()
        loss.backward()
        assert hidden.grad is not None and weight.grad is not None
        gradients[name] = (hidden.grad.double(), weight.grad.double())
    for what, truth, plain, ours in zip(("hidden", "weight"), *gradients.values(), strict=True):
        far = [float((g - truth).norm() / truth.norm()) for g in (ours, plain)]
        yield {
            "gradient": what, "dtype": str(dtype).removeprefix("torch."), "ours": far[0], "plain": far[1],
            "met": far[0] <= 2 * far[1] + 1e-7,
        }  # fmt: skip


# --- operations -------------------------------------------------------------------------------------------------------

LOSS_CASE, LOGPROBS_CASE = "linear_policy_loss, fwd + bwd", "linear_logprobs, forward"


def loss(setting: Setting, *shape: int) -> Iterator[Result]:
    batch = Batch(setting, *shape)
    yield from compared(
        setting, LOSS_CASE, shape, "three bare products", lambda: batch.loss(batch.advantages), batch.three_products,
        bar=1.15, predict=["loss_ratio", *shape],
    )  # fmt: skip


def sparse_loss(setting: Setting, *shape: int) -> Iterator[Result]:
    batch = Batch(setting, *shape)
    yield from compared(
        setting, "the same, 70% of rows at 0", shape, "every advantage", lambda: batch.loss(batch.sparse, skip=True),
        lambda: batch.loss(batch.advantages), bar=0.36, predict=["sparse_ratio", *shape],
    )  # fmt: skip


def loss_memory(setting: Setting, *shape: int) -> Iterator[Result]:
    """Peak beyond the inputs and their gradients, in GiB."""
    batch = Batch(setting, *shape)
    batch.loss(batch.advantages)
    batch.clear()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    batch.loss(batch.advantages)
    torch.cuda.synchronize()
    gradients = sum(t.grad.numel() * t.grad.element_size() for t in (batch.hidden, batch.weight) if t.grad is not None)
    gib = (torch.cuda.max_memory_allocated() - before - gradients) / 2**30
    yield {
        "case": "memory beyond inputs and gradients, GiB", "shape": str(shape), "against": "1 GiB", "ours_ms": gib,
        "other_ms": 1.0, "ratio": gib, "bar": None if setting.small else 1.25, "predict": ["loss_memory", *shape],
    }  # fmt: skip


def loss_peer(setting: Setting, peer: str, *shape: int) -> Iterator[Result]:
    yield from versus_peer(
        setting, LOSS_CASE, shape, peer, peers.LOSS[peer], lambda batch: batch.loss(batch.advantages)  # type: ignore[arg-type]
    )  # fmt: skip


def logprobs(setting: Setting, *shape: int) -> Iterator[Result]:
    batch = Batch(setting, *shape)

    @torch.no_grad()
    def score() -> Any:
        return linear_logprobs(batch.hidden, batch.weight, batch.targets)

    yield from compared(
        setting, LOGPROBS_CASE, shape, "bare product", score, batch.product, bar=1.15,
        predict=["logprobs_ratio", *shape],
    )  # fmt: skip


def logprobs_peer(setting: Setting, peer: str, *shape: int) -> Iterator[Result]:
    @torch.no_grad()
    def score(batch: Batch) -> None:
        linear_logprobs(batch.hidden, batch.weight, batch.targets)

    yield from versus_peer(setting, LOGPROBS_CASE, shape, peer, peers.LOGPROBS[peer], score)  # type: ignore[arg-type]


@torch.no_grad()
def sample(setting: Setting, b: int, h: int, v: int) -> Iterator[Result]:
    hidden, weight = setting.normal(b, h), setting.normal(v, h, scale=h**-0.5)
    stream = setting.stream(b)

    def plain() -> Any:
        logprobs = (hidden @ weight.T).float().log_softmax(-1)
        token = torch.multinomial(logprobs.exp(), 1)
        return token, logprobs.gather(1, token)

    works = {"ours": lambda: linear_sample(hidden, weight, **stream), "bare": lambda: hidden @ weight.T, "plain": plain}
    times = setting.clock.alternately(works)
    for against, key, bar, predict in (
        ("bare product", "bare", 1.10, ["sample_ratio", b, h, v]),
        ("plain PyTorch", "plain", 1.0, None),
    ):
        yield row(
            setting, "linear_sample", (b, h, v), against, times["ours"], times[key].device, bar=bar, predict=predict
        )


@torch.no_grad()
def row_kernel(setting: Setting, kind: str, n: int, v: int) -> Iterator[Result]:
    """The share of a copy's bandwidth: a copy reads and writes every byte; kernels that only read move half of that."""
    z = torch.randn(n, v, generator=setting.generator, device=setting.device)
    other, targets, stream = torch.empty_like(z), setting.integers(v, n), setting.stream(n)
    works: dict[str, tuple[Callable[[], Any], float]] = {}
    if kind == "policy":
        advantages = torch.randn(n, generator=setting.generator, device=setting.device)
        inputs = TokenInputs(advantages, torch.full((n,), 1.0 / n, device=setting.device), None, None)
        scratch = z.clone()
        works["policy"] = lambda: rows.policy_(scratch, targets, Scaling(), PolicyObjective(), inputs), 1.0
    elif kind == "logprob":
        works["logprob"] = lambda: logprobs_from_logits(z, targets), 0.5
    else:
        filters = {"sample": {}, "sample, top-p 0.9": {"top_p": 0.9}, "sample, top-k 50": {"top_k": 50}}[kind]
        works[kind] = lambda: sample_from_logits(z, **stream, **filters), 0.5
    work, share = works[kind]
    times = setting.clock.alternately({"ours": work, "copy": lambda: other.copy_(z)})
    backend = backends.select(setting.device, torch.float32)
    yield row(
        setting, f"{kind} rows ({backend})", (n, v), "copy bandwidth", times["ours"], times["copy"].device * share,
        bar=None if "," in kind else 0.85, at_least=True, predict=None if "," in kind else ["row_share", kind],
    )  # fmt: skip
