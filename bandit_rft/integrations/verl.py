"""verl's actor on bandit_rft's operations: the functions that it calls, with its own names and signatures.

    install()    in each worker: the fused log-probabilities (use_fused_kernels) and the policy losses `vanilla`,
                 `gspo`, `cispo` and `gpg` are from then on those of this module

`VERL_USE_EXTERNAL_MODULES=bandit_rft.integrations.verl_external` in the environment of the workers does that. Nothing
here imports verl but `install`, and nothing needs Ray. Signatures are those of verl 0.9.1 (docs/guides/from-verl.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bandit_rft.ops import PolicyObjective, linear_logprobs
from bandit_rft.ops import logprobs_from_logits as fused_logprobs_from_logits
from bandit_rft.ops.objective import clip_masks, log_ratios, sequence_mean, token_coefficients, token_losses
from bandit_rft.ops.registry import once

#: verl clamps the logarithm of a ratio to +- this, and of gspo's ratio from above.
LARGEST_LOG_RATIO, LARGEST_GSPO_LOG_RATIO = 20.0, 10.0

Loss = tuple[Tensor, dict[str, Any]]


# --- log-probabilities ------------------------------------------------------------------------------------------------


class FusedLinearForPPO(nn.Module):
    """In place of verl.utils.experimental.torch_functional.FusedLinearForPPO.

    Args:
        chunk_size: taken for verl's sake; how many rows are computed at a time, the operation decides.
        impl_backend: likewise.
    """

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch"):
        super().__init__()
        self.chunk_size, self.impl_backend = chunk_size, impl_backend

    def forward(
        self, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float | Tensor = 1.0
    ) -> tuple[Tensor, Tensor]:
        """(log_probs, entropy) of the tokens, in input_ids' shape.

        Args:
            hidden_states: [T, H] or [B, T, H].
            vocab_weights: [V, H].
            input_ids: [T] or [B, T], the tokens predicted at these hidden states.
            temperature: what the logits are divided by; a number, or one value a token.
        """
        return linear_cross_entropy(hidden_states, vocab_weights, input_ids, temperature)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float | Tensor | None = 1.0,
    reduction: str | None = "none",
    dist_process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """In place of verl.utils.kernel.linear_cross_entropy.linear_cross_entropy: (logprobs, entropy).

    Both are float32 and have labels' shape. Rows that no gradient comes back to (prompts, padding) cost nothing in the
    backward pass.

    Args:
        hidden: [T, H] or [B, T, H].
        weight: [V, H], all of the vocabulary.
        labels: [T] or [B, T].
        temperature: what the logits are divided by; a number, or one value a token.
        reduction: only "none".
        dist_process_group: only None: the vocabulary must not be in pieces on several ranks.

    Raises:
        ValueError: for another reduction, a vocabulary in pieces, or shapes that do not fit.
    """
    if dist_process_group is not None:
        raise ValueError("dist_process_group must be None: a vocabulary in pieces on several ranks is not served")
    if reduction != "none":
        raise ValueError(f"reduction must be 'none'; got {reduction!r}")
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(f"labels must be {list(hidden.shape[:-1])} to match hidden; got {list(labels.shape)}")
    temperature = 1.0 if temperature is None else temperature
    if isinstance(temperature, Tensor):
        temperature = temperature.expand(labels.shape).reshape(-1) if temperature.ndim else float(temperature)
    rows, shape = hidden.reshape(-1, hidden.shape[-1]), labels.shape
    seen = linear_logprobs(
        rows.to(weight.dtype), weight, labels.reshape(-1).long(), temperature=temperature, return_entropy=True
    )
    return seen[0].view(shape), seen[1].view(shape)


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """In place of verl.utils.torch_functional.logprobs_from_logits.

    Args:
        logits: [..., V].
        labels: [...].
        inplace_backward: taken for verl's sake: the gradient is never computed over the logits, which stay as they are.
    """
    found: Any = fused_logprobs_from_logits(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1).long())
    return found.view(labels.shape)  # type: ignore[no-any-return]


# --- policy losses ----------------------------------------------------------------------------------------------------


def compute_policy_loss_vanilla(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> Loss:
    """PPO with clip_ratio_low, clip_ratio_high and the dual clip clip_ratio_c: the objective `ppo`.

    Args:
        old_log_prob: [B, T] of the behavior policy.
        log_prob: [B, T] of the policy, with its graph.
        advantages: [B, T].
        response_mask: [B, T], which tokens count.
        loss_agg_mode: token-mean, token-sum, seq-mean-token-sum, seq-mean-token-sum-norm or seq-mean-token-mean.
        config: verl's ActorConfig, or anything with clip_ratio, clip_ratio_low, clip_ratio_high, clip_ratio_c and
            global_batch_info.
        rollout_is_weights: [B, T], factors of the token losses.

    Returns:
        (loss, verl's metrics).

    Raises:
        ValueError: naming the argument or the option.
    """
    low, high = _bounds(config)
    dual = float(config.clip_ratio_c)
    if not 1 < dual < math.exp(LARGEST_LOG_RATIO):
        raise ValueError(f"clip_ratio_c must lie between 1 and e^{LARGEST_LOG_RATIO:g}; got {dual:g}")
    objective = PolicyObjective("ppo", clip_low=low, clip_high=high, dual_clip=dual)
    return _loss(
        objective, old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights
    )


def compute_policy_loss_gspo(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "seq-mean-token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> Loss:
    """The objective `gspo`; arguments as for `compute_policy_loss_vanilla`.

    Advantages and rollout_is_weights must be the same for all tokens of a response. verl gives a token the gradient of
    its own advantage, `gspo` that of the response's mean: with one number a response they are the same.
    """
    low, high = _bounds(config)
    for name, values in (("advantages", advantages), ("rollout_is_weights", rollout_is_weights)):
        if values is not None and not _one_a_response(values, response_mask):
            raise ValueError(f"{name} must be one number a response for gspo; they differ within a response")
    dual = math.exp(LARGEST_GSPO_LOG_RATIO)  # verl's clamp: beyond, no gradient
    objective = PolicyObjective("gspo", clip_low=low, clip_high=high, dual_clip=dual)
    return _loss(
        objective, old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights
    )


def compute_policy_loss_cispo(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> Loss:
    """The objective `cispo`, with both clip_ratio bounds; arguments as for `compute_policy_loss_vanilla`."""
    low, high = _bounds(config)
    objective = PolicyObjective("cispo", clip_low=low, clip_high=high)
    return _loss(
        objective, old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights
    )


def compute_policy_loss_gpg(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> Loss:
    """The objective `reinforce`; arguments as for `compute_policy_loss_vanilla`, old_log_prob is not looked at."""
    objective = PolicyObjective("reinforce")
    found = _loss(
        objective, log_prob.detach(), log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights
    )
    return found[0], {}


#: verl's names for them (policy_loss.loss_mode).
LOSSES: dict[str, Callable[..., Loss]] = {
    "vanilla": compute_policy_loss_vanilla,
    "gspo": compute_policy_loss_gspo,
    "cispo": compute_policy_loss_cispo,
    "gpg": compute_policy_loss_gpg,
}


def _bounds(config: Any) -> tuple[float, float]:
    if config is None:
        raise ValueError("config must be given: verl's ActorConfig, with clip_ratio, clip_ratio_low, clip_ratio_high")
    low, high = (
        config.clip_ratio if (value := getattr(config, name)) is None else value
        for name in ("clip_ratio_low", "clip_ratio_high")
    )
    for name, value in (("clip_ratio_low", low), ("clip_ratio_high", high)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be a finite number >= 0; got {value}")
    return min(float(low), 1.0), float(high)  # a ratio is above 0: a bound below that never acts


def _one_a_response(values: Tensor, mask: Tensor) -> bool:
    values, counts = values.broadcast_to(mask.shape), mask.bool()
    lowest = values.masked_fill(~counts, torch.inf).amin(-1)
    highest = values.masked_fill(~counts, -torch.inf).amax(-1)
    return bool((highest <= lowest).all())  # a response of no token has -inf and inf


def _loss(
    objective: PolicyObjective, old_log_prob: Tensor, log_prob: Tensor, advantages: Tensor, response_mask: Tensor,
    mode: str, config: Any, rollout_is_weights: Tensor | None,
) -> Loss:  # fmt: skip
    for name, value in (("old_log_prob", old_log_prob), ("advantages", advantages), ("response_mask", response_mask)):
        if value.shape != log_prob.shape:
            raise ValueError(f"{name} must be {list(log_prob.shape)}, as log_prob is; got {list(value.shape)}")
    mask = response_mask.bool()
    weights = token_weights(mask.to(log_prob.dtype), mode, **getattr(config, "global_batch_info", {}))
    if rollout_is_weights is not None:
        weights = weights * rollout_is_weights
    lengths = mask.sum(-1)
    sequence_of = torch.repeat_interleave(lengths)
    logp, weights, adv = log_prob[mask], weights[mask].to(log_prob.dtype), advantages[mask].to(log_prob.dtype)
    behavior = old_log_prob[mask].detach()
    loss: Tensor = _Loss.apply(logp, objective, adv, weights, behavior, sequence_of, lengths)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        ratio = log_ratios(objective, logp.detach(), behavior, sequence_of, lengths).exp()
        low, high, dual = clip_masks(objective, ratio, adv)
        difference = logp - behavior
        if objective.kind == "cispo":  # counted whatever the advantage
            low, high = ratio < 1 - objective.clip_low, ratio > 1 + objective.clip_high
        if objective.kind == "gspo":
            dual = torch.zeros_like(low)
            kl = sequence_mean(difference, sequence_of, lengths)
        else:
            kl = difference.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
        tokens = len(logp) + 1e-8  # verl's masked_mean
        metrics = {
            "actor/pg_clipfrac": (low | high).sum().item() / tokens,
            "actor/ppo_kl": -kl.sum().item() / tokens,
            "actor/pg_clipfrac_lower": dual.sum().item() / tokens,
        }
    return loss, metrics


def token_weights(
    loss_mask: Tensor,
    loss_agg_mode: str,
    dp_size: int = 1,
    batch_num_tokens: int | None = None,
    global_batch_size: int | None = None,
    loss_scale_factor: int | None = None,
) -> Tensor:
    """What verl's agg_loss multiplies each token's loss by, [B, T]; zero where the mask is.

    Args:
        loss_mask: [B, T].
        loss_agg_mode: how losses are added up.
        dp_size: ranks whose gradients are averaged.
        batch_num_tokens: tokens of the whole batch, over all ranks and micro-batches; None: those of the mask.
        global_batch_size: responses likewise; None: those of the mask that have a token.
        loss_scale_factor: the length of seq-mean-token-sum-norm; None: T.

    Raises:
        ValueError: for an unknown mode, or ranks without the size of the whole.
    """
    mask = loss_mask if loss_mask.is_floating_point() else loss_mask.float()
    lengths = mask.sum(-1, keepdim=True)
    if loss_agg_mode == "token-sum":
        return mask * dp_size
    missing = batch_num_tokens if loss_agg_mode == "token-mean" else global_batch_size
    if dp_size > 1 and missing is None:
        name = "batch_num_tokens" if loss_agg_mode == "token-mean" else "global_batch_size"
        raise ValueError(f"{name} must be given for dp_size={dp_size} and loss_agg_mode={loss_agg_mode}")
    if loss_agg_mode == "token-mean":
        return mask / (lengths.sum().clamp(min=1) if batch_num_tokens is None else batch_num_tokens) * dp_size
    sequences = (lengths > 0).sum().clamp(min=1) if global_batch_size is None else global_batch_size
    if loss_agg_mode == "seq-mean-token-sum":
        return mask / sequences * dp_size
    if loss_agg_mode == "seq-mean-token-sum-norm":
        return mask / sequences * dp_size / (mask.shape[-1] if loss_scale_factor is None else loss_scale_factor)
    if loss_agg_mode == "seq-mean-token-mean":
        return mask / lengths.clamp(min=1) / sequences * dp_size
    raise ValueError(
        "loss_agg_mode must be one of token-mean, token-sum, seq-mean-token-sum, seq-mean-token-sum-norm, "
        f"seq-mean-token-mean; got {loss_agg_mode!r}"
    )


class _Loss(torch.autograd.Function):
    """The sum of weights times token losses, its derivative in closed form: a ratio may overflow, that does not."""

    @staticmethod
    def forward(
        ctx: Any, logp: Tensor, objective: PolicyObjective, advantages: Tensor, weights: Tensor, behavior: Tensor,
        sequence_of: Tensor, lengths: Tensor,
    ) -> Tensor:  # fmt: skip
        tokens = advantages, behavior, None, sequence_of, lengths
        losses = token_losses(objective, logp, torch.zeros_like(logp), *tokens)
        c = token_coefficients(objective, logp, advantages, weights, *tokens[1:])
        ctx.save_for_backward(c)
        return (losses * weights).sum()

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> Any:
        (c,) = ctx.saved_tensors
        return (*once((given * c,)), None, None, None, None, None, None)


# --- into verl --------------------------------------------------------------------------------------------------------


def install() -> None:
    """Put these functions where verl looks for them, in this process.

    Raises:
        ImportError: without verl, or with one that has no such places.
    """
    try:
        from verl.trainer.ppo.core_algos import register_policy_loss
        from verl.utils.experimental import torch_functional
    except ImportError as error:
        raise ImportError("bandit_rft.integrations.verl.install needs verl (tested: 0.9.1)") from error
    if not hasattr(torch_functional, "FusedLinearForPPO"):
        raise ImportError("this verl has no FusedLinearForPPO to be replaced (tested: 0.9.1)")
    from verl.utils.kernel import linear_cross_entropy as kernel

    torch_functional.FusedLinearForPPO = FusedLinearForPPO
    kernel.linear_cross_entropy = linear_cross_entropy
    for name, function in LOSSES.items():
        register_policy_loss(name)(function)
