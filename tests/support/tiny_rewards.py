"""Rewards of the training tests, apart from everything heavy: worker processes import this file."""

from __future__ import annotations

from typing import Any


def starts_with_vowel(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [float(text[:1] in "aeiou" and text != "") for text in completions]


def begins_without_vowel(completion: str) -> bool:
    return completion != "" and completion[0] not in "aeiou"


HOPELESS = {"starts_with_vowel": begins_without_vowel}


def everything(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [1.0] * len(completions)


def nothing(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [0.0] * len(completions)


def longer(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [float(len(text) + i % 2) for i, text in enumerate(completions)]


def none_for_some(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
    return [None if i % 3 == 0 else 1.0 for i in range(len(completions))]


def mentions_answer(prompts: list[str], completions: list[str], answer: list[str], **columns: Any) -> list[float]:
    return [float(word in text) for word, text in zip(answer, completions, strict=True)]


def raises(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    raise LookupError("no such answer")


def times_out(completions: list[str], **columns: object) -> list[float]:
    raise TimeoutError("Request timed out.")
