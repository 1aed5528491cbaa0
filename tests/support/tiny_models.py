"""Models of a few thousand parameters with a character tokenizer, and a task made of sums, for the training tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_rewards import starts_with_vowel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from bandit_rft.tasks import Example, Task

CHARACTERS = "0123456789+-= abcdefghijklmnopqrstuvwxyz.?"


def character_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def tiny_llama(seed: int = 0, **options: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "vocab_size": 3 + len(CHARACTERS), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
            "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **options,
        }
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def save_tiny_llama(folder: Path, **options: Any) -> Path:
    tiny_llama(**options).save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return folder


def sums(count: int = 24) -> Task:
    examples = [Example(f"{i}+{(7 * i) % 13}=", {"answer": str(i + (7 * i) % 13)}) for i in range(count)]
    return Task("sums", {"train": examples, "test": examples[:7]}, [starts_with_vowel])
