"""Prompts on their way to the engine, and the data a run was started with."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from tiny_models import character_tokenizer
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from bandit_rft import data
from bandit_rft.data import Fingerprint, PromptSet, data_difference, fingerprint, padding_token_ids, prompt_tokens
from bandit_rft.tasks import Example, load_task

CHAT = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{{ m.content }}{% if not loop.last or m.role != 'assistant' or add_generation_prompt %}.{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}a{% endif %}"
)


def ending_tokenizer(template: str = "<s> $A </s>") -> PreTrainedTokenizerFast:
    tokenizer = character_tokenizer()
    specials = [("<s>", 1), ("</s>", 2)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=specials)
    return tokenizer


# --- tokens -----------------------------------------------------------------------------------------------------------


def test_an_end_that_the_tokenizer_appends_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    data._say_once.cache_clear()
    tokenizer = ending_tokenizer()
    bare = character_tokenizer()("1+1=")["input_ids"]
    assert tokenizer("1+1=")["input_ids"] == [1, *bare, 2]
    prompts = PromptSet("train", [Example("1+1=", {}), Example("1", {})], tokenizer, max_prompt_length=9)
    assert prompts.tokens == [[1, *bare], [1, bare[0]]]
    assert caplog.text.count("the tokenizer ends every text with ['</s>']") == 1
    assert prompt_tokens("1", ending_tokenizer("$A </s> </s>"), "auto") == [bare[0]]
    # whatever it appends: here a token that is not its eos_token, or one that has no role at all
    other = ending_tokenizer()
    other.eos_token = "a"
    assert prompt_tokens("1", other, "auto") == [1, bare[0]]
    other.eos_token = None
    assert prompt_tokens("1", other, "auto") == [1, bare[0]]
    # what the text itself says stays
    assert prompt_tokens("1</s>", ending_tokenizer("$A"), "auto") == [bare[0], 2]
    assert prompt_tokens("1</s>", ending_tokenizer(), "auto") == [1, bare[0], 2]


def test_a_chat_prompt_that_ends_with_the_assistant_is_continued() -> None:
    tokenizer = character_tokenizer()
    tokenizer.chat_template = CHAT
    messages = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "so 1+1="}]
    assert tokenizer.decode(prompt_tokens(messages, tokenizer, "auto")) == "1+1.so 1+1="
    assert tokenizer.decode(prompt_tokens(messages[:1], tokenizer, "auto")) == "1+1.a"


TURNS = (
    "{% for m in messages %}<s>{{ m.role }}.{{ m.content | trim }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant.{% endif %}"
)


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        (("user 1+1", "assistant so"), "<s>user.1+1</s><s>assistant.so"),
        (("user 1+1", "assistant so "), "<s>user.1+1</s><s>assistant.so"),
        (("user 1+1", "assistant s"), "<s>user.1+1</s><s>assistant.s"),  # </s> has one too
        (("user 1+1", "assistant "), "<s>user.1+1</s><s>assistant."),
        (("system be", "user so", "assistant so"), "<s>system.be</s><s>user.so</s><s>assistant.so"),
        (("assistant so",), "<s>assistant.so"),
        (("assistant so", "tool 2"), "<s>assistant.so</s><s>tool.2</s><s>assistant."),
        (("assistant so", "tool 2", "assistant is"), "<s>assistant.so</s><s>tool.2</s><s>assistant.is"),
        (("user 1", "system be"), "<s>user.1</s><s>system.be</s><s>assistant."),
    ],
)
def test_where_a_chat_goes_on(turns: tuple[str, ...], expected: str) -> None:
    tokenizer = character_tokenizer()
    tokenizer.chat_template = TURNS
    messages = [dict(zip(("role", "content"), turn.split(" ", 1), strict=True)) for turn in turns]
    assert tokenizer.decode(prompt_tokens(messages, tokenizer, "auto")) == expected


THINKING = (
    "{% for m in messages %}{{ m.content }}{% endfor %}{% for d in documents or [] %}{{ d.text }}{% endfor %}"
    "{% if add_generation_prompt %}={% if enable_thinking is false %}so{% endif %}{% endif %}"
)


def test_the_chat_template_reads_what_it_is_given() -> None:
    tokenizer = character_tokenizer()
    tokenizer.chat_template = THINKING
    rows = [Example("1+1", {}), Example([{"role": "user", "content": "2"}], {})]

    def texts(**given: object) -> list[str]:
        prompts = PromptSet("test", rows, tokenizer, chat_template_kwargs=given, max_prompt_length=20)
        return [tokenizer.decode(ids) for ids in prompts.tokens]

    assert texts() == texts(enable_thinking=True) == ["1+1=", "2="]
    assert texts(enable_thinking=False) == ["1+1=so", "2=so"]
    messages = PromptSet(  # which go through the template in any case
        "test", rows[1:], tokenizer, chat_template="never", chat_template_kwargs={"enable_thinking": False},
        max_prompt_length=20,
    )  # fmt: skip
    assert tokenizer.decode(messages.tokens[0]) == "2=so"
    tokenizer.chat_template += "{% generation %}{% endgeneration %}"
    assert texts(enable_thinking=False) == ["1+1=so", "2=so"]
    tokenizer.chat_template = THINKING
    assert texts(documents=[{"title": "t", "text": "a"}]) == ["1+1a=", "2a="]


@pytest.mark.parametrize(
    ("template", "use", "given", "message"),
    [
        (THINKING, "auto", {"enable_thinkin": False}, "does not read enable_thinkin$"),
        (THINKING, "auto", {"enable_thinking": False, "add_generation_prompt": False}, "read add_generation_prompt$"),
        (THINKING, "never", {"enable_thinking": False}, "chat_template=never, so nothing reads enable_thinking"),
        (None, "auto", {"enable_thinking": False}, "no chat template, so nothing reads enable_thinking"),
        (THINKING, "auto", {"content": 1, "m": 2}, "does not read content, m$"),  # words of the template
        (THINKING, "auto", {"messages": []}, "does not read messages$"),
    ],
)
def test_what_no_template_reads_is_refused(template: str | None, use: str, given: dict[str, Any], message: str) -> None:
    tokenizer = character_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=f"chat_template_kwargs: .*{message}"):
        PromptSet(
            "test", [Example("1", {})], tokenizer, chat_template=use, chat_template_kwargs=given, max_prompt_length=9
        )


def test_a_prompt_that_cannot_be_tokenized_names_its_row() -> None:
    tokenizer = character_tokenizer()
    tokenizer.chat_template = CHAT
    good = [{"role": "user", "content": "1"}]
    for bad, message in (
        ([{"role": "system", "content": "be good"}, *good], "test row 1: .*chat template refuses .*no system role"),
        ([{"role": "user", "content": "1\ud800"}], "test row 1: .*lone surrogate at character 1"),
        ("\ud800", "test row 1: .*lone surrogate at character 0"),
    ):
        with pytest.raises(ValueError, match=message):
            PromptSet("test", [Example(good, {}), Example(bad, {})], tokenizer, max_prompt_length=9)


def test_too_many_prompts_that_are_too_long_are_refused() -> None:
    examples = [Example("1" * n, {}) for n in (3, 9, 5, 12, 14, 20)]
    with pytest.raises(
        ValueError, match=r"max_prompt_length=5 leaves out 4 of 6 prompts of train, more than 50%.*95% up"
    ):
        PromptSet("train", examples, character_tokenizer(), max_prompt_length=5)
    half = PromptSet("train", examples, character_tokenizer(), max_prompt_length=9)
    assert (len(half), half.filtered) == (3, 3)
    with pytest.raises(ValueError, match="leaves out 6 of 6 prompts"):
        PromptSet("train", examples, character_tokenizer(), max_prompt_length=2)
    assert len(PromptSet("train", [], character_tokenizer(), max_prompt_length=2)) == 0


def test_prompts_left_out_of_what_is_evaluated_are_told_from_those_of_training(
    caplog: pytest.LogCaptureFixture,
) -> None:
    examples = [Example("1" * n, {}) for n in (3, 9, 3, 3)]
    for limit in (None, 2):
        PromptSet("train", examples, character_tokenizer(), max_prompt_length=5, limit=limit)
    whole, part = caplog.messages
    assert whole.startswith("train: 1 of 4 prompts are longer than max_prompt_length=5")
    assert part.startswith("train, the first 2 to evaluate: 1 of 3 prompts are longer")


def test_gsm8k_with_64_tokens_is_refused(data_dir: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(data_dir / "model-stories260K" / "hf")
    examples = load_task("gsm8k", data_path=str(data_dir / "gsm8k")).splits["train"][:500]
    with pytest.raises(ValueError, match=r"max_prompt_length=64 leaves out .* of 500 prompts of train"):
        PromptSet("train", examples, tokenizer, max_prompt_length=64)


def test_padding_token_ids() -> None:
    tokenizer = character_tokenizer()
    size = len(tokenizer)
    assert padding_token_ids(tokenizer, size) == []
    assert padding_token_ids(tokenizer, size + 3) == [size, size + 1, size + 2]
    assert padding_token_ids(tokenizer, size + 3, keep=[size + 1]) == [size, size + 2]
    tokenizer.add_tokens(["<extra>"])
    assert padding_token_ids(tokenizer, size + 3) == [size + 1, size + 2]
    assert padding_token_ids(tokenizer, size - 2) == []  # a head smaller than the vocabulary
    holes = {token: 2 * number for token, number in tokenizer.get_vocab().items()}
    tokenizer.get_vocab = lambda: holes  # type: ignore[method-assign]
    assert padding_token_ids(tokenizer, 6) == [1, 3, 5]


def test_the_real_models_have_no_padding(data_dir: Path) -> None:
    for name in ("model-stories260K", "model-babyllama936K"):
        tokenizer = PreTrainedTokenizerFast.from_pretrained(data_dir / name / "hf")
        size = json.loads((data_dir / name / "hf" / "config.json").read_text())["vocab_size"]
        assert padding_token_ids(tokenizer, size) == []
        assert padding_token_ids(tokenizer, size + 2) == [size, size + 1]


# --- the same data ----------------------------------------------------------------------------------------------------


def rows(count: int) -> list[Example]:
    return [Example(f"{i}+1=", {"answer": str(i + 1), "level": i % 3}) for i in range(count)]


def change(examples: list[Example], row: int, prompt: str | None = None, **columns: object) -> list[Example]:
    old = examples[row]
    new = Example(old.prompt if prompt is None else prompt, {**old.columns, **columns})
    return [*examples[:row], new, *examples[row + 1 :]]


@pytest.mark.parametrize(
    ("altered", "difference"),
    [
        (lambda r: r, None),
        (lambda r: [Example(e.prompt, dict(reversed(e.columns.items()))) for e in r], None),
        (lambda r: change(r, 17, answer="19"), "train: the answers or other columns differ, first in row 17"),
        (lambda r: change(r, 17, level=None), "train: the answers or other columns differ, first in row 17"),
        (lambda r: change(r, 0, "9+9="), "train: the prompts differ, first in row 0"),
        (lambda r: change(r, 49, "9+9=", answer="18"),
         "train: the prompts and the answers or other columns differ, first in row 49"),
        (lambda r: r[:-1], "train: 49 rows, where there were 50"),
        (lambda r: [*r, r[0]], "train: 51 rows, where there were 50"),
        (lambda r: random.Random(0).sample(r, len(r)), "train: the same rows in another order"),
        (lambda r: [r[1], r[0], *r[2:]], "train: the same rows in another order"),
        (lambda r: [r[1], *r[1:]], "train: the prompts and the answers or other columns differ, first in row 0"),
        (lambda r: change(change(r, 3, answer=r[4].columns["answer"]), 4, answer=r[3].columns["answer"]),
         "train: the answers or other columns differ, first in row 3"),
    ],
)  # fmt: skip
def test_changed_data_are_noticed(altered: Callable[[list[Example]], list[Example]], difference: str | None) -> None:
    saved = json.loads(json.dumps(asdict(fingerprint(rows(50)))))  # as a checkpoint keeps it
    assert data_difference("train", saved, fingerprint(altered(rows(50)))) == difference


def test_a_fingerprint_is_small_and_the_same_everywhere() -> None:
    large = fingerprint(rows(10_001))
    assert len(json.dumps(asdict(large))) < 1200 and len(large.blocks) == 64
    assert data_difference("a", large, fingerprint(change(rows(10_001), 10_000, answer="x"))) == (
        "a: the answers or other columns differ, first in rows 9891 to 10000"
    )
    assert fingerprint([]) == fingerprint([]) and data_difference("a", fingerprint([]), fingerprint(rows(1)))
    # these very values are in checkpoints: another way to compute them would refuse every one of them
    two = [Example("a\ud800", {"answer": "b", "x": [1.5, None]}), Example([{"role": "user", "content": "c"}], {})]
    assert fingerprint(two) == Fingerprint(
        rows=2,
        prompts="6067ce466f33b510c28c2f28a7832e84",
        columns="6c590289465fb3609e6beb6f2d7f4fc2",
        unordered="00ae17b83d43ad84fee0c942e5832d88",
        blocks=["be88dceb", "42253acc"],
    )


def test_boundaries_between_rows_count() -> None:
    one, other = [Example("a", {}), Example("b", {})], [Example("ab", {}), Example("", {})]
    assert data_difference("train", fingerprint(one), fingerprint(other)) is not None
