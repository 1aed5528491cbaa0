"""What the host waits for in a round, on a simulated device: the rollouts that the rewards need, and the figures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from simulated_device import DEVICE, OnDevice, move, simulated
from tiny_models import character_tokenizer, tiny_llama

from bandit_rft import PolicyObjective, linear_policy_loss
from bandit_rft.model import Policy
from bandit_rft.optimizer import PolicyOptimizer
from bandit_rft.rollout import RolloutEngine, sequence_ids
from bandit_rft.rollout.graphs import CapturedDecoder
from bandit_rft.rollout.static import StaticDecoder
from bandit_rft.transfer import to_device
from bandit_rft.update import PolicyUpdater

PROMPTS = [[1, 5, 6], [1, 9], [1, 7, 8, 9, 10, 11], [1, 20, 21, 22]]


@pytest.mark.parametrize("kl", [False, True], ids=["no KL", "KL in the loss"])
def test_a_round_waits_for_its_rollouts_and_for_its_figures(kl: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, reference = Policy(tiny_llama(), character_tokenizer()), Policy(tiny_llama(seed=5)) if kl else None
    engine = RolloutEngine(policy, max_completion_length=40, static_cache=True)
    with simulated(monkeypatch) as simulation:
        for one in (policy, *([reference] if reference else [])):
            move(one)
        assert policy.device.type == "meta"
        engine._stop = to_device(engine._stop_on_host, policy.device)
        decoder = StaticDecoder(policy.base, policy.model.config, engine.padding, span=8)
        engine._static = CapturedDecoder(policy, decoder, engine._stop, 40, capture=False, check_every=4, lag=1)
        optimizer = PolicyOptimizer(policy.named_parameters(), learning_rate=1e-3)
        objective = PolicyObjective("ppo", kl="k3", kl_coef=0.1) if kl else PolicyObjective()
        updater = PolicyUpdater(
            policy, optimizer, objective, reference=reference, max_logprob_gap=1.0, tokens_per_microbatch=100,
            minibatches=2,
        )  # fmt: skip
        for number in (1, 2):
            simulation.waits.clear()
            ids = sequence_ids(0, number, list(range(len(PROMPTS) * 3)), 0)
            batch = engine.generate(PROMPTS, ids, seed=3, n=3)
            rollouts = dict(simulation.waits)
            simulation.waits.clear()
            advantages = torch.linspace(-1, 1, len(batch))
            update = updater(batch.with_columns(advantage=advantages, round=number), number)
            figures = dict(simulation.waits)
            assert rollouts == {"a copy to the host in transfer.py:to_host": 1}
            assert figures == {"a copy to the host in transfer.py:to_host": 1}
    assert batch.tokens.device.type == "cpu" and len(batch.tokens) > 50
    assert update.steps == 2 and update.logprob_gap is not None and update.logprob_gap < 1e-3
    assert optimizer.asynchronous and update.tokens_trained > 0 and (update.kl is not None) == kl


def test_a_loss_waits_once_for_how_many_tokens_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """And for nothing where the caller knows: the kernels after a wait would have to be launched one by one."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator) for shape in ((6, 8), (40, 8))]
    for skips, waits in ((True, 1), (False, 0)):
        with simulated(monkeypatch) as simulation:
            hidden, weight = (OnDevice(value.clone()) for value in values)
            hidden.requires_grad_(), weight.requires_grad_()
            advantages = OnDevice(torch.tensor([1.0, 0.0]))
            targets, cu_seqlens = to_device([3, 1, -100, 5, 9, 2], DEVICE), to_device([0, 3, 6], DEVICE, torch.int32)
            linear_policy_loss(
                hidden, weight, targets, advantages, cu_seqlens, objective=PolicyObjective(), skip_zero_rows=skips
            ).loss.backward()
            assert sum(simulation.waits.values()) == waits, dict(simulation.waits)


def test_a_scaled_loss_with_weight_grad_is_seen_to_be_wrong_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the host cannot look at the factor, gradients become NaN; a factor of 1 changes nothing."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator) for shape in ((6, 8), (40, 8), (2,))]
    for factor in (1.0, 0.5):
        with simulated(monkeypatch) as simulation:
            hidden, weight, advantages = (OnDevice(value.clone()) for value in values)
            hidden.requires_grad_()
            buffer = torch.zeros((40, 8), device="meta")
            targets, cu_seqlens = to_device([1, 2, 3, 4, 5, 6], DEVICE), to_device([0, 2, 6], DEVICE, torch.int32)
            loss = linear_policy_loss(
                hidden, weight, targets, advantages, cu_seqlens, objective=PolicyObjective(), weight_grad=buffer,
                normalizer=6.0, skip_zero_rows=False,
            ).loss  # fmt: skip
            (loss * factor).backward()
            assert not simulation.waits and isinstance(hidden.grad, OnDevice) and isinstance(buffer, OnDevice)
        right = factor == 1
        assert bool(hidden.grad.held.isfinite().all()) == bool(buffer.held.isfinite().all()) == right


WAITING: dict[str, Any] = {
    "a number": lambda x: x.sum().item(),
    "a condition": lambda x: bool(x[0] > 0),
    "nonzero": lambda x: x.nonzero(),
    "a mask": lambda x: x[x > 0],
    "a masked store": lambda x: x.index_put_((x > 0,), torch.ones(2, device="meta")),
    "repeats": lambda x: x.repeat_interleave(x.long()),
    "to the host": lambda x: x.cpu(),
    "into the host": lambda x: torch.empty(3).copy_(x),
    "from pageable memory": lambda x: torch.ones(3).to("meta", non_blocking=True),
    "into the device": lambda x: x.copy_(torch.ones(3)),
    "blocking": lambda x: torch.ones(3).pin_memory().to("meta"),
}


@pytest.mark.parametrize("wait", WAITING)
def test_every_kind_of_wait_is_counted(wait: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with simulated(monkeypatch) as simulation:
        x = OnDevice(torch.tensor([1.0, 0.0, 2.0]))
        WAITING[wait](x)
        assert sum(simulation.waits.values()) == 1, simulation.waits


def test_what_waits_for_nothing_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    with simulated(monkeypatch) as simulation:
        x = OnDevice(torch.tensor([1.0, 0.0, 2.0]))
        y = to_device([1, 2, 0], x.device)
        view = x[1:]
        view.add_(1)
        total = (x * 2 + x[y]).sum() + torch.zeros(3, device="meta").sum()
        x.fill_(7.0)
        assert not simulation.waits
        assert view.held.tolist() == [7.0, 7.0] and total.held.item() == 15.0


def test_numbers_put_on_the_device_by_torch_tensor_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with simulated(monkeypatch), pytest.raises(AssertionError, match="a copy that waits"):
        torch.tensor([1, 2], device="meta") + 1
