"""TRL's GRPOTrainer and RLOOTrainer on bandit_rft's operations, with one line before training.

    trainer = GRPOTrainer(...)
    bandit_rft.integrations.trl.fuse(trainer)
    trainer.train()

What is replaced is what TRL asks its model for, per-token log-probabilities and entropy (`model(..., labels=labels,
fused_lm_head=True)`). The loss stays TRL's own code, with its masks, normalizers, options and metrics. Where its
gradient can be foretold but for the normalizer (loss_type grpo, bnpo, dr_grpo, dapo and cispo with token-level ratios),
it is computed in the same pass over the logits (ops/expected.py); the loss that TRL then computes decides whether that
was right. Tested with TRL 1.16.0 (docs/guides/from-trl.md).
"""

from __future__ import annotations

import functools
import types
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from bandit_rft.model.adapters import without_adapter
from bandit_rft.model.probe import check_head
from bandit_rft.model.split import Split, UnsupportedModelError
from bandit_rft.ops import PolicyObjective, linear_logprobs
from bandit_rft.ops.expected import Expectation, Outcome, expected_logprobs

OLDEST = (1, 16)
IGNORED = -100  # the label of what is not counted


class UnsupportedTrainerError(ValueError):
    """A trainer or an option of it that cannot be served with the same result; the message names the option."""


@dataclass(frozen=True)
class _Padded:
    """What is expected of the loss, in TRL's layout: [B, T], the completions padded on the right."""

    objective: PolicyObjective
    advantages: Tensor
    weights: Tensor
    behavior: Tensor | None
    reference: Tensor | None

    def packed(self, mask: Tensor) -> Expectation | None:
        """For the rows that `mask` [B, S] has, whose last T columns are the completions; None where it does not fit."""
        completions = mask[:, mask.shape[1] - self.weights.shape[1] :]
        if completions.shape != self.weights.shape or int(completions.sum()) != int(mask.sum()):
            return None
        given = (self.advantages, self.weights, self.behavior, self.reference)
        return Expectation(self.objective, *(None if t is None else t[completions] for t in given))  # type: ignore[arg-type]


class FusedHead:
    """The head of one model that answers for it; made by `fuse`.

    Attributes:
        outcome: how often the gradients of the forward call were the right ones (`came_true`), and how often they were
            computed again for the loss that came (`computed_again`).
        answers: how often the model was asked for log-probabilities.
    """

    def __init__(self, causal_lm: Any, split: Split, temperature: float, in_float32: bool) -> None:
        self.temperature, self.in_float32 = temperature, in_float32
        self.softcap, self.logit_scale = split.softcap, split.logit_scale
        self.outcome, self.answers = Outcome(), 0
        self.expected: _Padded | None = None  # while the trainer computes its loss
        self._base_name = next(name for name, module in causal_lm.named_modules() if module is split.base)

    def answer(self, causal_lm: Any, args: Any, kwargs: dict[str, Any], labels: Tensor, shifted: bool) -> Any:
        """TRL's FusedCausalLMOutput: log-probability and entropy of each label, zero where it is -100."""
        from trl.trainer.utils import FusedCausalLMOutput

        self.answers += 1
        count = kwargs.pop("num_items_in_batch", None)
        hidden = causal_lm.get_submodule(self._base_name)(*args, **{**kwargs, "use_cache": False}).last_hidden_state
        if not shifted:
            hidden, labels = hidden[:, :-1], labels[:, 1:]
        head = causal_lm.get_output_embeddings()
        weight, bias = head.weight, getattr(head, "bias", None)
        hidden, labels = hidden.to(weight.device), labels.to(weight.device)
        kind = weight.device.type
        dtype = weight.dtype
        if torch.is_autocast_enabled(kind) and not self.in_float32:  # as nn.Linear would, with the same gradient
            dtype = torch.get_autocast_dtype(kind)
        mask = labels != IGNORED
        rows, targets = hidden[mask].to(dtype), labels[mask]
        options: dict[str, Any] = {
            "bias": None if bias is None else bias.to(dtype), "temperature": self.temperature,
            "softcap": self.softcap, "logit_scale": self.logit_scale,
        }  # fmt: skip
        expectation = None
        if self.expected is not None and torch.is_grad_enabled() and len(targets):
            expectation = self.expected.packed(mask)
        if expectation is not None:
            seen = expected_logprobs(rows, weight.to(dtype), targets, expectation, self.outcome, **options)
        else:
            seen = linear_logprobs(rows, weight.to(dtype), targets, return_entropy=True, **options)  # type: ignore[assignment]
        # masked_scatter keeps the graph where no label counts, so that a micro-batch of none has a gradient of zero.
        logprobs, entropy = (x.new_zeros(mask.shape).masked_scatter(mask, x) for x in seen)
        divisor = mask.sum().clamp(min=1) if count is None else count
        return FusedCausalLMOutput(loss=-logprobs.sum() / divisor, log_probs=logprobs, entropy=entropy, label_mask=mask)


def fuse(trainer: Any) -> FusedHead:
    """Let a trainer of TRL take log-probabilities, entropy and their gradients from bandit_rft's operations.

    The reference model, where there is one, is served too. The trainer's loss, metrics and options stay its own.

    Args:
        trainer: a GRPOTrainer or RLOOTrainer of TRL 1.16 or later, before `train()`.

    Returns:
        The policy's head, whose `outcome` says how often gradients were ready after the forward pass.

    Raises:
        UnsupportedTrainerError: where the result could not be the same, naming the option.
        UnsupportedModelError: for a model whose log-probabilities are not those of a linear head.
        ImportError: without TRL, or with an older one.
    """
    _check_trainer(trainer)
    made, in_float32 = [], getattr(trainer.args, "cast_lm_head_to_fp32", False)  # RLOO has no such option
    models = [trainer.model] + ([trainer.ref_model] if getattr(trainer, "ref_model", None) is not None else [])
    for model in models:
        causal_lm = without_adapter(model)
        if hasattr(causal_lm, "_bandit_rft_head"):
            raise UnsupportedTrainerError("trainer: its model is fused already")
        split = Split.of(causal_lm, model)
        _check_model(model, split)
        made.append((causal_lm, FusedHead(causal_lm, split, trainer.temperature, in_float32)))
    for causal_lm, head in made:
        _replace_forward(causal_lm, head)
    policy = made[0][1]
    _watch_loss(trainer, policy)
    return policy


def _replace_forward(causal_lm: Any, head: FusedHead) -> None:
    theirs = causal_lm.forward

    @functools.wraps(type(causal_lm).forward)  # `generate` checks its arguments against this signature
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return theirs(*args, **kwargs)
        labels, shifted = kwargs.pop("labels", None), kwargs.pop("shift_labels", None)
        return head.answer(self, args, kwargs, labels if shifted is None else shifted, shifted is not None)

    causal_lm.forward = types.MethodType(forward, causal_lm)
    causal_lm._bandit_rft_head = head


def _watch_loss(trainer: Any, head: FusedHead) -> None:
    """Tell the head, while the trainer computes a loss, which one to expect; and see that it is asked at all."""
    # A trainer with a loss of its own (RLOO's is of whole sequences): nothing is foretold.
    foretells = type(trainer)._compute_loss is _trl().GRPOTrainer._compute_loss
    compute_loss = trainer._compute_loss

    def watched(model: Any, inputs: dict[str, Any]) -> Any:
        head.expected, before = (_expected(trainer, inputs) if foretells else None), head.answers
        try:
            loss = compute_loss(model, inputs)
        finally:
            head.expected = None
        if head.answers == before:
            raise UnsupportedTrainerError(
                f"trainer: the loss of this {type(trainer).__name__} does not ask its model for log-probabilities "
                f"(model(..., fused_lm_head=True)); tested with TRL 1.16.0, this is {_trl().__version__}"
            )
        return loss

    trainer._compute_loss = watched


def _expected(trainer: Any, inputs: dict[str, Any]) -> _Padded | None:
    """What GRPOTrainer._compute_loss is about to minimize, up to a factor; None where a row alone does not tell."""
    args = trainer.args
    if (
        trainer.importance_sampling_level != "token"
        or trainer.loss_type not in ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "luspo")
        or trainer.top_entropy_quantile < 1
        or trainer.off_policy_mask_threshold is not None
        or trainer._entropy_bonus_enabled
        or (trainer.beta != 0 and args.use_bias_correction_kl)
    ):
        return None
    options: dict[str, Any] = {"kl": "k3", "kl_coef": trainer.beta} if trainer.beta > 0 else {}
    if trainer.loss_type == "cispo":
        options |= {"kind": "importance", "importance_cap": trainer.epsilon_high}
    else:
        options |= {"kind": "ppo", "clip_low": trainer.epsilon_low, "clip_high": trainer.epsilon_high}
        if args.delta is not None:
            if args.delta < 1 + trainer.epsilon_high:  # it lowers the upper bound: another loss (docs/objectives.md)
                return None
            options["dual_clip"] = args.delta
    try:
        objective = PolicyObjective(**options)
    except ValueError:  # bounds that it does not have, such as epsilon > 1
        return None
    mask = inputs["completion_mask"]
    mask = mask * inputs["tool_mask"] if "tool_mask" in inputs else mask
    weights = mask.float()
    if trainer.loss_type == "grpo":
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1)
    advantages = inputs["advantages"]
    advantages = advantages if advantages.dim() == 2 else advantages[:, None]
    if trainer.use_vllm and trainer.vllm_importance_sampling_correction:
        advantages = advantages * inputs["importance_sampling_ratio"]  # >= 0, so it may stand inside of the minimum
    advantages = torch.where(mask.bool(), advantages.expand(mask.shape), 0.0)
    reference = inputs["ref_per_token_logps"] if trainer.beta != 0 else None
    return _Padded(objective, advantages, weights, inputs.get("old_per_token_logps"), reference)


# --- what is refused --------------------------------------------------------------------------------------------------


def _trl() -> Any:
    try:
        return import_module("trl")
    except ImportError as error:
        raise ImportError("bandit_rft.integrations.trl needs TRL: pip install trl==1.16.0") from error


def _check_trainer(trainer: Any) -> None:
    trl = _trl()
    if tuple(int(part) for part in trl.__version__.split(".")[:2]) < OLDEST:
        raise ImportError(f"bandit_rft.integrations.trl needs TRL >= 1.16; this is {trl.__version__}")
    if not isinstance(trainer, (trl.GRPOTrainer, trl.RLOOTrainer)):
        raise UnsupportedTrainerError(f"trainer must be a GRPOTrainer or RLOOTrainer; got {type(trainer).__name__}")
    args = trainer.args
    for option, given, reason in (
        ("use_liger_kernel", args.use_liger_kernel, "it replaces parts of the model when training starts"),
        (
            "torch_compile",
            args.torch_compile,
            "the gradients of the forward call are checked by Python in the backward",
        ),
        ("deepspeed", trainer.is_deepspeed_enabled, "the head may be in pieces on several ranks"),
        ("fsdp", trainer.is_fsdp_enabled, "the head may be in pieces on several ranks"),
        ("router_aux_loss_coef", trainer.aux_loss_enabled, "the auxiliary loss of experts is not served; set it to 0"),
    ):
        if given:
            raise UnsupportedTrainerError(f"{option}: not together with bandit_rft's head: {reason}")


def _check_model(model: Any, split: Split) -> None:
    config, name = model.config, type(model).__name__
    if config.get_text_config() is not config:
        raise UnsupportedModelError(f"{name}: models with images or sound are not served, only text")
    if hasattr(without_adapter(model), "_original_forward"):
        raise UnsupportedTrainerError("trainer: its model was prepared for training already; fuse before train()")
    training = model.training
    model.eval()  # the probe compares two computations: no dropout
    try:
        with torch.no_grad():
            check_head(model, split, torch.arange(min(12, len(split.weight)), device=split.weight.device))
    finally:
        model.train(training)
