"""What the operations compete with, where it is installed: {name: how to make its work}.

Making or running a peer may raise anything; the measurement then says "missing", with the text.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .operations import Batch

Work = Callable[[], Any]


def plain_loss(batch: Batch) -> Work:
    def work() -> None:
        batch.clear()
        logits = (batch.hidden @ batch.weight.T).float()
        logprobs = logits.log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
        (-(batch.of_token * logprobs).mean()).backward()

    return work


def liger_grpo(batch: Batch) -> Work:
    from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOLoss

    sequences = len(batch.bounds) - 1
    hidden, targets = batch.hidden.view(sequences, -1, batch.hidden.shape[1]), batch.targets.view(sequences, -1)
    grpo = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type="dapo", compiled=True)
    mask = torch.ones_like(targets)
    advantages = batch.of_token.view(sequences, -1)[:, 0].contiguous()

    def work() -> None:
        batch.clear()
        loss, _ = grpo(hidden, batch.weight, targets, mask, advantages)
        loss.backward()

    return work


def liger_cross_entropy(batch: Batch) -> Work:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    def work() -> None:
        batch.clear()
        losses = LigerFusedLinearCrossEntropyFunction.apply(
            batch.hidden, batch.weight, batch.targets, None, None, -100, 0.0, 0.0, "none"
        )
        ((losses[0] if isinstance(losses, tuple) else losses) * batch.of_token).mean().backward()

    return work


def cut_cross_entropy(batch: Batch) -> Work:
    from cut_cross_entropy import linear_cross_entropy

    def work() -> None:
        batch.clear()
        (
            linear_cross_entropy(batch.hidden, batch.weight, batch.targets, reduction="none") * batch.of_token
        ).mean().backward()

    return work


def flashinfer_policy(batch: Batch) -> Work:
    """Blackwell alone: elsewhere its text is the result. Given today's log-probabilities, its ratio is 1, as here."""
    from flashinfer.chunked_lm_head import chunked_lm_head_loss

    weights = (batch.of_token / len(batch.targets)).float()
    logprobs = plain_logprobs(batch)().float()

    def work() -> None:
        batch.clear()
        chunked_lm_head_loss(
            batch.hidden, batch.weight, batch.targets, objective="policy", infer_logp=logprobs, loss_weights=weights
        ).backward()

    return work


def quack_cross_entropy(batch: Batch) -> Work:
    """It has no weights of tokens: the gradient is that of advantages which are all 1, for the same work."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    def work() -> None:
        batch.clear()
        chunked_linear_cross_entropy(batch.hidden, batch.weight, batch.targets).backward()

    return work


#: Losses with the same gradients: -sum(A logp) / tokens (quack's: with A = 1).
LOSS: dict[str, Callable[[Batch], Work]] = {
    "plain PyTorch": plain_loss,
    "Liger chunked GRPO": liger_grpo,
    "Liger fused cross-entropy, scaled": liger_cross_entropy,
    "cut-cross-entropy": cut_cross_entropy,
    "FlashInfer chunked_lm_head_loss": flashinfer_policy,
    "quack chunked cross-entropy, all advantages 1": quack_cross_entropy,
}


def plain_logprobs(batch: Batch) -> Work:
    @torch.no_grad()
    def work() -> Any:
        logits = (batch.hidden @ batch.weight.T).float()
        return logits.log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]

    return work


def trl_logprobs(batch: Batch) -> Work:
    from trl.trainer.utils import selective_log_softmax

    @torch.no_grad()
    def work() -> Any:
        parts = zip(batch.hidden.split(1024), batch.targets.split(1024), strict=True)
        return torch.cat([selective_log_softmax(h @ batch.weight.T, t) for h, t in parts])

    return work


LOGPROBS: dict[str, Callable[[Batch], Work]] = {
    "plain PyTorch": plain_logprobs,
    "TRL selective_log_softmax, chunked": trl_logprobs,
}
