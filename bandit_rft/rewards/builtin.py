"""The rewards that belong to no task. A task's own live in its module; `spec.BUILTINS` has the names of all."""

from typing import Any


def exact_match(completion: str, answer: Any) -> float:
    """1.0 if the completion is the answer, outer white space apart; 0.0 otherwise, and where there is no answer."""
    right = "" if answer is None or answer != answer else str(answer).strip()
    return float(right != "" and completion.strip() == right)
