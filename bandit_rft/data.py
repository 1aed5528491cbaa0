"""Examples as the engine takes them (token ids) and as rewards take them (text or messages)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from bandit_rft.rewards import RewardResult, RewardRunner
from bandit_rft.tasks import Example, collate

logger = logging.getLogger(__name__)


class PromptSet:
    """The examples of one split, tokenized; those with too long a prompt are left out and counted.

    Attributes:
        indices: index in the split of each example kept; tokens: its prompt's token ids; examples: the example itself.
        filtered: how many were left out.
    """

    def __init__(
        self,
        name: str,
        examples: Sequence[Example],
        tokenizer: PreTrainedTokenizerBase,
        *,
        chat_template: str = "auto",
        max_prompt_length: int,
        limit: int | None = None,
    ):
        self.name = name
        self.indices: list[int] = []
        self.tokens: list[list[int]] = []
        self.examples: list[Example] = []
        self.filtered = 0
        for index, example in enumerate(examples):
            if limit is not None and len(self.indices) == limit:
                break
            ids = prompt_tokens(example.prompt, tokenizer, chat_template)
            if not 0 < len(ids) <= max_prompt_length:
                self.filtered += 1
                continue
            self.indices.append(index)
            self.tokens.append(ids)
            self.examples.append(example)
        if self.filtered:
            logger.warning(
                "%s: %d of %d prompts are longer than max_prompt_length=%d (or empty) and were left out",
                name, self.filtered, self.filtered + len(self), max_prompt_length,
            )  # fmt: skip

    def __len__(self) -> int:
        return len(self.indices)


def prompt_tokens(
    prompt: str | list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, chat_template: str
) -> list[int]:
    """Token ids of a prompt: chat messages, or text that becomes a user message where the model is a chat model.

    Raises ValueError for chat messages and a tokenizer without a chat template.
    """
    if isinstance(prompt, str) and (tokenizer.chat_template is None or chat_template == "never"):
        return list(tokenizer(prompt)["input_ids"])
    if tokenizer.chat_template is None:
        raise ValueError("the prompts are chat messages, but the model's tokenizer has no chat template")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False))


def completion_texts(
    token_lists: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase, stop_tokens: Sequence[int]
) -> list[str]:
    """The text of each completion, without its stop token and other special tokens."""
    stops = set(stop_tokens)
    bare = [list(ids[:-1]) if ids and ids[-1] in stops else list(ids) for ids in token_lists]
    return list(tokenizer.batch_decode(bare, skip_special_tokens=True))


def prompt_text(prompt: str | list[dict[str, str]]) -> str:
    """A prompt as a person reads it."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)


def score(runner: RewardRunner, examples: Sequence[Example], texts: Sequence[str]) -> RewardResult:
    """Rewards of completions, handed over as the ecosystem has it: text for text, messages for messages."""
    completions: list[Any] = [
        text if isinstance(example.prompt, str) else [{"role": "assistant", "content": text}]
        for example, text in zip(examples, texts, strict=True)
    ]
    return runner.score([example.prompt for example in examples], completions, collate(examples))


def query_order(size: int, batch_size: int, seed: int, first: int, count: int) -> list[int]:
    """Positions in a set of `size` that are trained on as number first, first + 1, ... (0 is the first of the run).

    Shuffled epochs, the last partial batch of each dropped. A pure function: all that has to be remembered is `first`.
    Raises ValueError when a batch is more than there is.
    """
    if size < batch_size:
        raise ValueError(f"batch_size={batch_size} is more than the {size} training prompts")
    length = size // batch_size * batch_size
    return [int(_epoch(size, seed, i // length)[i % length]) for i in range(first, first + count)]


@lru_cache(maxsize=2)
def _epoch(size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(size)
