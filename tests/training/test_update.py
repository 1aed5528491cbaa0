"""The update asks the device for nothing but what a step has to know."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from some_rollouts import some_rollouts
from tiny_models import character_tokenizer, tiny_llama

from bandit_rft import PolicyObjective
from bandit_rft.model import Policy
from bandit_rft.optimizer import PolicyOptimizer
from bandit_rft.update import PolicyUpdater, _score, _Sums, training_inputs


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


def test_the_check_can_fail() -> None:
    x = torch.zeros(3, device="meta")
    for wait in (lambda: x.sum().item(), lambda: x.nonzero(), lambda: x[x > 0], lambda: x.cpu()):
        with pytest.raises((RuntimeError, NotImplementedError)):
            wait()
