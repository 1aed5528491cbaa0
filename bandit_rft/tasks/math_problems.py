"""MATH (Hendrycks et al. 2021): competition problems, with the prompt and the reward of arXiv 2601.22532."""

import functools
import logging
import re
from typing import Any, Literal

from pydantic import Field

from bandit_rft.options import OptionModel
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
    """Make an example of a row.

    Raises:
        ValueError: naming the row and what is wrong with it.
    """
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


def math(completion: str, answer: str) -> float:
    r"""1.0 if what the last `\boxed{...}` holds equals the answer after normalize_math(); 0.0 otherwise.

    An answer that says nothing is never earned: MATH has two (train rows 5341 and 5343), which `\boxed{}` would match.
    """
    boxed, right = last_boxed(completion), normalize_math(answer)
    return float(boxed is not None and right != "" and normalize_math(boxed) == right)


def math_verify(completion: str, answer: str) -> float:
    r"""1.0 if what the last `\boxed{...}` holds equals the answer, as strings or by the math-verify library; else 0.0.

    The library's own limits use SIGALRM, which does nothing outside a main thread: they are off, the worker's holds.
    """
    if math(completion, answer):
        return 1.0
    boxed = last_boxed(completion)
    if boxed is None or not normalize_math(answer):
        return 0.0
    if "=" in answer:
        return float(_verify(answer, boxed))
    # The library compares what stands on the right alone: 3x=15 and 2=15 would earn the answer 15.
    first, *sides = boxed.split("=")
    sides = sides if sides and _is_name(first) else [first, *sides]
    return float(all(_verify(answer, side) for side in sides))


def _verify(answer: str, boxed: str) -> bool:
    """Tell whether the library finds two answers equal."""
    parse, verify = _math_verify_functions()
    parsed = [parse(f"\\boxed{{{_readable(text)}}}", parsing_timeout=None) for text in (answer, boxed)]
    return bool(verify(*parsed, timeout_seconds=None))


def _is_name(text: str) -> bool:
    r"""Tell whether the left side of an equation names what it is equal to: x, f(2), a_1, \angle ABC; not 3x or x+y."""
    bare = re.sub(r"\([^()]*\)|_\{[^{}]*\}|_\w|\\text\{[^{}]*\}", "", text)
    return re.fullmatch(r"(\\(?!sqrt|frac|cdot|times|div|pm)|[A-Za-z'|\s])+", bare) is not None


# Spellings that the library misreads, as it reads them: a macro as an argument without braces, thousands parted by a
# thin space, degrees, the other signs of the empty set.
_MACRO = r"(\\(?!d?frac|tfrac|sqrt|text|math|operatorname|left|right)[A-Za-z]+)"
_READABLE = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\sqrt\s*" + _MACRO, r"\\sqrt{\1}"),
        (r"\\([dt]?)frac\s*" + _MACRO, r"\\\1frac{\2}"),
        (r"(\\[dt]?frac\{[^{}]*\})\s*" + _MACRO, r"\1{\2}"),
        (r"(?<=\d)(\\[,;:! ]|~|\{[, ]?\}|\{\\[,;:! ]\})(?=\d{3}(?!\d))", ""),
        (r"\^\s*(\{\s*\\circ\s*\}|\\circ)", ""),
        (r"\\varnothing(?![A-Za-z])|\\(text|mathrm|rm)\{\\[Oo]\}|[\u00d8\u2205]", r"\\emptyset"),
    )
]


def _readable(answer: str) -> str:
    """Rewrite an answer for the library."""
    for pattern, replacement in _READABLE:
        answer = pattern.sub(replacement, answer)
    return answer


def last_boxed(text: str) -> str | None:
    r"""Return what the last `\boxed{...}` of a text holds, or None where there is none or its braces never close.

    `\boxed 7`, which some references write, counts too: it holds what follows, up to a dollar sign or the line's end.
    """
    _, found, rest = text.rpartition("\\boxed")
    if not found:
        return None
    if rest.startswith(" ") and not rest.lstrip(" ").startswith("{"):
        return re.split(r"[$\n]", rest, maxsplit=1)[0].strip()
    rest = rest.lstrip(" ")
    if not rest.startswith("{"):
        return None
    depth = 0
    for brace in re.finditer(r"\\.|[{}]", rest, re.DOTALL):  # an escaped brace, like any escaped character, is no brace
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0 and brace.group() == "}":
            return rest[1 : brace.start()]
    return None


# Spellings that make no difference to what an answer says, in the order in which they are removed.
_SPELLINGS: tuple[tuple[str, str], ...] = (
    (r"\n", ""),
    (r"\\!", ""),  # negative space
    (r"\\\\", r"\\"),  # a line break, as a doubled backslash
    (r"\\[td]frac", r"\\frac"),
    (r"\\(left|right)(?![a-zA-Z])", ""),
    (r"\^\s*(\{\s*\\circ\s*\}|\\circ)", ""),  # degrees
    (r"\\\$", ""),
    (
        r"(?<=\S)\s*\\text\{ [^{}]*\}(\^(\d|\{\d\}))?$",
        "",
    ),  # a unit behind a value; it starts with a space: \text{ cm}^2
    (r"\\%", ""),
    (r"(^|[ {])\.(?=\d)", r"\g<1>0."),  # .5 is 0.5
    (r"^[A-Za-z]{1,2}\s*=([^=]*)$", r"\1"),  # x = 5 is 5, but -x = 5 and 2x = 5 are not
    (r"\\sqrt\s*(\w)", r"\\sqrt{\1}"),
    (r" ", ""),
    (r"\\frac([^{\\])([^{\\])", r"\\frac{\1}{\2}"),  # \frac12
    (r"\\frac([^{\\])\{", r"\\frac{\1}{"),  # \frac1{72}
    (r"\\frac(\{[^{}]*\})([^{\\])", r"\\frac\1{\2}"),  # \frac{1}2
    (r"^0\.5$", r"\\frac{1}{2}"),
    (r"^(-?\d+)/(-?\d+)$", r"\\frac{\1}{\2}"),
)
_COMPILED = [(re.compile(pattern), replacement) for pattern, replacement in _SPELLINGS]


@functools.lru_cache(maxsize=4096)  # an answer is asked for by each of its completions
def normalize_math(answer: str) -> str:
    r"""Return an answer with the spellings removed that say nothing: two equal answers are then equal strings.

    Removed or unified: white space, \left and \right, degrees, \$ and \%, a unit in \text{ ...} at the end, \dfrac and
    \tfrac, missing braces of \frac and \sqrt, a missing zero before the point, a leading `x =`, 0.5 and a/b.
    Commas stay: they part the elements of an answer.
    """
    answer = answer.strip()
    for pattern, replacement in _COMPILED:
        answer = pattern.sub(replacement, answer)
    return answer


@functools.cache
def _math_verify_functions() -> tuple[Any, Any]:
    """Import math-verify, and quiet its warning, once for every answer, that its limits are off."""
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise ImportError("the math-verify library is missing: pip install 'bandit_rft[train]'") from error
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    return parse, verify


PREPARE = {"math_verify": _math_verify_functions}
