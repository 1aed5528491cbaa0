"""What every side of a comparison is given: tokens, head, advantages; and the answer in float64."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SEQUENCES = 32


class Answer(NamedTuple):
    """The loss, its gradients [N, H] and [V, H], and the log-probabilities [N], in float64."""

    loss: Tensor
    hidden: Tensor
    weight: Tensor
    logprobs: Tensor


class Batch:
    """32 sequences of equal length and their head.

    Args:
        tokens: N, rounded down to a multiple of 32.
        hidden_size: H.
        vocabulary: V.
        zero: share of the sequences whose advantage is 0.
    """

    def __init__(self, tokens: int, hidden_size: int, vocabulary: int, zero: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(0)
        sequences = min(SEQUENCES, tokens)
        self.length = tokens // sequences
        n = sequences * self.length
        self.hidden = torch.randn(n, hidden_size, generator=generator).requires_grad_()
        self.weight = (torch.randn(vocabulary, hidden_size, generator=generator) * 0.03).requires_grad_()
        self.targets = torch.randint(vocabulary, (n,), generator=generator)
        self.cu_seqlens = torch.arange(0, n + 1, self.length, dtype=torch.int32)
        self.advantages = torch.randn(sequences, generator=generator)
        self.advantages[torch.randperm(sequences, generator=generator)[: int(zero * sequences)]] = 0
        self.of_token = self.advantages.repeat_interleave(self.length)

    def clear(self) -> None:
        """Drop the gradients."""
        self.hidden.grad = self.weight.grad = None

    def gradient_bytes(self) -> int:
        """What the two gradients take."""
        return 4 * (self.hidden.numel() + self.weight.numel())

    def answer(self) -> Answer:
        """Loss and gradients in float64, written out, 256 rows at a time."""
        hidden, weight = self.hidden.detach().double(), self.weight.detach().double()
        grads, of_weight, logprobs = [], torch.zeros_like(weight), []
        for rows in torch.arange(len(hidden)).split(256):
            z = hidden[rows] @ weight.T
            logp = z.log_softmax(-1)
            picked = self.targets[rows][:, None]
            logprobs.append(logp.gather(1, picked)[:, 0])
            dz = logp.exp_().scatter_add_(1, picked, -torch.ones(len(rows), 1, dtype=torch.float64))
            dz *= (self.of_token[rows].double() / len(hidden))[:, None]  # of -A logp: A (p - 1[target])
            grads.append(dz @ weight)
            of_weight.addmm_(dz.T, hidden[rows])
        found = torch.cat(logprobs)
        return Answer(-(self.of_token.double() * found).mean(), torch.cat(grads), of_weight, found)

    def gradient_error(self, answer: Answer) -> float:
        """The larger of the two gradients' relative errors (in the Frobenius norm)."""
        assert self.hidden.grad is not None and self.weight.grad is not None
        pairs = (self.hidden.grad, answer.hidden), (self.weight.grad, answer.weight)
        return max(((found - right).norm() / right.norm()).item() for found, right in pairs)
