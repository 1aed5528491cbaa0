"""The update asks the device for nothing but what a step has to know."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from architectures import CONFIGS
from some_rollouts import some_rollouts
from tiny_models import character_tokenizer, tiny_llama
from transformers import AutoModelForCausalLM

from bandit_rft import PolicyObjective
from bandit_rft.gates import GateError
from bandit_rft.model import Policy
from bandit_rft.optimizer import PolicyOptimizer
from bandit_rft.rollout import RolloutEngine, sequence_ids
from bandit_rft.rollout_batch import RolloutBatch
from bandit_rft.update import PolicyUpdater, _score, _Sums, score_rollouts, training_inputs


def on_a_device_that_cannot_answer(policy: Policy) -> Policy:
    """The policy on the meta device: reading a number, a mask or a copy back from there raises."""
    policy.model.to("meta")
    head: Any = policy.model.get_output_embeddings()  # type: ignore[no-untyped-call]
    policy.weight = head.weight
    return policy


@pytest.mark.parametrize(
    "objective",
    [
        {"kind": "reinforce"},
        {"kind": "importance"},
        {"kind": "importance_mask"},
        {"kind": "ppo", "kl": "k3", "kl_coef": 0.1},
        {"kind": "gspo", "entropy_coef": 0.1},
    ],
    ids=str,
)
def test_a_micro_batch_waits_for_nothing(objective: dict[str, Any]) -> None:
    """Forward, loss, backward, statistics: no copy to the host, no number read, nothing counted on the device."""
    policy = on_a_device_that_cannot_answer(Policy(tiny_llama(), character_tokenizer()))
    optimizer = PolicyOptimizer(policy.named_parameters(), learning_rate=1e-3)
    reference = on_a_device_that_cannot_answer(Policy(tiny_llama(seed=5))) if "kl" in objective else None
    updater = PolicyUpdater(policy, optimizer, PolicyObjective(**objective), reference=reference)
    batch, sums = some_rollouts(count=9).with_columns(advantage=1.0), _Sums()
    loss = updater._forward_backward(batch, sums, 1, 9.0, off_policy=True)
    assert loss.device.type == "meta" and sums.differences[0].shape == batch.tokens.shape
    _score(policy, batch.to("meta"), training_inputs(batch, policy.device), 1.0)


def spoiled(policy: Policy, optimizer: PolicyOptimizer, at: int) -> list[torch.Tensor]:
    """Step number `at` from here meets a gradient that is not finite; what is left after each step."""
    step, left = optimizer.step, list[torch.Tensor]()

    def counted() -> torch.Tensor:
        if len(left) == at:
            optimizer.grad_buffer(optimizer.parameters[0])[0, 0] = torch.inf
        norm = step()
        left.append(state_of(policy, optimizer))
        return norm

    optimizer.step = counted  # type: ignore[method-assign]
    return left


def state_of(policy: Policy, optimizer: PolicyOptimizer) -> torch.Tensor:
    """Weights and moments, copied."""
    tensors = [*policy.parameters(), *optimizer.state_tensors().values()]
    return torch.cat([x.detach().flatten().float() for x in tensors])


def updater_of(asynchronous: bool, dtype: torch.dtype = torch.float32, **options: Any) -> PolicyUpdater:
    policy = Policy(tiny_llama().to(dtype), character_tokenizer())
    optimizer = PolicyOptimizer(policy.named_parameters(), learning_rate=1e-3)
    optimizer.asynchronous = asynchronous
    return PolicyUpdater(policy, optimizer, PolicyObjective("ppo"), minibatches=4, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_steps_that_wait_for_nothing_have_the_same_bits(dtype: torch.dtype) -> None:
    waiting, not_waiting = updater_of(False, dtype), updater_of(True, dtype)
    batch = some_rollouts(count=16).with_columns(advantage=1.0)
    for number in (1, 2):
        a, b = waiting(batch, number), not_waiting(batch, number)
        assert (a.loss, a.grad_norm, a.steps, a.logprob_gap) == (b.loss, b.grad_norm, b.steps, b.logprob_gap)
        states = [state_of(one.policy, one.optimizer) for one in (waiting, not_waiting)]
        assert torch.equal(*states)


def test_a_step_refused_on_the_device_is_not_applied_nor_are_those_after_it() -> None:
    updater = updater_of(True)
    left = spoiled(updater.policy, updater.optimizer, at=2)
    batch = some_rollouts(count=16).with_columns(advantage=1.0)
    with pytest.raises(FloatingPointError, match="gradient norm is inf: the update was not applied"):
        updater(batch, 1)
    assert len(left) == 4 and not torch.equal(left[0], left[1])
    assert torch.equal(left[2], left[1]) and torch.equal(left[3], left[1])
    updater(batch, 2)  # who goes on all the same is served again
    assert not torch.equal(left[-1], left[1]) and bool(left[-1].isfinite().all())


def test_a_loss_or_a_gap_is_refused_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = some_rollouts(count=16).with_columns(advantage=1.0)
    for problem, error in (("gap", GateError), ("loss", FloatingPointError)):
        updater = updater_of(True, max_logprob_gap=1e-9 if problem == "gap" else 0.0)
        before = torch.cat([p.detach().flatten().clone() for p in updater.policy.parameters()])
        if problem == "loss":
            monkeypatch.setattr(updater, "_forward_backward", lambda *args: torch.tensor(torch.nan))
            monkeypatch.setattr("bandit_rft.update._largest_gap", lambda *args: None)
        with pytest.raises(error, match="he update was not applied"):
            updater(batch, 1)
        assert torch.equal(before, torch.cat([p.detach().flatten() for p in updater.policy.parameters()]))


def test_a_round_that_was_refused_is_not_part_of_the_next() -> None:
    """On a CPU a gate raises before the optimizer's step, and the gradients stayed."""
    batch, norms = some_rollouts(count=16).with_columns(advantage=1.0), []
    for refused in (False, True):
        updater = updater_of(False, max_logprob_gap=0.0)
        if refused:
            updater.max_logprob_gap = 1e-9
            with pytest.raises(GateError):
                updater(batch, 1)
            updater.max_logprob_gap = 0.0
        norms.append(updater(batch, 1).grad_norm)
    assert norms[0] == norms[1] > 0


def test_a_step_waits_for_nothing() -> None:
    """All of a step but AdamW's kernel, which has no meta device: norm, clipping, gate, what is kept for later."""
    policy = on_a_device_that_cannot_answer(Policy(tiny_llama(), character_tokenizer()))
    optimizer = PolicyOptimizer(policy.named_parameters(), learning_rate=1e-3)
    assert optimizer.asynchronous
    optimizer._adamw.step = lambda: None  # type: ignore[method-assign, assignment, return-value]
    updater = PolicyUpdater(policy, optimizer, PolicyObjective(), max_logprob_gap=0.1, tokens_per_microbatch=60)
    batch, sums = some_rollouts(count=9).with_columns(advantage=1.0), _Sums()
    for _ in range(2):
        updater._step(batch, np.arange(9), sums, 1, True)
    assert len(sums.losses) == len(sums.norms) == 2 and sums.gap is not None and sums.gap.device.type == "meta"


def test_the_check_can_fail() -> None:
    x = torch.zeros(3, device="meta")
    for wait in (lambda: x.sum().item(), lambda: x.nonzero(), lambda: x[x > 0], lambda: x.cpu()):
        with pytest.raises((RuntimeError, NotImplementedError)):
            wait()


def test_a_closed_optimizer_leaves_its_parameters_as_it_found_them() -> None:
    """Whoever trains the policy next, with another optimizer, gets gradients."""
    policy = Policy(tiny_llama().bfloat16())
    optimizer = PolicyOptimizer(policy.named_parameters(), learning_rate=1e-3)
    policy.weight.sum().backward()
    assert policy.weight.grad is None and bool((optimizer.grad_buffer(policy.weight) == 1).all())
    later = PolicyOptimizer(policy.named_parameters(), learning_rate=1e-3)
    optimizer.close()  # its hooks are the later one's by now
    policy.weight.sum().backward()
    assert policy.weight.grad is None and bool((later.grad_buffer(policy.weight) == 1).all())
    later.close()
    policy.weight.sum().backward()
    assert policy.weight.grad is not None


@pytest.mark.parametrize("minibatches", [1, 2, 4, 32])
def test_minibatches_are_cut_from_what_is_trained_on(minibatches: int) -> None:
    """A rollout that is not trained on is as if never drawn: it takes no place, and no step is empty."""
    batch = some_rollouts(count=24).with_columns(advantage=1.0, trained=torch.arange(24) % 3 == 0)
    left = list[torch.Tensor]()
    for rollouts in (batch, batch.select(batch.trained)):
        updater = updater_of(False)
        updater.minibatches = minibatches
        assert updater(rollouts, 1).steps == min(minibatches, 8)
        left.append(state_of(updater.policy, updater.optimizer))
    assert torch.equal(*left)


def test_an_empty_prompt_or_completion_is_refused() -> None:
    """The state before its first token would be its neighbour's."""
    policy = Policy(tiny_llama())
    for prompts, lengths, name in ([[5, 6], []], [2, 2], "prompt"), ([[5, 6], [7]], [4, 0], "completion"):
        batch = RolloutBatch.of(prompts, torch.arange(4, 8), lengths, torch.zeros(4), torch.zeros(4), [False] * 2)
        with pytest.raises(ValueError, match=f"a rollout has an empty {name}"):
            score_rollouts(policy, batch, temperature=1.0, tokens_per_microbatch=10**6)


def test_dropout_is_refused_where_it_would_act() -> None:
    torch.manual_seed(0)
    policy = Policy(AutoModelForCausalLM.from_config(CONFIGS["gpt2"]))
    engine = RolloutEngine(policy, max_completion_length=2)
    policy.model.train()
    with pytest.raises(ValueError, match=r"is in train mode and has dropout.*Call model.eval\(\)"):
        policy.hidden_states(torch.arange(1, 5), [4])
    with pytest.raises(ValueError, match="is in train mode and has dropout"):
        engine.generate([[1, 2]], sequence_ids(0), seed=0)
    policy.model.eval()
    kept = policy.hidden_states(torch.arange(1, 5), [4])
    for module in policy.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    policy.model.train()  # a habit, and without dropout no harm
    assert torch.equal(policy.hidden_states(torch.arange(1, 5), [4]), kept)


def test_ratios_are_logged_before_any_clip_by_the_rollouts_length() -> None:
    updater = updater_of(False)
    updater.objective = PolicyObjective("importance_mask", importance_floor=1.0, importance_cap=1.0)
    updater.minibatches = 1
    batch = some_rollouts(count=12, longest=40).with_columns(advantage=1.0)
    short = batch.lengths < 16
    assert 0 < int(short.sum()) < len(batch)
    update = updater(batch, 1)
    same = Policy(tiny_llama(), character_tokenizer())
    trained = score_rollouts(same, batch, temperature=1.0, tokens_per_microbatch=10**6)
    ratio, of_short = (trained - batch.logprobs).exp(), batch.per_token(short)
    assert update.statistics["clip_fraction_low"] + update.statistics["clip_fraction_high"] > 0.9
    for name, rows in (("0", of_short), ("16", ~of_short)):
        assert update.ratio_by_length[f"ratio/length_{name}/mean"] == pytest.approx(float(ratio[rows].mean()), rel=1e-4)
        assert update.ratio_by_length[f"ratio/length_{name}/max"] == pytest.approx(float(ratio[rows].max()), rel=1e-4)
    assert len(update.ratio_by_length) == 4
