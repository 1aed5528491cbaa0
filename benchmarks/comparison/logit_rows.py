"""Operations on rows of logits that exist: who computes them, each work made from a Logits, and how wrong they are."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bandit_rft import PolicyObjective, logprobs_from_logits, policy_loss_from_logits, sample_from_logits

from .peers import COMPILED, PLAIN, Work, compiled, draw, draw_error, forward
from .record import OURS

COPY = "copying as many bytes"
FILTERED = "topk, sort, cumsum, multinomial"
LENGTH = 16  # tokens of a sequence
KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "level": lambda z: z * 0.01,
    "normal": lambda z: z,
    "peaked": lambda z: z * 6,
    "half at -1e9": lambda z: z.masked_fill(torch.rand_like(z) < 0.5, -1e9),
}


class Logits:
    """Rows of logits, with a target and an advantage each."""

    def __init__(self, rows: int, vocabulary: int, kind: str = "normal", learned: bool = False):
        torch.manual_seed(0)
        self.z = KINDS[kind](torch.randn(rows, vocabulary)).requires_grad_(learned)
        self.targets = torch.randint(vocabulary, (rows,))
        self.advantages = torch.randn(rows)
        self.cu_seqlens = torch.arange(0, rows + 1, min(LENGTH, rows), dtype=torch.int32)

    def clear(self) -> None:
        """Drop the gradient."""
        self.z.grad = None

    def gradient_bytes(self) -> int:
        """What the gradient takes."""
        return 4 * self.z.numel()

    def logprob_error(self, found: Tensor) -> float:
        """The largest of the targets' log-probabilities."""
        right = self.z.detach().double().log_softmax(-1).gather(1, self.targets[:, None])[:, 0]
        return (right - found.detach()).abs().max().item()

    def gradient_error(self, found: Tensor) -> float:
        """Of the gradient of -mean(A logp), in the Frobenius norm, relative."""
        right = self.z.detach().double().softmax(-1)
        right[torch.arange(len(right)), self.targets] -= 1
        right *= (self.advantages.double() / len(right))[:, None]
        return ((right - found).norm() / right.norm()).item()

    def draw_error(self, drawn: tuple[Tensor, Tensor]) -> float:
        """The largest of the drawn tokens' log-probabilities."""
        return draw_error(self.z.detach().double().log_softmax(-1), drawn)


def plain_logprobs(z: Tensor, targets: Tensor) -> Tensor:
    return z.log_softmax(-1).gather(1, targets[:, None])[:, 0]


def plain_loss(z: Tensor, targets: Tensor, advantages: Tensor, cu_seqlens: Tensor) -> Tensor:
    return -(advantages * plain_logprobs(z, targets)).mean()


def plain_filtered_draw(logits: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
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


def our_policy_loss(z: Tensor, targets: Tensor, advantages: Tensor, cu_seqlens: Tensor) -> Tensor:
    return policy_loss_from_logits(z, targets, advantages, cu_seqlens, objective=PolicyObjective()).loss


def our_logprob_loss(z: Tensor, targets: Tensor, advantages: Tensor, cu_seqlens: Tensor) -> Tensor:
    return -(advantages * logprobs_from_logits(z, targets)).mean()


def our_draw(z: Tensor, **filters: Any) -> tuple[Tensor, Tensor]:
    rows = torch.arange(len(z))
    drawn = sample_from_logits(z, seed=1, sequence_ids=rows, positions=torch.zeros_like(rows), **filters)
    return drawn.tokens, drawn.logprobs


class Operation(NamedTuple):
    """Its sides by name, each called with what `arguments` takes of a Logits; what an error is, and if it learns."""

    sides: dict[str, Callable[[], Callable[..., Any]]]
    arguments: Callable[[Logits], tuple[Tensor, ...]]
    error: Callable[[Logits, Any], float]
    kind: str = "normal"
    learned: bool = False

    def logits(self, rows: int, vocabulary: int) -> Logits:
        """What the works are made from."""
        return Logits(rows, vocabulary, self.kind, self.learned)

    def works(self) -> dict[str, Callable[[Logits], Work]]:
        """{side: what makes its work}."""
        return {side: partial(self._work, make) for side, make in self.sides.items()}

    def _work(self, make: Callable[[], Callable[..., Any]], batch: Logits) -> Work:
        function, arguments = make(), self.arguments(batch)
        if not self.learned:
            return forward(lambda: function(*arguments))

        def learn() -> Tensor | None:
            batch.clear()
            function(*arguments).backward()
            return batch.z.grad

        return learn


def _operation(ours: Callable[..., Any], plain: Callable[..., Any], name: str = PLAIN, **more: Any) -> Operation:
    return Operation({OURS: lambda: ours, name: lambda: plain, COMPILED: lambda: compiled(plain)}, **more)


LEARNED: dict[str, Any] = {
    "arguments": lambda b: (b.z, b.targets, b.advantages, b.cu_seqlens), "error": Logits.gradient_error, "learned": True
}  # fmt: skip
#: By the name of the case.
ROWS: dict[str, Operation] = {
    "logprobs_from_logits, forward": _operation(
        logprobs_from_logits, plain_logprobs, arguments=lambda b: (b.z, b.targets), error=Logits.logprob_error
    ),
    "policy_loss_from_logits, forward + backward": _operation(our_policy_loss, plain_loss, **LEARNED),
    "logprobs_from_logits, forward + backward": _operation(our_logprob_loss, plain_loss, **LEARNED),
    "sample_from_logits": _operation(our_draw, draw, arguments=lambda b: (b.z,), error=Logits.draw_error),
}  # fmt: skip

FILTERS: dict[str, Operation] = {
    f"sample_from_logits, top_k {top_k}, top_p {top_p}, {kind}": _operation(
        partial(our_draw, top_k=top_k, top_p=top_p), partial(plain_filtered_draw, top_k=top_k, top_p=top_p), FILTERED,
        arguments=lambda b: (b.z,), error=Logits.draw_error, kind=kind,
    )
    for top_k, top_p in ((0, 0.9), (50, 1.0), (1000, 0.9)) for kind in KINDS
}  # fmt: skip
