"""What a model computes may change at some length: it is served exactly across it, or up to it, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import COMMON, CONFIGS
from model_survey import compare, sample
from safetensors.torch import load_file, save_file
from tiny_models import character_tokenizer, save_tiny_llama, tiny_llama
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    Phi3Config,
    PhimoeConfig,
    Qwen2MoeConfig,
)

from bandit_rft import ops
from bandit_rft.model import Policy, UnsupportedModelError
from bandit_rft.model.packing import PackingPlan
from bandit_rft.model.twin import CROSSED, _spread, limits_of, twin_of
from bandit_rft.rollout import RolloutEngine, sequence_ids

MOE = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 4, "num_local_experts": 4}
LONG_ROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 1e4}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
WITH_LIMITS: dict[str, Any] = {
    "phi3, long rope": Phi3Config(
        **{**COMMON, "max_position_embeddings": 240}, original_max_position_embeddings=60, rope_parameters=LONG_ROPE
    ),
    "phimoe, long rope": PhimoeConfig(
        **{**COMMON, "max_position_embeddings": 240}, num_local_experts=4, original_max_position_embeddings=60,
        rope_parameters={**LONG_ROPE, "short_mscale": 1.2, "long_mscale": 1.3, "original_max_position_embeddings": 60},
    ),
    "llama, dynamic rope": LlamaConfig(**{**COMMON, "max_position_embeddings": 60}, rope_parameters=DYNAMIC),
    "gemma3, dynamic rope": Gemma3TextConfig(
        **{**COMMON, "max_position_embeddings": 60}, head_dim=8, sliding_window=20,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={"full_attention": DYNAMIC, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}},
    ),
    "qwen2_moe, windows": Qwen2MoeConfig(
        **COMMON, **MOE, use_sliding_window=True, sliding_window=30, max_window_layers=1
    ),
    "phimoe, windows": PhimoeConfig(**COMMON, num_local_experts=4, sliding_window=30),
    "gpt_oss, sinks and windows": GptOssConfig(**COMMON, num_local_experts=4, sliding_window=30, head_dim=8),
}  # fmt: skip


def spread_model(config: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    _spread(model)
    return model.train(False)


@pytest.mark.parametrize("name", WITH_LIMITS)
def test_lengths_on_both_sides_of_a_limit_are_exact(name: str) -> None:
    """log-probabilities, gradients and the sampler against the model's own logits, packed across the limit."""
    model = spread_model(WITH_LIMITS[name])
    policy = Policy(model)
    assert compare(policy, model) == []
    assert sample(policy, model)[1] == []


def test_long_rope_goes_apart_and_dynamic_rope_has_an_end() -> None:
    phi3, llama = (Policy(spread_model(WITH_LIMITS[n])) for n in ("phi3, long rope", "llama, dynamic rope"))
    assert phi3.plan == PackingPlan("varlen", apart=60)
    assert llama.plan == PackingPlan("varlen", max_length=60)
    with pytest.raises(ValueError, match="61 tokens: this model is served up to 60"):
        llama.hidden_states(torch.arange(61), [61])
    for policy in (phi3, llama):  # keys in the cache were rotated for a shorter text
        engine = RolloutEngine(policy, max_completion_length=30)
        assert engine.max_length == 60
        with pytest.raises(ValueError, match="max_completion_length=30 can exceed 60 tokens"):
            engine.generate([[1, 2, 3], [1] * 31], sequence_ids(0, 1, [0, 1], 0), seed=0)
        engine.generate([[1] * 30], sequence_ids(0, 1, [0], 0), seed=0)


def test_windows_of_a_real_size_are_crossed_by_the_twin() -> None:
    """4096 tokens are too many for a probe: the twin has the same code and a window of a few dozen."""
    config = Qwen2MoeConfig(
        **{**COMMON, "max_position_embeddings": 32768}, **MOE, use_sliding_window=True, sliding_window=4096,
        max_window_layers=1,
    )  # fmt: skip
    model = spread_model(config)
    assert {4096, 32768} <= set(limits_of(config))
    twin = twin_of(model)
    assert twin is not None and twin.limits[4096] < twin.limits[32768] <= 2 * CROSSED
    assert max(len(ids) for ids in twin.sequences) > twin.limits[32768]
    assert Policy(model).packing != "varlen"  # its layers do not tell their attention function of the window


def test_wrapping_takes_no_random_numbers_and_keeps_no_twin_of_a_large_model() -> None:
    model = tiny_llama()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    Policy(model)
    assert torch.equal(torch.rand(3), expected)
    with torch.device("meta"):
        config = LlamaConfig(hidden_size=4096, num_hidden_layers=32, vocab_size=128256, max_position_embeddings=8192)
        large = AutoModelForCausalLM.from_config(config)
    twin = twin_of(large)
    assert twin is not None and sum(p.numel() for p in twin.model.parameters()) < 2_000_000
    assert twin.limits == {8192: 32}


def test_whatever_a_model_raises_is_a_refusal() -> None:
    model = tiny_llama()

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise AttributeError("'Broken' object has no attribute 'attn_config'")

    model.model.forward = broken
    with pytest.raises(UnsupportedModelError, match="AttributeError: 'Broken' object"):
        Policy(model)


@pytest.mark.parametrize("change", ["softcap", "scale"])
def test_an_unknown_change_of_bfloat16_logits_is_refused(change: str) -> None:
    """A softcap of 30 on logits of 3 changes them by 0.01: less than bfloat16 rounds them by."""
    model = tiny_llama().to(torch.bfloat16)
    forward = model.forward

    def capped(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        logits = output.logits
        output.logits = 30 * torch.tanh(logits / 30) if change == "softcap" else logits * 1.002
        return output

    model.forward = capped
    with pytest.raises(UnsupportedModelError, match="float rounding explains"):
        Policy(model)
    assert model.get_output_embeddings().weight.dtype == torch.bfloat16


def test_bfloat16_models_with_a_known_transform_are_served() -> None:
    for name in ("gemma2", "cohere", "granite", "phi", "opt", "bloom"):
        Policy(AutoModelForCausalLM.from_config(CONFIGS[name]).to(torch.bfloat16))


def test_float64_models_are_served_in_float64() -> None:
    model = tiny_llama().double()
    policy = Policy(model)
    engine = RolloutEngine(policy, max_completion_length=8)
    prompts = [[1, 5, 6], [1, 9]]
    rollouts = engine.generate(prompts, sequence_ids(0, 1, [0, 1], 0), seed=3)
    assert rollouts.logprobs.dtype == torch.float32
    for prompt, tokens, start in zip(prompts, rollouts.token_lists(), (0, rollouts.lengths[0]), strict=True):
        ids = torch.tensor([*prompt, *tokens])
        hidden = policy.hidden_states(ids[:-1], [len(ids) - 1])
        fused: Any = ops.linear_logprobs(hidden, policy.weight, ids[1:], **policy.head_options)
        own = model(input_ids=ids[None, :-1]).logits[0].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
        torch.testing.assert_close(fused, own, atol=1e-6, rtol=0)
        drawn = rollouts.logprobs[start : start + len(tokens)].double()
        torch.testing.assert_close(drawn, own[-len(tokens) :].detach(), atol=1e-5, rtol=0)


# --- tokens that no tokenizer has -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "phi", "cohere"])
def test_padding_tokens_are_never_drawn_and_count_for_nothing(name: str) -> None:
    policy = Policy(AutoModelForCausalLM.from_config(CONFIGS[name]))
    ids = list(range(60, 97))
    engine = RolloutEngine(policy, max_completion_length=40)
    streams = sequence_ids(0, 1, list(range(16)), 0)
    assert any(t in ids for t in engine.generate([[1, 5]] * 16, streams, seed=1).tokens.tolist())
    policy.mask_padding_tokens(ids)
    rollouts = engine.generate([[1, 5]] * 16, streams, seed=1)
    assert not any(t in ids for t in rollouts.tokens.tolist())
    tokens = rollouts.token_lists()[0]
    whole = torch.tensor([1, 5, *tokens])
    hidden = policy.hidden_states(whole[:-1], [len(whole) - 1])
    logprobs, entropy = ops.linear_logprobs(
        hidden, policy.weight, whole[1:], return_entropy=True, **policy.head_options
    )
    torch.testing.assert_close(logprobs[1:], rollouts.logprobs[: len(tokens)], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(entropy[1:], rollouts.entropy[: len(tokens)], atol=1e-4, rtol=1e-4)
    (logprobs.sum() + entropy.sum()).backward()  # the rows of what cannot occur have no gradient from the head
    own = policy.model(input_ids=whole[None, :-1]).logits[0][:, :60].log_softmax(-1)
    torch.testing.assert_close(own.gather(-1, whole[1:, None])[:, 0], logprobs, atol=1e-4, rtol=1e-4)
    assert all(bool(p.grad.isfinite().all()) for p in policy.parameters() if p.grad is not None)
    policy.mask_padding_tokens([])
    assert policy.head_options["bias"] is policy.bias


def test_padding_tokens_that_cannot_be_masked() -> None:
    policy = Policy(tiny_llama())
    with pytest.raises(ValueError, match=r"padding_token_ids must lie in \[0, 45\); got 45"):
        policy.mask_padding_tokens([45])
    with pytest.raises(ValueError, match="whole vocabulary"):
        policy.mask_padding_tokens(range(45))
    with pytest.raises(ValueError, match=r"softcap of 3\.0"):
        Policy(AutoModelForCausalLM.from_config(CONFIGS["gemma2"])).mask_padding_tokens([5])


# --- files ------------------------------------------------------------------------------------------------------------


def rewrite(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), r"1 missing \(model.layers.1.mlp.up_proj.weight\)"),
        (lambda t: t.pop("lm_head.weight"), r"1 missing \(lm_head.weight\)"),
        (lambda t: t.update({"model.extra.weight": torch.zeros(3)}), r"1 not part of the model \(model.extra.weight\)"),
    ],
)
def test_weights_that_nobody_trained_are_refused(change: Any, message: str, tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path / "model")
    rewrite(folder, change)
    with pytest.raises(UnsupportedModelError, match=message):
        Policy.load(str(folder), device="cpu")


def test_a_shape_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path / "model")
    rewrite(folder, lambda t: t.update({"model.norm.weight": torch.ones(7)}))
    with pytest.raises((UnsupportedModelError, RuntimeError), match=r"norm.weight|mismatch"):
        Policy.load(str(folder), device="cpu")


def test_a_tied_head_is_not_missing(tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path / "model", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    policy = Policy.load(str(folder), device="cpu")
    assert policy.weight is policy.model.get_input_embeddings().weight
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    with pytest.raises(UnsupportedModelError, match=r"lm_head\.weight"):  # said not to be tied, and not there
        Policy.load(str(folder), device="cpu")


def test_the_tokenizer_is_loaded_with_the_model(tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path / "model")
    policy = Policy.load(str(folder), device="cpu")
    assert policy.tokenizer is not None and len(policy.tokenizer) == len(character_tokenizer())
    assert isinstance(policy.base, nn.Module) and isinstance(policy.weight, Tensor)
