"""What is found out about a task's examples before anything is trained on them."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from bandit_rft.rewards.spec import RewardFunction
from bandit_rft.tasks.base import Example, Task, collate
from bandit_rft.text import lone_surrogate, printable

log = logging.getLogger(__name__)

MAX_REFERENCES = 10_000  # answers of a split that are scored, evenly spaced
#: The share of a split's prompts that may be left out for their length; above it the data are not what was meant.
MAX_FILTERED = 0.5


def check_task(task: Task) -> None:
    """Refuse examples that cannot be used, and answers that no completion can earn.

    Args:
        task: its `reference_rates` are set: for each "split/reward" the share of answers that earn that reward when
            they are written as it reads them. Rewards that declare no such form (`RewardFunction.reference`) have none.

    Raises:
        ValueError: naming the split, the row and the column.
    """
    for split, examples in task.splits.items():
        for row, example in enumerate(examples):
            _check_example(example, f"{task.name} {split} row {row}")
        for reward in task.rewards:
            assert isinstance(reward, RewardFunction)
            if reward.reference is not None and any("answer" in example.columns for example in examples):
                rate = _reference_rate(task.name, split, examples, reward)
                task.reference_rates[f"{split}/{reward.name}"] = rate


def _check_example(example: Example, where: str) -> None:
    for name, value in (("prompt", example.prompt), *example.columns.items()):
        if problem := unusable(value):
            raise ValueError(f"{where}, column {name}: {problem}")


def unusable(value: Any) -> str:
    """Say why a value cannot be handed to a reward in another process, or "": what JSON can hold can."""
    if value is None or isinstance(value, bool | int | float):
        return ""
    if isinstance(value, str):
        found = lone_surrogate(value)
        if found is None:
            return ""
        around = printable(value[max(0, found - 20) : found + 20], one_line=True)
        return f"no tokenizer and no file takes the lone surrogate at character {found}; remove it: {around}"
    if isinstance(value, Mapping):
        return next((problem for pair in value.items() for part in pair if (problem := unusable(part))), "")
    if isinstance(value, list | tuple):
        return next((problem for part in value if (problem := unusable(part))), "")
    if hasattr(value, "tolist") or hasattr(value, "isoformat"):  # arrays and dates are converted
        return ""
    return (
        f"{type(value).__name__} cannot be handed to a reward; store it as text or as a number, or leave the column out"
    )


def _reference_rate(name: str, split: str, examples: Sequence[Example], reward: RewardFunction) -> float:
    """Score answers written as the reward reads them; return the share that earns anything."""
    step = -(-len(examples) // MAX_REFERENCES)
    rows = range(0, len(examples), step)
    chosen = [examples[row] for row in rows]
    completions = [str(reward.reference).replace("{answer}", _text(one.columns.get("answer"))) for one in chosen]
    calls = reward.calls(
        reward.load(prepare=False), [one.prompt for one in chosen], completions, collate(chosen)
    )  # fmt: skip
    scores = [entry for call in calls for entry in call]
    wrong = [row for row, score in zip(rows, scores, strict=True) if isinstance(score, str) or not score]
    if not wrong:
        return 1.0
    answer, completion = examples[wrong[0]].columns.get("answer"), completions[wrong[0] // step]
    shown = f"row {wrong[0]} has the answer {_quoted(answer)}, and {_quoted(completion)} earns nothing{_hint(answer)}"
    rate = 1 - len(wrong) / len(rows)
    if not rate:
        raise ValueError(f"{name} {split}: reward {reward.name!r} pays none of the {len(rows)} answers: {shown}")
    log.warning(
        "%s %s: reward %r can pay %d of %d answers (%.2f%%); the first it cannot: %s",
        name, split, reward.name, len(rows) - len(wrong), len(rows), 100 * rate, shown,
    )  # fmt: skip
    return rate


def _text(answer: Any) -> str:
    return answer if isinstance(answer, str) else "" if answer is None else str(answer)


def _quoted(value: Any) -> str:
    text = repr(value)
    return printable(text if len(text) <= 120 else f"{text[:50]} ... {text[-60:]}", one_line=True)


def _hint(answer: Any) -> str:
    """Say what is unusual about an answer that earns nothing."""
    if answer is None or (isinstance(answer, str) and not answer.strip()):
        return " (it is empty)"
    if not isinstance(answer, str):
        return f" (it is no text but of type {type(answer).__name__}: store it as a text)"
    if "####" in answer:
        return ' (it is a whole solution: use the task "gsm8k", or keep what follows "####")'
    if any(mark in answer for mark in ",$% "):
        return " (expected the bare number, without commas, signs and spaces)"
    return ""


def check_filtered(name: str, max_prompt_length: int, lengths: Sequence[int]) -> int:
    """How many of a split's prompts are left out, for a length of 0 or more than max_prompt_length tokens.

    Raises:
        ValueError: it is more than MAX_FILTERED of them.
    """
    filtered = sum(not 0 < length <= max_prompt_length for length in lengths)
    if filtered > MAX_FILTERED * len(lengths):
        ordered = sorted(lengths)
        half, most = (ordered[math.ceil(share * (len(ordered) - 1))] for share in (0.5, 0.95))
        raise ValueError(
            f"max_prompt_length={max_prompt_length} leaves out {filtered:,} of {len(lengths):,} prompts of "
            f"{name}, more than {MAX_FILTERED:.0%}. Raise it: half of them have up to {half} tokens, 95% up to "
            f"{most}; or take the long ones out of the data"
        )
    return filtered
