"""MATH (Hendrycks et al. 2021): competition problems, with the prompt and the reward of arXiv 2601.22532."""

from typing import Any, Literal

from pydantic import Field

from bandit_rft.options import OptionModel
from bandit_rft.rewards.builtin import last_boxed
from bandit_rft.rewards.spec import builtin
from bandit_rft.tasks.base import Example, Task, read_options
from bandit_rft.tasks.files import Row, read_hub, read_splits

HUB = "DigitalLearningGmbH/MATH-lighteval"  # the original name on the hub is gone since January 2025
SUFFIX = "Let's think step by step and output the final answer within \\boxed{}."
VERIFY = {"string": "math", "math_verify": "math_verify"}


class Options(OptionModel):
    """How answers are compared, and what may be said about the data."""

    verify: Literal["string", "math_verify"] = Field(
        "string", description="the paper's normalized string equality, or also equal by the math-verify library"
    )
    test_path: str | None = Field(None, description="a file for the split test, such as MATH-500's")


def load(data_path: str | None, seed: int, options: dict[str, Any]) -> Task:
    """Load MATH: 7,500 train and 5,000 test problems; rows have `problem` and `answer`, or a `solution` with a box."""
    chosen = read_options("math", Options, options)
    test = chosen.test_path
    rows = read_hub(HUB, test_path=test) if data_path is None else read_splits(data_path, test_path=test)
    splits = {
        split: [example(row, f"math {split} row {number}") for number, row in enumerate(split_rows)]
        for split, split_rows in rows.items()
    }
    return Task("math", splits, [builtin(VERIFY[chosen.verify])])


def example(row: Row, where: str) -> Example:
    """Make an example of a row. Errors: ValueError, naming the row and what is wrong with it."""
    problem, solution = row.get("problem"), row.get("solution")
    answer = row.get("answer")
    if answer is None and isinstance(solution, str):
        answer = last_boxed(solution)
    if not isinstance(problem, str) or not isinstance(answer, str):
        raise ValueError(
            f"{where}: expected texts in the columns problem and answer, or a solution with \\boxed{{}}; "
            f"got {sorted(row)}"
        )
    return Example(
        prompt=f"{problem} {SUFFIX}",
        columns={
            "answer": answer,
            "solution": solution,
            "subject": row.get("subject", row.get("type")),
            "level": row.get("level"),
            "data_source": HUB,
        },
    )
