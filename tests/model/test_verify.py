"""The spot check: it agrees with a right fused path, for every kind of head, and finds a wrong one."""

from __future__ import annotations

import pytest
import torch
from architectures import CONFIGS
from tiny_models import tiny_llama
from transformers import AutoModelForCausalLM

from bandit_rft import ops
from bandit_rft.model import Policy, verify
from bandit_rft.model.twin import _spread
from bandit_rft.model.verify import verify_sequence

PROMPT, COMPLETION = [1, 5, 6, 11], [7, 8, 9, 30, 31, 2]


@pytest.mark.parametrize("kind", ["reinforce", "ppo", "gspo", "cispo"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere", "phi", "bloom"])
def test_the_fused_path_computes_the_loss_that_it_claims(name: str, kind: str) -> None:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(CONFIGS[name])
    _spread(model)
    objective = ops.PolicyObjective(kind, aggregation="seq-mean-token-sum", entropy_coef=0.01)
    result = verify_sequence(Policy(model), PROMPT, COMPLETION, objective=objective, advantage=-0.7, temperature=0.8)
    assert result.loss_error < 1e-5 and result.gradient_error < 1e-3 and result.logprob_error < 1e-3
    assert result.gradient_norm > 1e-3 and result.worst() == max(result.loss_error, result.gradient_error)


@pytest.mark.parametrize("wrong", ["loss", "head", "packing"])
def test_a_wrong_fused_path_is_found(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Policy(tiny_llama())
    if wrong == "loss":
        honest = ops.linear_policy_loss
        monkeypatch.setattr(
            verify.ops, "linear_policy_loss", lambda *args, **kwargs: honest(*args, **{**kwargs, "temperature": 0.9})
        )
    elif wrong == "head":
        policy.logit_scale = 1.05
    else:  # one sequence of the pack sees the one before it
        honest_states = policy.hidden_states
        monkeypatch.setattr(policy, "hidden_states", lambda ids, lengths: honest_states(ids, [sum(lengths)]))
    result = verify_sequence(policy, PROMPT, COMPLETION)
    assert result.worst() > 1e-2


def test_a_bfloat16_model_is_compared_with_float32_of_its_weights() -> None:
    policy = Policy(tiny_llama().to(torch.bfloat16))
    result = verify_sequence(policy, PROMPT, COMPLETION)
    assert 1e-6 < result.gradient_error < 0.1 and result.logprob_error < 0.1
    assert all(p.dtype == torch.bfloat16 and p.grad is None for p in policy.parameters())


def test_it_leaves_gradients_alone_and_compares_what_is_trained() -> None:
    policy = Policy(tiny_llama())
    first = policy.parameters()[0]
    first.grad = torch.ones_like(first)
    frozen = policy.parameters()[-1].requires_grad_(False)
    assert verify_sequence(policy, PROMPT, COMPLETION).gradient_error < 1e-4
    assert torch.equal(first.grad, torch.ones_like(first)) and frozen.grad is None


def test_masked_padding_tokens_are_masked_both_ways() -> None:
    policy = Policy(tiny_llama())
    policy.mask_padding_tokens([40, 41])
    assert verify_sequence(policy, PROMPT, COMPLETION).worst() < 1e-4
    bonus = ops.PolicyObjective("reinforce", entropy_coef=0.1)  # p log p of such a token, and its gradient, are 0
    assert verify_sequence(policy, PROMPT, COMPLETION, objective=bonus).worst() < 1e-4


def test_bad_arguments() -> None:
    policy = Policy(tiny_llama())
    with pytest.raises(ValueError, match="needs tokens"):
        verify_sequence(policy, PROMPT, [])
    with pytest.raises(ValueError, match="advantage"):
        verify_sequence(policy, PROMPT, COMPLETION, advantage=0.0)


@pytest.mark.parametrize("advantage", [0.7, -0.7])
@pytest.mark.parametrize("kind", ["reinforce", "importance", "ppo", "gspo", "cispo"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_terms_that_need_another_policy_are_checked_too(dtype: torch.dtype, kind: str, advantage: float) -> None:
    policy = Policy(tiny_llama().to(dtype))
    dual = 3.0 if kind in ("ppo", "gspo") else None
    objective = ops.PolicyObjective(kind, kl="k3", kl_coef=0.1, entropy_coef=0.01, dual_clip=dual)
    result = verify_sequence(
        policy, PROMPT, COMPLETION, objective=objective, advantage=advantage, off_policy=True, temperature=0.8
    )
    assert result.gradient_norm > 1e-3 and result.worst() < (0.15 if dtype == torch.bfloat16 else 1e-4)
