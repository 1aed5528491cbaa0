"""The sides of each operation: ours, the peers, and the limit. Each makes its work from a Batch, or says why not.

A peer that is missing is named with the reason. All sides get the same tensors, dtype and threads.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bandit_rft import PolicyObjective, linear_logprobs, linear_policy_loss, linear_sample

from .batch import Batch
from .record import OURS

Work = Callable[[], Any]
PLAIN, COMPILED = "plain PyTorch", "torch.compile, max-autotune"
TORCH, TRL, LIGER, CCE = (
    "F.linear_cross_entropy",
    "TRL ChunkedLogProbFunction",
    "Liger chunked GRPO",
    "cut-cross-entropy",
)
PRODUCTS, PRODUCT = "three bare products", "the bare product"


class Missing(Exception):
    """This peer cannot be measured here; the text says why."""


def need(module: str, package: str) -> None:
    """Raise Missing unless the module can be imported."""
    if importlib.util.find_spec(module) is None:
        raise Missing(f"not installed: pip install {package}")


def need_gpu(module: str, package: str) -> Callable[[Batch], Work]:
    """A peer that only a GPU has; `benchmarks/gpu_check.py` compares with such."""

    def make(batch: Batch) -> Work:
        raise Missing(f"its kernels need a CUDA GPU ({package})")

    return make


def plain_loss(hidden: Tensor, weight: Tensor, targets: Tensor, advantages: Tensor) -> Tensor:
    """-mean(A logp), as everybody writes it: the logits [N, V] exist."""
    logprobs = torch.log_softmax(hidden @ weight.T, -1).gather(1, targets[:, None])[:, 0]
    return -(advantages * logprobs).mean()


def plain_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The log-probabilities alone."""
    return torch.log_softmax(hidden @ weight.T, -1).gather(1, targets[:, None])[:, 0]


def trained(batch: Batch, loss: Callable[[], Tensor]) -> Work:
    """Forward and backward; the gradients start from nothing each time."""

    def work() -> Tensor:
        batch.clear()
        value = loss()
        value.backward()
        return value.detach()

    return work


def ours_loss(batch: Batch) -> Work:
    objective = PolicyObjective()
    return trained(
        batch,
        lambda: (
            linear_policy_loss(
                batch.hidden, batch.weight, batch.targets, batch.advantages, batch.cu_seqlens, objective=objective
            ).loss
        ),
    )


def eager_loss(batch: Batch) -> Work:
    return trained(batch, lambda: plain_loss(batch.hidden, batch.weight, batch.targets, batch.of_token))


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """As a user would ask for speed."""
    return torch.compile(function, mode="max-autotune", dynamic=False)


def compiled_loss(batch: Batch) -> Work:
    function = compiled(plain_loss)
    return trained(batch, lambda: function(batch.hidden, batch.weight, batch.targets, batch.of_token))


def torch_nll(batch: Batch) -> Tensor:
    """-logp of each token by torch's own fused operation, in chunks."""
    if not hasattr(F, "linear_cross_entropy"):
        raise Missing("needs torch >= 2.13")
    options = torch.nn.LinearCrossEntropyOptions()  # type: ignore[attr-defined]
    nll: Tensor = F.linear_cross_entropy(batch.hidden, batch.weight, batch.targets, reduction="none", options=options)
    return nll


def torch_loss(batch: Batch) -> Work:
    return trained(batch, lambda: (torch_nll(batch) * batch.of_token).mean())


def trl_logprobs_of(batch: Batch) -> Tensor:
    need("trl", "trl")
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    inputs = batch.hidden, batch.weight, None, batch.targets, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ()
    logprobs: Tensor = ChunkedLogProbFunction.apply(*inputs)[0]
    return logprobs


def trl_loss(batch: Batch) -> Work:
    return trained(batch, lambda: -(trl_logprobs_of(batch) * batch.of_token).mean())


def liger_loss(batch: Batch) -> Work:
    need("liger_kernel", "liger-kernel")
    from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOLoss

    sequences = len(batch.advantages)
    grpo = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type="dapo", compiled=True)
    targets = batch.targets.view(sequences, -1)
    mask = torch.ones_like(targets)

    def loss() -> Tensor:
        hidden = batch.hidden.view(sequences, batch.length, -1)
        value: Tensor = grpo(hidden, batch.weight, targets, mask, batch.advantages)[0]
        return value

    return trained(batch, loss)


def cce_nll(batch: Batch) -> Tensor:
    need("cut_cross_entropy", "cut-cross-entropy")
    from cut_cross_entropy import linear_cross_entropy

    nll: Tensor = linear_cross_entropy(
        batch.hidden, batch.weight, batch.targets, reduction="none", impl="torch_compile"
    )
    return nll


def cce_loss(batch: Batch) -> Work:
    return trained(batch, lambda: (cce_nll(batch) * batch.of_token).mean())


def three_products(batch: Batch) -> Work:
    @torch.no_grad()
    def work() -> None:
        z = batch.hidden @ batch.weight.T
        z @ batch.weight, z.T @ batch.hidden

    return work


#: -mean(A logp) and its gradients. Liger's ratio is 1 in value, so its loss is -mean(A) and its gradient the same.
LOSS: dict[str, Callable[[Batch], Work]] = {
    OURS: ours_loss,
    PLAIN: eager_loss,
    COMPILED: compiled_loss,
    TORCH: torch_loss,
    TRL: trl_loss,
    LIGER: liger_loss,
    CCE: cce_loss,
    "FlashInfer chunked_lm_head_loss": need_gpu("flashinfer", "flashinfer-python"),
    "quack chunked linear cross-entropy": need_gpu("quack", "quack-kernels"),
    PRODUCTS: three_products,
}


def forward(call: Work) -> Work:
    """Without gradients."""

    @torch.no_grad()
    def work() -> Any:
        return call()

    return work


def compiled_logprobs(batch: Batch) -> Work:
    function = compiled(plain_logprobs)
    return forward(lambda: function(batch.hidden, batch.weight, batch.targets))


#: The log-probabilities [N], forward alone.
LOGPROBS: dict[str, Callable[[Batch], Work]] = {
    OURS: lambda batch: forward(lambda: linear_logprobs(batch.hidden, batch.weight, batch.targets)),
    PLAIN: lambda batch: forward(lambda: plain_logprobs(batch.hidden, batch.weight, batch.targets)),
    COMPILED: compiled_logprobs,
    TORCH: lambda batch: forward(lambda: -torch_nll(batch)),
    TRL: lambda batch: forward(lambda: trl_logprobs_of(batch)),
    CCE: lambda batch: forward(lambda: -cce_nll(batch)),
    PRODUCT: lambda batch: forward(lambda: batch.hidden @ batch.weight.T),
}

#: The same where a loss is made of them, -mean(A logp): for the peers that is what they compute for LOSS, too.
LOGPROBS_LEARNED: dict[str, Callable[[Batch], Work]] = {
    OURS: lambda batch: trained(
        batch, lambda: -(linear_logprobs(batch.hidden, batch.weight, batch.targets) * batch.of_token).mean()
    ),
    **{name: LOSS[name] for name in (PLAIN, COMPILED, TORCH, TRL, CCE, PRODUCTS)},
}


def draw(logits: Tensor) -> tuple[Tensor, Tensor]:
    """A token a row and its log-probability."""
    token = torch.multinomial(logits.softmax(-1), 1)
    return token, logits.log_softmax(-1).gather(1, token)


def plain_draw(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The same from the head."""
    return draw(hidden @ weight.T)


def draw_error(right: Tensor, drawn: tuple[Tensor, Tensor]) -> float:
    """The largest of the drawn tokens' log-probabilities; `right` [N, V] has those of all, in float64."""
    token, logprob = (part.view(-1) for part in drawn)
    return (right.gather(1, token[:, None])[:, 0] - logprob).abs().max().item()


def our_draws(batch: Batch) -> Work:
    rows = torch.arange(len(batch.hidden))
    stream: dict[str, Any] = {"seed": 1, "sequence_ids": rows, "positions": rows * 0}
    return forward(lambda: linear_sample(batch.hidden, batch.weight, **stream)[:2])


def compiled_draws(batch: Batch) -> Work:
    function = compiled(plain_draw)
    return forward(lambda: function(batch.hidden, batch.weight))


#: (tokens, log-probabilities), drawn from the head.
DRAWS: dict[str, Callable[[Batch], Work]] = {
    OURS: our_draws,
    PLAIN: lambda batch: forward(lambda: plain_draw(batch.hidden, batch.weight)),
    COMPILED: compiled_draws,
    "FlashInfer sampling": need_gpu("flashinfer", "flashinfer-python"),
}
LIMITS = (PRODUCTS, PRODUCT)


def role(name: str) -> str:
    """Of a side: ours, the limit, or a peer."""
    return "ours" if name == OURS else "limit" if name in LIMITS else "peer"


def working(
    sides: dict[str, Callable[[Any], Work]], batch: Any, check: Callable[[Any], float] | None = None
) -> tuple[dict[str, Work], dict[str, str], dict[str, float]]:
    """({side: work that has run once}, {side: why it is missing}, {side: what `check` says of its result}).

    Sides make their work from the batch. A limit computes something else and is not checked.
    """
    works: dict[str, Work] = {}
    missing: dict[str, str] = {}
    errors: dict[str, float] = {}
    torch.compiler.reset()  # what was compiled for another shape would make the next one dynamic
    for name, make in sides.items():
        try:
            work = make(batch)
            result = work()
            if check is not None and role(name) != "limit":
                errors[name] = check(result)
        except Missing as reason:
            missing[name] = str(reason)
        except Exception as error:  # whatever a peer raises, its text is the result
            if name == OURS:
                raise
            missing[name] = f"{type(error).__name__}: {error}"[:300]
        else:
            works[name] = work
    return works, missing, errors
