"""Packed attention travels with the call: what is computed again in a backward pass sees the same packing."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import CONFIGS
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

from bandit_rft.model import Policy, UnsupportedModelError
from bandit_rft.model.packing import Packing, packed_attention, varlen_attn_serves
from bandit_rft.model.twin import _spread

LENGTHS = (9, 17, 2, 17)


def policy_of(name: str, lora: bool = False) -> Policy:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(CONFIGS[name])
    _spread(model)
    policy = Policy(model)
    if lora:
        pytest.importorskip("peft", reason="needs the extra lora")
        from bandit_rft.model.lora import add_adapter

        policy = add_adapter(policy, rank=3)
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.normal_(0, 0.2)
    return policy


def gradients(policy: Policy, hidden_states: Callable[[Tensor, tuple[int, ...]], Tensor]) -> dict[str, Tensor]:
    ids = torch.randint(0, 97, (sum(LENGTHS),), generator=torch.Generator().manual_seed(3))
    for parameter in policy.parameters():
        parameter.grad = None
    hidden = hidden_states(ids, LENGTHS)
    direction = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(4))
    (hidden * direction).sum().backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


def one_at_a_time(policy: Policy) -> dict[str, Tensor]:
    base = policy.base
    return gradients(
        policy,
        lambda ids, lengths: torch.cat([base(input_ids=x[None], use_cache=False)[0][0] for x in ids.split(lengths)]),
    )


def assert_same_gradients(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    scale = max(float(g.abs().max()) for g in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name] / scale, gradient / scale, atol=5e-5, rtol=0, msg=name)


@pytest.mark.parametrize("lora", [False, True])
def test_layers_that_anyone_checkpoints_see_the_packing_again(lora: bool) -> None:
    """As FSDP's activation checkpointing does: the layer's forward runs once more, after the call is over."""
    policy = policy_of("llama", lora)
    expected = one_at_a_time(policy)
    for layer in policy.base.layers:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    assert_same_gradients(gradients(policy, policy.hidden_states), expected)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("name", sorted(set(CONFIGS) - {"bloom"}))
def test_gradients_are_the_same_with_and_without_checkpointing(name: str, lora: bool) -> None:
    policy = policy_of(name, lora)
    expected = one_at_a_time(policy)
    assert_same_gradients(gradients(policy, policy.hidden_states), expected)
    calls: list[nn.Module] = []
    policy.enable_gradient_checkpointing()
    for layer in policy.base.modules():
        if type(layer).__name__.endswith("MLP"):
            layer.register_forward_pre_hook(lambda module, inputs: calls.append(module))
    assert_same_gradients(gradients(policy, policy.hidden_states), expected)
    assert len(calls) in (0, 2 * len(set(calls)))  # twice each; OPT has no module of that name
    with torch.no_grad():  # nothing is kept for a backward pass, nothing is left on the layers
        policy.hidden_states(torch.arange(9), [4, 5])
    assert not any("forward" in vars(module) for module in policy.base.modules())


def test_what_was_set_on_a_policy_holds_for_its_adapter() -> None:
    pytest.importorskip("peft", reason="needs the extra lora")
    from bandit_rft.model.lora import add_adapter, base_policy

    policy = policy_of("llama")
    policy.enable_gradient_checkpointing()
    policy.mask_padding_tokens([95, 96])
    adapted = add_adapter(policy, rank=2)
    for each in (adapted, base_policy(adapted)):
        assert each.gradient_checkpointing and each.padding_token_ids == [95, 96]
        assert each.head_options["bias"].isneginf().nonzero().flatten().tolist() == [95, 96]


def test_checkpointing_needs_layers() -> None:
    policy = policy_of("llama")
    policy.base = nn.Linear(2, 2)
    with pytest.raises(UnsupportedModelError, match="gradient_checkpointing"):
        policy.enable_gradient_checkpointing()


def test_a_model_that_makes_a_mask_of_its_own_is_not_packed_by_our_attention() -> None:
    policy = policy_of("llama")
    layer, forward = policy.base.layers[0].self_attn, policy.base.layers[0].self_attn.forward

    def masked(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **{**kwargs, "attention_mask": torch.ones(1, 1, 11, 11, dtype=torch.bool).tril()})

    layer.forward = masked
    with pytest.raises(NotImplementedError, match="attention mask of their own"):
        policy.hidden_states(torch.arange(11), [5, 6])


def test_keyword_arguments_that_get_lost_are_noticed() -> None:
    policy = policy_of("llama")
    layer, forward = policy.base.layers[0].self_attn, policy.base.layers[0].self_attn.forward

    def forgetful(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **{name: value for name, value in kwargs.items() if "packing" not in name})

    layer.forward = forgetful
    with pytest.raises(NotImplementedError, match="hand keyword arguments down"):
        policy.hidden_states(torch.arange(11), [5, 6])


def test_when_torchs_attention_of_packed_sequences_is_taken() -> None:
    """The choice alone; the kernel needs a GPU, and has not been run on one."""
    current = frozenset({"query", "scale", "window_size", "enable_gqa"})
    bf16 = torch.bfloat16
    assert varlen_attn_serves("cuda", bf16, 64, 64, current) == (torch.version.hip is None)
    refused = [
        ("cpu", bf16, 64, 64, current), ("cuda", torch.float32, 64, 64, current), ("cuda", bf16, 512, 512, current),
        ("cuda", bf16, 60, 60, current), ("cuda", bf16, 192, 128, current), ("cuda", bf16, 64, 64, frozenset()),
        ("cuda", bf16, 64, 64, current - {"window_size"}), ("cuda", bf16, 64, 64, current - {"scale"}),
    ]  # fmt: skip
    assert not any(varlen_attn_serves(*arguments) for arguments in refused)


def test_torchs_attention_of_packed_sequences_is_called_as_it_defines(monkeypatch: pytest.MonkeyPatch) -> None:
    """With its definition written out in PyTorch in its place, window and grouped queries included."""
    from bandit_rft.model import packing as module

    def defined(
        q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *, scale: float,
        window_size: tuple[int, int], enable_gqa: bool,
    ) -> Tensor:  # fmt: skip
        assert cu_q.dtype == torch.int32 and torch.equal(cu_q, cu_k) and max_q == max_k == int(torch.diff(cu_q).max())
        rows = []
        for start, stop in zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), strict=True):
            query, key, value = (x[start:stop].transpose(0, 1) for x in (q, k, v))
            if enable_gqa:
                key, value = (x.repeat_interleave(q.shape[1] // k.shape[1], 0) for x in (key, value))
            place = torch.arange(stop - start)
            behind = place[:, None] - place[None, :]
            left, right = (size if size >= 0 else stop for size in window_size)
            seen = (behind <= left) & (behind >= -right)
            scores = (query @ key.transpose(1, 2) * scale).masked_fill(~seen, -torch.inf)
            rows.append((scores.softmax(-1) @ value).transpose(0, 1))
        return torch.cat(rows)

    torch.manual_seed(0)
    q, k, v = torch.randn(1, 6, 28, 8), torch.randn(1, 2, 28, 8), torch.randn(1, 2, 28, 8)
    packing = Packing.of([9, 17, 2], torch.device("cpu"))
    for window in (None, 5):
        expected = packed_attention(packing, q, k, v, 0.3, window)
        with monkeypatch.context() as patch:
            patch.setattr(module.attention, "serves", lambda query: False)
            patch.setattr(module, "_varlen_attn", lambda: (defined, frozenset()))
            patch.setattr(module, "varlen_attn_serves", lambda *arguments: True)
            torch.testing.assert_close(packed_attention(packing, q, k, v, 0.3, window), expected, atol=1e-5, rtol=1e-5)
