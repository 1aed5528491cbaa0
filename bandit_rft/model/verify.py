"""A spot check of the fused path: one sequence's loss and gradient, once more by plain PyTorch.

The trainer never sees a logit: packed attention, fused head and gradients computed in the forward call stand in for
them. Here one sequence goes the long way: the model's own forward on it alone, its logits, log_softmax, the definition
of the loss (bandit_rft.ops.reference), autograd. In float32, whatever the model's dtype.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bandit_rft import ops
from bandit_rft.model.policy import Policy
from bandit_rft.ops import reference


@dataclass(frozen=True)
class Verification:
    """How far the fused path is from plain PyTorch, for one sequence.

    Attributes:
        loss: of the fused path.
        reference_loss: of plain PyTorch.
        loss_error: |difference| / sum of the tokens' |terms|; a loss may be next to 0 where its terms are not.
        logprob_error: largest |difference| of a token's log-probability, nats.
        gradient_error: norm of the difference / norm of the gradient, over all trained parameters together.
        gradient_norm: of the reference.
    """

    loss: float
    reference_loss: float
    loss_error: float
    logprob_error: float
    gradient_error: float
    gradient_norm: float

    def worst(self) -> float:
        """The larger one of the two relative errors; NaN if either is NaN."""
        return max(self.loss_error, self.gradient_error, key=lambda e: (e != e, e))


def verify_sequence(
    policy: Policy,
    prompt: Sequence[int],
    completion: Sequence[int],
    *,
    objective: ops.PolicyObjective | None = None,
    advantage: float = 1.0,
    temperature: float = 1.0,
    off_policy: bool = False,
) -> Verification:
    """Compare the fused path's loss and gradient of one completion with those from the model's own logits.

    The sequence is packed between two others (its tokens in reverse), whose loss counts for nothing: were they seen,
    the result would differ. Gradients in `.grad` stay as they are, and so do the weights.

    A ratio and a KL term need another policy. It is made up: this one's log-probabilities, moved so far that clipped
    and unclipped ratios both occur, and none next to a bound, where rounding would decide.

    It costs two forward and backward passes over the sequence, two gradients of all trained parameters, and one
    [completion, vocabulary] tensor of logits; where the model is not float32 (or float64) a float32 copy of it, too.

    Args:
        policy: the model, whose trained parameters' gradients are compared.
        prompt: token ids, at least one.
        completion: token ids, at least one.
        objective: the loss, with all its terms; plain REINFORCE by default.
        advantage: of the completion, not 0.
        temperature: of the softmax.
        off_policy: whether the loss is given behavior log-probabilities; for the kind "importance" always.

    Raises:
        ValueError: for an empty prompt or completion, or an advantage of 0 or not finite.
    """
    if not len(prompt) or not len(completion):
        raise ValueError(f"verify_sequence needs tokens; got {len(prompt)} of a prompt, {len(completion)} completed")
    if advantage == 0 or not abs(advantage) < float("inf"):
        raise ValueError(f"advantage must be finite and not 0; got {advantage}")
    objective = objective or ops.PolicyObjective("reinforce")
    ids = torch.tensor([*prompt, *completion], device=policy.device)
    arguments: dict[str, Any] = {"objective": objective, "advantage": advantage, "temperature": temperature}
    with torch.enable_grad():
        own, others = _plain(policy, ids, len(completion), off_policy=off_policy, **arguments)
        own_loss, own_logprobs, own_gradients = own
        loss, logprobs, gradients = _fused(policy, ids, len(completion), others, **arguments)
    difference = norm = 0.0
    for fused, plain in zip(gradients, own_gradients, strict=True):
        one, other = (torch.zeros(()) if g is None else g.detach().double().cpu() for g in (fused, plain))
        difference += float((one - other).pow(2).sum())
        norm += float(other.pow(2).sum())
    size = own_logprobs.abs() if objective.aggregation == "seq-mean-token-sum" else own_logprobs.abs().mean()
    terms = abs(advantage) * float(size.sum())
    return Verification(
        loss=loss,
        reference_loss=own_loss,
        loss_error=abs(loss - own_loss) / max(terms, abs(own_loss), 1e-12),
        logprob_error=float((logprobs - own_logprobs).abs().max()),
        gradient_error=difference**0.5 / max(norm**0.5, 1e-30),
        gradient_norm=norm**0.5,
    )


Result = tuple[float, Tensor, tuple[Tensor | None, ...]]


def _fused(
    policy: Policy,
    ids: Tensor,
    count: int,
    others: dict[str, Any],
    *,
    objective: ops.PolicyObjective,
    advantage: float,
    temperature: float,
) -> Result:
    """(loss, log-probabilities [count], gradients) as the trainer computes them, packed between two neighbours."""
    length = len(ids) - 1
    beside = ids.flip(0)[: max(1, length // 2)]
    lengths = [len(beside), length, length]
    hidden = policy.hidden_states(torch.cat([beside, ids[:-1], ids.flip(0)[:-1]]), lengths)
    start = len(beside) + length - count
    rows = hidden[start : start + count]
    advantages, cu_seqlens = _loss_inputs(advantage, count, ids.device)
    result = ops.linear_policy_loss(
        rows, policy.weight, ids[-count:], advantages, cu_seqlens, objective=objective, temperature=temperature,
        **policy.head_options, **others,
    )  # fmt: skip
    gradients = torch.autograd.grad(result.loss, policy.parameters(), allow_unused=True)
    return float(result.loss.detach()), result.logprobs.detach().double(), gradients


def _plain(
    policy: Policy, ids: Tensor, count: int, *, objective: ops.PolicyObjective, advantage: float, temperature: float,
    off_policy: bool,
) -> tuple[Result, dict[str, Any]]:  # fmt: skip
    """The same from the model's own logits, and the other policies' log-probabilities as the losses take them."""
    model: Any = policy.model
    parameters = policy.parameters()
    if any(p.is_floating_point() and p.dtype not in (torch.float32, torch.float64) for p in model.parameters()):
        names = [name for name, _ in policy.named_parameters()]
        model = copy.deepcopy(model).float()
        copies = dict(model.named_parameters())
        parameters = [copies[name] for name in names]
    logits = model(input_ids=ids[None, :-1], use_cache=False).logits[0, -count:]
    z = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    if policy.padding_token_ids:
        z = z.index_fill(1, torch.tensor(policy.padding_token_ids, device=z.device), -torch.inf)
    distribution = z.log_softmax(-1)
    logprobs = distribution.gather(-1, ids[-count:, None])[:, 0]
    # Of a token that cannot occur p log p is 0, and so is its gradient: 0 * -inf must not be met on the way to it.
    entropy = -(distribution.masked_fill(distribution.isneginf(), 0.0) * distribution.exp()).sum(-1)
    advantages, cu_seqlens = _loss_inputs(advantage, count, ids.device)
    others = _other_policies(objective, logprobs.detach(), off_policy)
    loss, _ = reference.policy_loss(logprobs, entropy, advantages, cu_seqlens, objective=objective, **others)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return (float(loss.detach()), logprobs.detach().double(), gradients), others


def _other_policies(objective: ops.PolicyObjective, logprobs: Tensor, off_policy: bool) -> dict[str, Any]:
    """behavior_logprobs and reference_logprobs [count], where the objective takes them."""
    place = torch.arange(len(logprobs), device=logprobs.device)
    others: dict[str, Any] = {}
    if off_policy or objective.weighs_sampler:
        moves = logprobs.new_tensor(_log_ratios(objective))
        one = len(logprobs) if objective.kind == "gspo" else place  # there all tokens of a sequence have one ratio
        others["behavior_logprobs"] = (logprobs - moves[one % len(moves)]).contiguous()
    if objective.kl_coef:
        others["reference_logprobs"] = logprobs + logprobs.new_tensor([0.5, -0.4])[place % 2]
    return others


def _log_ratios(objective: ops.PolicyObjective) -> list[float]:
    """Logarithms of ratios on both sides of every bound, farther from it than bfloat16 moves a log-probability."""
    o = objective
    bounds = {
        "importance": [o.importance_cap],
        "importance_mask": [o.importance_floor, o.importance_cap],
        "reinforce": [],
    }.get(o.kind, [1 - o.clip_low, 1 + o.clip_high])
    logs = sorted(math.log(bound) for bound in [*bounds, *([o.dual_clip] if o.dual_clip else [])] if bound > 0)
    if not logs:
        return [0.4, -0.4]
    between = [(a + b) / 2 for a, b in itertools.pairwise(logs) if b - a >= 0.6]
    return [logs[0] - 0.4, *between, logs[-1] + 0.4]


def _loss_inputs(advantage: float, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.tensor([advantage], device=device), torch.tensor([0, count], dtype=torch.int32, device=device)
