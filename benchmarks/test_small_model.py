"""What the core takes over of a small model on a CPU: attention of packed sequences, and decoding steps."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, LlamaConfig

from bandit_rft.model import Policy
from bandit_rft.ops.attention import packed_attention
from bandit_rft.rollout import RolloutEngine, sequence_ids

Versus = Callable[..., float]


@pytest.mark.parametrize(("sequences", "length", "size"), [(32, 47, 16), (8, 512, 64), (2, 2048, 64)])
def test_packed_attention(versus: Versus, sequences: int, length: int, size: int) -> None:
    """Sequences of one length, so that PyTorch's kernel needs no padding either."""
    torch.manual_seed(0)
    packed = [torch.randn(sequences * length, heads, size, requires_grad=True) for heads in (8, 4, 4)]
    plain = [torch.randn(sequences, heads, length, size, requires_grad=True) for heads in (8, 4, 4)]
    cu_seqlens = torch.arange(sequences + 1) * length
    grads = torch.randn(sequences * length, 8, size), torch.randn(sequences, 8, length, size)
    versus(
        f"attention, {sequences} sequences of {length}, head size {size}, fwd+bwd / scaled_dot_product_attention",
        lambda: packed_attention(*packed, cu_seqlens, size**-0.5).backward(grads[0]),
        lambda: F.scaled_dot_product_attention(*plain, is_causal=True, enable_gqa=True).backward(grads[1]),
        bar=1.0,
        rounds=30 if length < 100 else 7,
    )


def generate(versus: Versus, config: LlamaConfig, rows: int, prompt: int, new: int, rounds: int) -> None:
    policy = Policy(AutoModelForCausalLM.from_config(config))
    policy.stop_tokens = []
    native, model = (RolloutEngine(policy, max_completion_length=new) for _ in range(2))
    assert native._native is not None
    model._native = None
    prompts, ids = torch.randint(config.vocab_size, (rows, prompt)).tolist(), sequence_ids(0, 1, list(range(rows)), 0)
    millions = sum(p.numel() for p in policy.model.parameters()) / 1e6
    versus(
        f"generate, {rows} x ({prompt} + {new}) tokens, {millions:.1f}M parameters / the model's own forward",
        lambda: native.generate(prompts, ids, seed=1),
        lambda: model.generate(prompts, ids, seed=1),
        bar=1.0,
        rounds=rounds,
    )


@pytest.mark.parametrize("rows", [1, 32, 256])
def test_generate(versus: Versus, rows: int) -> None:
    config = LlamaConfig(
        vocab_size=1024, hidden_size=128, intermediate_size=352, num_hidden_layers=5, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=128, tie_word_embeddings=True,
    )  # fmt: skip
    generate(versus, config, rows, prompt=16, new=32, rounds=7)


@pytest.mark.parametrize(("rows", "prompt", "new"), [(1, 16, 32), (32, 16, 32), (4, 400, 8), (1, 400, 8)])
def test_generate_with_a_larger_model(versus: Versus, rows: int, prompt: int, new: int) -> None:
    """Where the products take over, and prompts are long enough for a BLAS."""
    config = LlamaConfig(
        vocab_size=50257, hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=16,
        num_key_value_heads=8, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    generate(versus, config, rows, prompt, new, rounds=5)
