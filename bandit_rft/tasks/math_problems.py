r"""MATH (Hendrycks et al. 2021): competition problems, with the prompt and the reward of arXiv 2601.22532.

Options:
    verify: "string" (the paper's normalized string equality) or "math_verify" (also equal by the math-verify library).
    test_path: a file for the split "test", such as MATH-500's.
"""

from typing import Any

from bandit_rft.rewards.builtin import last_boxed
from bandit_rft.rewards.spec import builtin, unknown_name
from bandit_rft.tasks.base import Example, Task, read_options
from bandit_rft.tasks.files import Row, read_hub, read_splits

HUB = "DigitalLearningGmbH/MATH-lighteval"  # the original name on the hub is gone since January 2025
SUFFIX = "Let's think step by step and output the final answer within \\boxed{}."
VERIFY = {"string": "math", "math_verify": "math_verify"}


def load(data_path: str | None, seed: int, options: dict[str, Any]) -> Task:
    """Load MATH: 7,500 train and 5,000 test problems; rows have `problem` and `answer`, or a `solution` with a box."""
    chosen = read_options("math", options, verify="string", test_path=None)
    verify = chosen.pop("verify")
    if verify not in VERIFY:
        raise ValueError(unknown_name("value of option verify of task math:", verify, list(VERIFY)))
    rows = read_hub(HUB, **chosen) if data_path is None else read_splits(data_path, **chosen)
    splits = {
        split: [example(row, f"math {split} row {number}") for number, row in enumerate(split_rows)]
        for split, split_rows in rows.items()
    }
    return Task("math", splits, [builtin(VERIFY[verify])])


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
