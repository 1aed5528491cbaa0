"""The models whose rounds and decoding are measured: Llamas with random weights, as Hugging Face folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

#: name -> configuration. The first is that of the rounds; the others decode, with heads of a size that vLLM serves and
#: weights so large that a greedy token depends on the order of those before it: with 0.02, transformers' own, most
#: sequences repeat one token for ever, and llama.cpp agreed even where the heads of its GGUF were left as they are.
SIZES: dict[str, dict[str, Any]] = {
    "1.1M": {
        "vocab_size": 1024, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 5,
        "num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": True,
    },
    "1.3M": {
        "vocab_size": 1536, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 5,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False, "initializer_range": 0.1,
    },
    "160M": {
        "vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8,
        "num_attention_heads": 16, "num_key_value_heads": 8, "tie_word_embeddings": False, "initializer_range": 0.04,
    },
}  # fmt: skip


def make(size: str, folder: Path) -> int:
    """Write the model and a tokenizer of as many words; its parameters."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    sizes = SIZES[size]
    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(sizes["vocab_size"] - 3))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(max_position_embeddings=2048, bos_token_id=1, eos_token_id=2, pad_token_id=0, **sizes)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def flop(config: Any, tokens: int, rows: int) -> float:
    """Of a forward pass over so many tokens whose head sees so many rows: two for each weight of a product a token.

    The embedding's look-up is none, and attention is left out.
    """
    attention = config.hidden_size * config.head_dim * 2 * (config.num_attention_heads + config.num_key_value_heads)
    layer = attention + 3 * config.hidden_size * config.intermediate_size
    return 2.0 * (tokens * config.num_hidden_layers * layer + rows * config.hidden_size * config.vocab_size)


def update_products(config: Any, tokens: int, rows: int) -> list[tuple[int, int, int]]:
    """(n, inputs, outputs) of every product of a forward pass over so many tokens, whose head sees so many rows.

    Two more of each follow going backward.
    """
    h, wide, middle = config.hidden_size, config.head_dim, config.intermediate_size
    queries, keys = config.num_attention_heads * wide, config.num_key_value_heads * wide
    shapes = [(h, queries), (h, keys), (h, keys), (queries, h), (h, middle), (h, middle), (middle, h)]
    layers = [(tokens, *shape) for shape in shapes] * config.num_hidden_layers
    return [*layers, (rows, h, config.vocab_size)]
