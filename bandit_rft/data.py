"""Examples as the engine takes them (token ids) and as rewards take them (text or messages), and what data they are."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

from jinja2 import Environment, TemplateError, meta
from transformers import PreTrainedTokenizerBase

from bandit_rft.rewards import RewardResult
from bandit_rft.tasks import Example, collate
from bandit_rft.tasks.checks import check_filtered
from bandit_rft.text import LIMIT, lone_surrogate, printable

logger = logging.getLogger(__name__)

BLOCKS = 64  # of rows whose digests a fingerprint keeps


class PromptSet:
    """The examples of one split, tokenized; those with too long a prompt are left out and counted.

    Attributes:
        indices: index in the split of each example kept.
        tokens: the token ids of its prompt.
        examples: the example itself.
        filtered: how many were left out, for a length of 0 or more than max_prompt_length tokens.
        lengths: of every prompt, in tokens, those left out among them.

    Raises:
        ValueError: where most of the prompts would be left out (tasks.checks.MAX_FILTERED), a row has a prompt that
            cannot be tokenized (the message names it), or the chat template does not read what it is given.
    """

    def __init__(
        self,
        name: str,
        examples: Sequence[Example],
        tokenizer: PreTrainedTokenizerBase,
        *,
        chat_template: str = "auto",
        chat_template_kwargs: Mapping[str, Any] | None = None,
        max_prompt_length: int,
        limit: int | None = None,
    ):
        templated = chat_template != "never" or not all(isinstance(example.prompt, str) for example in examples)
        check_template_kwargs(chat_template_kwargs or {}, tokenizer, templated)
        self.name = name
        self.indices: list[int] = []
        self.tokens: list[list[int]] = []
        self.examples: list[Example] = []
        self.filtered = 0
        self.lengths: list[int] = []
        for index, example in enumerate(examples):
            if limit is not None and len(self.indices) == limit:
                break
            try:
                ids = prompt_tokens(example.prompt, tokenizer, chat_template, chat_template_kwargs)
            except ValueError as error:
                raise ValueError(f"{name} row {index}: {error}") from error
            self.lengths.append(len(ids))
            if not 0 < len(ids) <= max_prompt_length:
                self.filtered += 1
                continue
            self.indices.append(index)
            self.tokens.append(ids)
            self.examples.append(example)
        check_filtered(name, max_prompt_length, self.lengths)
        if self.filtered:
            which = name if limit is None else f"{name}, the first {limit} to evaluate"
            logger.warning(
                "%s: %d of %d prompts are longer than max_prompt_length=%d (or empty) and were left out",
                which, self.filtered, self.filtered + len(self), max_prompt_length,
            )  # fmt: skip

    def __len__(self) -> int:
        return len(self.indices)


def check_template_kwargs(given: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, templated: bool) -> None:
    """Refuse what no prompt would show.

    Raises:
        ValueError: something is given, and no chat template is used, or it does not read it.
    """
    if not given:
        return
    if not templated or tokenizer.chat_template is None:
        why = "the model's tokenizer has no chat template" if templated else "chat_template=never"
        raise ValueError(f"chat_template_kwargs: {why}, so nothing reads {', '.join(given)}")
    template = str(tokenizer.get_chat_template(tools=given.get("tools")))
    # What transformers adds to Jinja: a tag around the assistant's turns, and loop controls.
    plain = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)
    try:
        parsed = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)
        read = meta.find_undeclared_variables(parsed) - {"messages"}
    except TemplateError:  # with other tags still: any of its words
        read = set(re.findall(r"\w+", template))
    own = inspect.signature(tokenizer.apply_chat_template).parameters.keys() - {"tools", "documents"}
    if unread := [name for name in given if name not in read or name in own]:
        raise ValueError(f"chat_template_kwargs: the tokenizer's chat template does not read {', '.join(unread)}")


def prompt_tokens(
    prompt: str | list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids of a prompt: chat messages, or text that becomes a user message where the model is a chat model.

    The template also reads `chat_template_kwargs`. Where the last message is the assistant's, the completion continues
    it. An end-of-text token that the tokenizer puts behind every text is left out: nothing can continue a text that has
    ended.

    Raises:
        ValueError: for chat messages and a tokenizer without a chat template, messages that the template refuses, and
            text that cannot be encoded.
    """
    for text in [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]:
        if (found := lone_surrogate(text)) is not None:
            around = printable(text[max(0, found - 20) : found + 20], one_line=True)
            raise ValueError(
                f"the prompt holds a lone surrogate at character {found}, which no tokenizer takes: {around}"
            )
    if isinstance(prompt, str) and (tokenizer.chat_template is None or chat_template == "never"):
        return _without_end(list(tokenizer(prompt)["input_ids"]), prompt, tokenizer)
    if tokenizer.chat_template is None:
        raise ValueError("the prompts are chat messages, but the model's tokenizer has no chat template")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    continued = messages[-1]["role"] == "assistant"
    try:
        ids = tokenizer.apply_chat_template(
            messages,
            add_generation_prompt=not continued,
            continue_final_message=continued,
            tokenize=True,
            return_dict=False,
            **(chat_template_kwargs or {}),
        )
    except (TemplateError, ValueError, TypeError) as error:
        raise ValueError(
            f"the tokenizer's chat template refuses the messages: {printable(str(error), LIMIT, one_line=True)}"
        ) from error
    return list(ids)


def _without_end(ids: list[int], text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Leave out the special tokens that the tokenizer, not the text, has put behind the text."""
    if not tokenizer.num_special_tokens_to_add():
        return ids
    bare = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    for end in range(len(ids), len(bare) - 1, -1):
        if ids[end - len(bare) : end] == bare:
            if ids[end:]:
                _say_once(
                    f"the tokenizer ends every text with {tokenizer.convert_ids_to_tokens(ids[end:])}: left out of the "
                    "prompts, which completions are to continue"
                )
            return ids[:end]
    return ids


@lru_cache(maxsize=16)
def _say_once(message: str) -> None:
    logger.warning(message)


def padding_token_ids(tokenizer: PreTrainedTokenizerBase, vocab_size: int, keep: Iterable[int] = ()) -> list[int]:
    """Token ids that a model has and its tokenizer does not.

    Heads are padded to a round size (Qwen2.5: 151,936 rows for 151,665 tokens). The padding is never a target in
    pretraining, but its logits are numbers like any other, and such a token, once drawn, has no text.

    Args:
        tokenizer: its vocabulary and added tokens count.
        vocab_size: rows of the model's head.
        keep: ids that are needed whatever the tokenizer says, such as stop tokens.

    Returns:
        The ids in [0, vocab_size) that stand for nothing, in ascending order.
    """
    known = {*tokenizer.get_vocab().values(), *keep}
    return [token for token in range(vocab_size) if token not in known]


def completion_texts(
    token_lists: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase, stop_tokens: Sequence[int]
) -> list[str]:
    """The text of each completion, without its stop token and other special tokens."""
    stops = set(stop_tokens)
    bare = [list(ids[:-1]) if ids and ids[-1] in stops else list(ids) for ids in token_lists]
    return list(tokenizer.batch_decode(bare, skip_special_tokens=True))


def prompt_text(prompt: str | list[dict[str, Any]]) -> str:
    """A prompt as a person reads it."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)


class Scorer(Protocol):
    """What gives completions their rewards: a RewardRunner, or one that asks another rank's."""

    def score(
        self, prompts: Sequence[Any], completions: Sequence[Any], columns: Mapping[str, Sequence[Any]]
    ) -> RewardResult:
        """Score N completions of N prompts, with N values a column."""


def score(runner: Scorer, examples: Sequence[Example], texts: Sequence[str]) -> RewardResult:
    """Rewards of completions, handed over as the ecosystem has it: text for text, messages for messages."""
    completions: list[Any] = [
        text if isinstance(example.prompt, str) else [{"role": "assistant", "content": text}]
        for example, text in zip(examples, texts, strict=True)
    ]
    return runner.score([example.prompt for example in examples], completions, collate(examples))


@dataclass(frozen=True)
class Fingerprint:
    """What is kept of a split to know it again: about 700 bytes, whatever its size.

    Attributes:
        rows: how many.
        prompts: digest of the prompts in order.
        columns: digest of the answers and the other columns in order.
        unordered: digest of the rows whatever their order.
        blocks: digests of at most BLOCKS runs of equally many rows, which say where a difference begins.
    """

    rows: int
    prompts: str
    columns: str
    unordered: str
    blocks: list[str]

    @property
    def block_size(self) -> int:
        """Rows that one of the blocks covers."""
        return max(1, -(-self.rows // BLOCKS))


def fingerprint(examples: Sequence[Example]) -> Fingerprint:
    """Digest the prompts and columns of a split, as its task has loaded it."""
    prompts, columns, total = hashlib.sha256(), hashlib.sha256(), 0
    blocks: list[str] = []
    size = Fingerprint(len(examples), "", "", "", []).block_size
    for first in range(0, len(examples), size):
        block = hashlib.sha256()
        for example in examples[first : first + size]:
            prompt = json.dumps(example.prompt).encode() + b"\n"  # escaped: no newline within, no lone surrogate
            row = json.dumps(sorted(example.columns.items()), default=_stable).encode() + b"\n"
            prompts.update(prompt)
            columns.update(row)
            block.update(prompt + row)
            total += int.from_bytes(hashlib.sha256(prompt + row).digest()[:16])
        blocks.append(block.hexdigest()[:8])
    return Fingerprint(
        len(examples), prompts.hexdigest()[:32], columns.hexdigest()[:32], f"{total % 2**128:032x}", blocks
    )


def data_difference(split: str, before: Fingerprint | Mapping[str, Any], now: Fingerprint) -> str | None:
    """Say how a split differs from what it was.

    Args:
        split: its name, for the message.
        before: a fingerprint, or its fields as `dataclasses.asdict` gives them and JSON keeps them.
        now: today's.

    Returns:
        A sentence part such as "train: the answers or other columns differ, first in row 17"; None if nothing differs.
    """
    old = before if isinstance(before, Fingerprint) else Fingerprint(**before)
    if old == now:
        return None
    if old.rows != now.rows:
        return f"{split}: {now.rows:,} rows, where there were {old.rows:,}"
    if old.unordered == now.unordered:
        return f"{split}: the same rows in another order"
    what = ["prompts"] * (old.prompts != now.prompts) + ["answers or other columns"] * (old.columns != now.columns)
    block = next((i for i, pair in enumerate(zip(old.blocks, now.blocks, strict=True)) if pair[0] != pair[1]), 0)
    first, last = block * now.block_size, min(now.rows, (block + 1) * now.block_size) - 1
    place = f"row {first}" if first == last else f"rows {first} to {last}"
    return f"{split}: the {' and the '.join(what)} differ, first in {place}"


def _stable(value: Any) -> Any:
    """Turn what JSON does not know into what is the same in every process."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Mapping):
        return dict(value)
    return value.isoformat() if hasattr(value, "isoformat") else type(value).__name__
