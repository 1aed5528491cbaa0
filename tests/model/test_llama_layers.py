"""Llama-shaped models are computed by the core, with their modules' gradients; any other is left to itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import CONFIGS
from tiny_models import tiny_llama
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaModel, LlamaRotaryEmbedding

from bandit_rft.model import Policy
from bandit_rft.model.llama_layers import LlamaLayers
from bandit_rft.model.twin import _spread
from bandit_rft.ops import use_backend
from bandit_rft.rollout.native import NativeDecoder

LENGTHS = [9, 17, 2, 17]
IDS = torch.randint(3, 45, (sum(LENGTHS),), generator=torch.Generator().manual_seed(3))
ROWS = torch.tensor([4, 8, 3, 44, 30, 27, 9])


class Watched:
    """How often the core was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, own = 0, LlamaLayers.hidden_states

        def hidden_states(layers: LlamaLayers, *arguments: Any) -> Tensor:
            self.count += 1
            return own(layers, *arguments)

        monkeypatch.setattr(LlamaLayers, "hidden_states", hidden_states)

    def during(self, policy: Policy, lengths: list[int] = LENGTHS) -> int:
        """While a policy computes hidden states."""
        before = self.count
        policy.hidden_states(IDS[: sum(lengths)], lengths)
        return self.count - before


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(monkeypatch)


def policy_of(config: Any) -> Policy:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config)
    _spread(model)
    return Policy(model)


def gradients(policy: Policy, rows: Tensor | None) -> dict[str, Tensor]:
    """Of all weights, and the hidden states."""
    policy.model.zero_grad(set_to_none=True)
    hidden = policy.hidden_states(IDS, LENGTHS, rows)
    direction = torch.randn(len(IDS), hidden.shape[1], generator=torch.Generator().manual_seed(4))
    hidden.backward(direction if rows is None else direction[rows])
    found = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    return found | {"hidden": hidden.detach()}


@pytest.mark.parametrize("rows", [None, ROWS], ids=["all", "some"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_gradients_are_those_of_its_modules(name: str, rows: Tensor | None, watched: Watched) -> None:
    policy = policy_of(CONFIGS[name])
    found = gradients(policy, rows)
    assert watched.count == 2  # while it was probed, and now
    policy._in_core = None
    expected = gradients(policy, rows)
    assert watched.count == 2 and found.keys() == expected.keys() and len(found) > 20
    scale = max(float(g.abs().max()) for g in expected.values())
    for key, gradient in expected.items():
        assert torch.allclose(found[key], gradient, rtol=1e-4, atol=2e-6 * scale), key


@pytest.mark.parametrize("name", sorted(set(CONFIGS) - {"llama", "qwen2", "qwen3", "mistral"}))
def test_others_are_left_to_their_modules(name: str) -> None:
    policy = policy_of(CONFIGS[name])
    assert policy._in_core is None
    assert torch.equal(policy.hidden_states(IDS, LENGTHS, ROWS), policy.hidden_states(IDS, LENGTHS)[ROWS])


def test_a_sequence_beyond_the_window_is_left_to_the_modules(watched: Watched) -> None:
    policy = policy_of(CONFIGS["mistral"])  # sees 6 tokens; longer ones are part of the probe
    assert policy._in_core is None
    config = CONFIGS["mistral"].__class__(**{**CONFIGS["mistral"].to_dict(), "sliding_window": 30})
    policy = policy_of(config)
    assert watched.during(policy) == 1 and watched.during(policy, [30, 5]) == 1 and watched.during(policy, [31, 5]) == 0
    policy.model.config.sliding_window = 4
    assert watched.during(policy) == 0


def test_what_was_done_to_a_model_since_is_heeded(watched: Watched) -> None:
    policy = Policy(tiny_llama())
    model: Any = policy.model
    layer = model.model.layers[0]
    assert watched.during(policy) == 1
    handle = layer.mlp.register_forward_hook(lambda module, inputs, output: 2 * output)
    assert watched.during(policy) == 0
    handle.remove()
    layer.mlp.forward = lambda x: x
    assert watched.during(policy) == 0
    del layer.mlp.forward
    assert watched.during(policy) == 1
    handle = layer.register_full_backward_hook(lambda module, inputs, outputs: None)
    assert watched.during(policy) == 0
    handle.remove()
    handle = layer.register_full_backward_pre_hook(lambda module, outputs: None)
    assert watched.during(policy) == 0
    handle.remove()
    handle = register_module_forward_hook(lambda module, inputs, output: None)
    try:
        assert watched.during(policy) == 0
    finally:
        handle.remove()
    own = layer.mlp.up_proj
    layer.mlp.up_proj = torch.nn.Sequential(own)
    assert watched.during(policy) == 0
    layer.mlp.up_proj = torch.nn.Linear(32, 48)  # with a bias
    assert watched.during(policy) == 0
    layer.mlp.up_proj = own
    with use_backend("torch"):
        assert watched.during(policy) == 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert watched.during(policy) == 0
    model.double()
    assert watched.during(policy) == 0
    model.float()
    assert watched.during(policy) == 1
    policy.enable_gradient_checkpointing()
    assert watched.during(policy) == 0
    with torch.no_grad():
        assert watched.during(policy) == 1  # nothing is kept there anyway


class Halved(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2  # type: ignore[no-any-return]


def shorter(model: Any) -> None:
    model.config.num_hidden_layers = 1


def another_mlp(model: Any) -> None:
    model.model.layers[1].mlp = Halved(model.config)


def another_activation(model: Any) -> None:
    model.model.layers[1].mlp.act_fn = torch.nn.GELU()


def another_epsilon(model: Any) -> None:
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 1.0


def another_scaling(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.scaling *= 3


def another_projection(model: Any) -> None:
    mlp = model.model.layers[1].mlp
    mlp.up_proj = torch.nn.Sequential(mlp.up_proj, torch.nn.ReLU())


def wider_mlp(model: Any) -> None:
    mlp = model.model.layers[1].mlp
    mlp.gate_proj, mlp.up_proj = torch.nn.Linear(32, 64, bias=False), torch.nn.Linear(32, 64, bias=False)
    mlp.down_proj = torch.nn.Linear(64, 32, bias=False)


def transposed_projection(model: Any) -> None:
    weight = model.model.layers[1].self_attn.q_proj.weight
    weight.data = weight.data.t()


def embeddings_of_a_norm(model: Any) -> None:
    model.model.embed_tokens.max_norm = 0.5


def no_mlp(model: Any) -> None:
    model.model.layers[1].mlp = torch.nn.Identity()


@pytest.mark.parametrize("served", [True, False], ids=["core", "modules"])
def test_rows_are_indices(served: bool) -> None:
    """A mask would be read as tokens 0 and 1 in the core."""
    policy = Policy(tiny_llama())
    policy._in_core = policy._in_core if served else None
    assert served == (policy._in_core is not None)
    for rows in (torch.zeros(7, dtype=torch.bool), torch.tensor([3.9]), torch.tensor(3), torch.tensor([[3]])):
        with pytest.raises(ValueError, match=r"rows must be int64 \[N\], indices of tokens; got torch"):
            policy.hidden_states(torch.arange(7), [7], rows)
    whole = policy.hidden_states(torch.arange(7), [7])
    for dtype in (torch.int32, torch.int64):
        rows = torch.tensor([2, 5], dtype=dtype)
        torch.testing.assert_close(policy.hidden_states(torch.arange(7), [7], rows), whole[[2, 5]])


CHANGES = [
    shorter, another_mlp, another_activation, another_epsilon, another_scaling, another_projection, no_mlp,
    embeddings_of_a_norm,
]  # fmt: skip


@pytest.mark.parametrize("change", [*CHANGES, wider_mlp, transposed_projection])
def test_numbers_and_parts_that_were_changed_are_heeded_in_decoding(change: Callable[[Any], None]) -> None:
    policy = Policy(tiny_llama())
    decoder = NativeDecoder(policy)
    assert decoder.ready(40)
    change(policy.model)
    assert not decoder.ready(40)


def test_a_rotary_embedding_that_changes_with_the_length_is_not_served() -> None:
    policy = Policy(tiny_llama())
    core: Any = policy._in_core
    assert core.weights(policy.base, LENGTHS) is not None
    policy.base.rotary_emb.rope_type = "dynamic"  # type: ignore[union-attr, assignment]
    assert core.weights(policy.base, LENGTHS) is None
    with pytest.raises(NotImplementedError, match="rotary embedding is dynamic"):
        NativeDecoder(policy)


@pytest.mark.parametrize("change", CHANGES)
def test_numbers_and_parts_that_were_changed_are_heeded(change: Callable[[Any], None]) -> None:
    policy = Policy(tiny_llama())
    before = policy.hidden_states(IDS, LENGTHS)
    change(policy.model)
    after = policy.hidden_states(IDS, LENGTHS)
    policy._in_core = None
    assert torch.equal(after, policy.hidden_states(IDS, LENGTHS))
    assert not torch.allclose(after, before, atol=1e-2)


class Stretched(LlamaRotaryEmbedding):
    """Turns otherwise where no probe of a short text comes to."""

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = super().forward(x, position_ids)
        factor = 1 + (position_ids // 30)[..., None].float().log1p()
        return cos * factor, sin * factor


def test_modules_of_another_class_are_left_to_themselves() -> None:
    model: Any = tiny_llama()
    model.model.rotary_emb = Stretched(model.config)
    assert Policy(model)._in_core is None


class TwoArguments(LlamaForCausalLM):
    """No twin can be made of it, so it is served up to what its probe could see."""

    def __init__(self, config: LlamaConfig, more: int) -> None:
        super().__init__(config)


def test_a_limit_of_the_plan_is_kept() -> None:
    config = tiny_llama().config
    policy = Policy(TwoArguments(config, 1))
    assert policy.plan.max_length == 128 and policy._in_core is None
    with pytest.raises(ValueError, match="served up to 128"):
        policy.hidden_states(torch.zeros(129, dtype=torch.int64), [129])


def test_weights_that_change_in_place_are_read_anew() -> None:
    policy = Policy(tiny_llama())
    before = policy.hidden_states(IDS, LENGTHS)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.1)
    after = policy.hidden_states(IDS, LENGTHS)
    policy._in_core = None
    assert not torch.allclose(after, before, atol=1e-3)
    assert torch.allclose(after, policy.hidden_states(IDS, LENGTHS), atol=1e-4)


def test_a_class_that_computes_something_else_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    own = LlamaModel.forward

    def forward(self: Any, *arguments: Any, **options: Any) -> Any:
        output = own(self, *arguments, **options)
        output.last_hidden_state = 1.01 * output.last_hidden_state
        return output

    monkeypatch.setattr(LlamaModel, "forward", forward)
    policy = Policy(tiny_llama())
    assert policy._in_core is None and policy.packing == "varlen"


def test_frozen_weights_get_no_gradient() -> None:
    policy = Policy(tiny_llama())
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_("k_proj" in name or name == "model.norm.weight")
    assert len([k for k in gradients(policy, ROWS) if k != "hidden"]) == 3


@pytest.mark.parametrize(
    "options",
    [
        {"attention_bias": True},
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
        {"mlp_bias": True},
        {"hidden_act": "gelu"},
    ],
)
def test_variants_of_a_llama(options: dict[str, Any]) -> None:
    policy = policy_of(LlamaConfig(**{**CONFIGS["llama"].to_dict(), **options}))
    assert (policy._in_core is not None) == ("attention_bias" in options)
    found = gradients(policy, ROWS)
    policy._in_core = None
    expected = gradients(policy, ROWS)
    scale = max(float(g.abs().max()) for g in expected.values())
    assert all(torch.allclose(found[key], g, rtol=1e-4, atol=2e-6 * scale) for key, g in expected.items())


def test_a_copy_with_another_base_is_computed_by_that(watched: Watched) -> None:
    """As a sharded policy is one, and an adapted one with its adapters off."""
    policy = Policy(tiny_llama())
    other = copy.copy(policy)
    other.base = copy.deepcopy(policy.base)
    with torch.no_grad():
        for parameter in other.base.parameters():
            parameter.mul_(1.1)
    assert watched.during(other) == 1
    assert not torch.allclose(other.hidden_states(IDS, LENGTHS), policy.hidden_states(IDS, LENGTHS), atol=1e-3)
    other.base = torch.nn.Sequential(policy.base)  # has no layers of this name
    assert policy._in_core.weights(other.base, LENGTHS) is None  # type: ignore[union-attr]
