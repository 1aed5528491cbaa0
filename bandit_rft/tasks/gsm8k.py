"""GSM8K (Cobbe et al. 2021): grade-school word problems, with the prompt and the reward of arXiv 2601.22532."""

import re
from typing import Any

from pydantic import Field

from bandit_rft.options import OptionModel
from bandit_rft.rewards.spec import builtin
from bandit_rft.tasks.base import Example, Task, read_options
from bandit_rft.tasks.files import Row, read_hub, read_splits

HUB = ("openai/gsm8k", "main")
SUFFIX = 'Let\'s think step by step and output the final answer after "####".'
# The paper reads an answer off the last 300 characters alone; a longer tail cannot change its length.
GSM8K_TAIL = 300
_GSM8K_ANSWER = re.compile(r"#### (\-?[0-9\.\,]+)")


class Options(OptionModel):
    """What may be said about the data."""

    test_path: str | None = Field(None, description="a file for the split test")


def load(data_path: str | None, seed: int, options: dict[str, Any]) -> Task:
    """Load GSM8K: 7,473 train, 1,319 test; rows have `question` and `answer`, a solution that ends in "#### number"."""
    chosen = read_options("gsm8k", Options, options)
    test = chosen.test_path
    rows = read_hub(*HUB, test_path=test) if data_path is None else read_splits(data_path, test_path=test)
    splits = {
        split: [example(row, f"gsm8k {split} row {number}") for number, row in enumerate(split_rows)]
        for split, split_rows in rows.items()
    }
    return Task("gsm8k", splits, [builtin("gsm8k")])


def example(row: Row, where: str) -> Example:
    """Make an example of a row.

    Raises:
        ValueError: naming the row and what is wrong with it.
    """
    question, solution = row.get("question"), row.get("answer")
    if not isinstance(question, str) or not isinstance(solution, str):
        raise ValueError(f"{where}: expected texts in the columns question and answer, got the columns {sorted(row)}")
    return Example(
        prompt=f"{question} {SUFFIX}",
        columns={"answer": gold_answer(solution, where), "solution": solution, "data_source": HUB[0]},
    )


def gold_answer(solution: str, where: str = "answer") -> str:
    """Return what follows the last `####` of a solution, commas removed.

    Raises:
        ValueError: there is none.
    """
    _, mark, answer = solution.rpartition("####")
    if not mark or not answer.strip():
        raise ValueError(f'{where}: expected a solution that ends in "#### number", got {solution[-80:]!r}')
    return answer.strip().replace(",", "")


def gsm8k(completion: str, answer: str) -> float:
    """1.0 if the last `#### number` within the last 300 characters, commas removed, is the answer; 0.0 otherwise.

    Strings are compared, as in the paper: 18.0 is not 18. There is no bonus for the format. An empty answer is never
    earned.
    """
    matches = _GSM8K_ANSWER.findall(completion[-GSM8K_TAIL:])
    return float(bool(matches) and answer != "" and matches[-1].replace(",", "") == answer)
