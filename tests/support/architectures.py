"""Small models of fifteen architectures, by name, and the log-probabilities that their own logits give."""

from __future__ import annotations

import torch
from torch import nn
from transformers import (
    BloomConfig,
    Cohere2Config,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    OPTConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)

COMMON = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**COMMON),
    "qwen2": Qwen2Config(**COMMON),
    "qwen3": Qwen3Config(**COMMON, head_dim=8),
    "olmo2": Olmo2Config(**COMMON),
    "gpt2": GPT2Config(
        vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3, bos_token_id=1,
        eos_token_id=2,
    ),
    "gemma2": Gemma2Config(
        **COMMON, head_dim=8, sliding_window=5, query_pre_attn_scalar=8, final_logit_softcapping=3.0
    ),
    "gemma3": Gemma3TextConfig(**COMMON, head_dim=8, sliding_window=5, final_logit_softcapping=5.0),
    "cohere": CohereConfig(**COMMON),
    "cohere2": Cohere2Config(**COMMON, sliding_window=5),
    "granite": GraniteConfig(**COMMON, logits_scaling=8.0),
    "phi": PhiConfig(**COMMON),
    "mistral": MistralConfig(**COMMON, sliding_window=6),
    "opt": OPTConfig(
        vocab_size=97, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=16,
        max_position_embeddings=64, init_std=0.3, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    ),
    "bloom": BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3),
}  # fmt: skip


def own_logprobs(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids[None, :-1]).logits[0].double()
    return logits.log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
