"""Countdown: reach a target with all of the given numbers, each used once. Questions are made from a seed.

A completion is one expression or several steps, each of which may use the given numbers and earlier results:

    question     17?3,5,4:
    at once      3*4+5          or  3*4+5=17
    worked out   3*4=12,12+5=17

A question mostly has several answers, so the reward checks a completion instead of comparing it.
"""

import itertools
import random
import re
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

from pydantic import Field, field_validator

from bandit_rft.options import OptionModel
from bandit_rft.tasks.base import Example, Task, read_options

OPERATORS = "+-*/"
ALPHABET = "0123456789+-*/=(),?:"  # every character a question or an answer can hold
TOKEN = re.compile(r"[0-9]{1,9}|[-+*/()]")
SEARCHED = 3  # numbers left over from which the target is searched for; more would take long
PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}


class Options(OptionModel):
    """The difficulty dial. Sizes count questions.

    numbers: how many are given in a train or test question.
    max_number: the largest given number; the least is 1.
    max_target: the largest target; the least is 1.
    operators: those a question can be answered with; a completion may use all of + - * / whatever they are.
    extra_numbers: a question of the "harder" split has 1 to extra_numbers numbers more.
    validation_size: of a split "validation" to choose by. Where it is not 0, a quarter of the test side is its alone.
    """

    numbers: int = Field(3, ge=2, le=8)
    max_number: int = Field(20, ge=1, le=10**6)
    max_target: int = Field(99, ge=1, le=10**6)
    operators: str = "+-*"
    extra_numbers: int = Field(1, ge=0, le=8)
    train_size: int = Field(2000, ge=1, le=10**7)
    test_size: int = Field(500, ge=1, le=10**7)
    harder_size: int = Field(200, ge=0, le=10**7)
    validation_size: int = Field(0, ge=0, le=10**7)

    @field_validator("operators", mode="before")
    @classmethod
    def _known_operators(cls, value: Any) -> str:
        if not isinstance(value, str) or not value or set(value) - set(OPERATORS):
            raise ValueError(f"expected some of {OPERATORS!r}, got {value!r}")
        if len(set(value)) < len(value):
            raise ValueError(f"expected each at most once, got {value!r}")
        return value


@dataclass(frozen=True)
class Way:
    """One way to combine numbers: as one expression, as steps, and what it comes to."""

    expression: str
    steps: str
    value: int


def load(seed: int = 0, options: dict[str, Any] | None = None) -> Task:
    """Make the task: splits "train", "test" and, unless its size or extra_numbers is 0, "harder".

    The same seed and options give the same questions. No two ask for the same target from the same numbers in whatever
    order. Which of them may be in "train" is a hash, the same for every seed: a model warm-started on train-side
    questions has seen no test question, and what is chosen by a "validation" split has seen none of any seed's "test".

    Raises:
        OptionError: a ValueError and TypeError that names the option: unknown, or impossible.
        ValueError: under these options there are too few distinct questions.
    """
    dial = read_options("countdown", Options, options)
    harder = range(dial.numbers + 1, dial.numbers + dial.extra_numbers + 1)
    test = ("test",) if dial.validation_size else ("test", "validation")
    splits = {
        "train": _split("train", seed, dial, dial.train_size, [dial.numbers], ("train",)),
        "test": _split("test", seed, dial, dial.test_size, [dial.numbers], test),
    }
    if dial.harder_size and harder:
        splits["harder"] = _split("harder", seed, dial, dial.harder_size, harder, test)
    if dial.validation_size:
        splits["validation"] = _split("validation", seed, dial, dial.validation_size, [dial.numbers], ("validation",))
    return Task(name="countdown", splits=splits, rewards=[reaches_target], reward_weights=[1.0])


def reaches_target(
    prompts: list[str], completions: list[str], numbers: list[list[int]], target: list[int], **columns: Any
) -> list[float | None]:
    """1.0 where the completion makes the target of exactly the given numbers, as `is_solution` tells; else 0.0."""
    return [float(is_solution(*row)) for row in zip(completions, numbers, target, strict=True)]


def is_solution(completion: str, numbers: Sequence[int], target: int) -> bool:
    """Tell whether a completion reaches the target with every given number used exactly once.

    Steps are separated by commas and read `expression=result`; the last may leave out its result. Expressions hold
    whole numbers without a sign, + - * / and brackets, and are computed exactly, fractions included. A step takes the
    numbers it names from those that are left and puts back its result, which must be right, whole and not negative.
    What is left at the end must be the target alone. Spaces do not count. Nothing is ever evaluated as code.
    """
    left = Counter(numbers)
    steps = "".join(completion.split()).split(",")
    for i, step in enumerate(steps):
        expression, equals, claimed = step.partition("=")
        tokens = _tokens(expression)
        used = Counter(int(token) for token in tokens if token.isdigit())
        if not tokens or used - left:
            return False
        value = _value(tokens)
        if value is None or value < 0 or value.denominator != 1:
            return False
        if (equals and claimed != str(value)) or not (equals or i == len(steps) - 1):
            return False
        left = left - used + Counter([int(value)])
    return left == Counter([target])


def cannot_reach(completion: str, numbers: Sequence[int], target: int) -> bool:
    """Tell that no completion which begins like this is a solution; where that is not seen, False.

    Seen are: a finished step that `is_solution` refuses, or whose result has no way to the target with the numbers that
    are left (at most SEARCHED); and in an unfinished one a character, an order of them or a number that cannot be.

    >>> cannot_reach("3+5=8,", [3, 5, 4], 17), cannot_reach("3*4=12,", [3, 5, 4], 17), cannot_reach("6", [3, 5, 4], 17)
    (True, False, True)
    """
    left = Counter(numbers)
    steps = "".join(completion.split()).split(",")
    for i, step in enumerate(steps):
        expression, equals, claimed = step.partition("=")
        last = i == len(steps) - 1
        if last and not equals:
            return _cannot_go_on(expression, left)
        tokens = _tokens(expression)
        used = Counter(int(token) for token in tokens if token.isdigit())
        value = _value(tokens) if tokens and equals and not used - left else None
        if value is None or value < 0 or value.denominator != 1:
            return True
        if claimed != str(value) and not (last and str(value).startswith(claimed)):
            return True
        left = left - used + Counter([int(value)])
        numbers_left = tuple(sorted(map(Fraction, left.elements())))
        if len(numbers_left) <= SEARCHED and not _leads_to(numbers_left, target):
            return True
    return False


#: By the reward's name, what tells of the beginning of a completion that the whole will earn nothing (hopeless.py).
HOPELESS = {"reaches_target": cannot_reach}


def make_question(rng: random.Random, dial: Options, count: int) -> tuple[list[int], Way]:
    """Draw `count` numbers and one way to combine them to a target within the dial's limits."""
    while True:
        numbers = [rng.randint(1, dial.max_number) for _ in range(count)]
        way = combine(rng, numbers, dial.operators)
        if way is not None and way.value <= dial.max_target:
            return numbers, way


def combine(rng: random.Random, numbers: Sequence[int], operators: str) -> Way | None:
    """Combine the numbers at random; None where a result on the way is not a whole number of at least 1."""
    terms = [(number, str(number), 3) for number in numbers]  # value, text, precedence
    steps = []
    while len(terms) > 1:
        a, a_text, a_precedence = terms.pop(rng.randrange(len(terms)))
        b, b_text, b_precedence = terms.pop(rng.randrange(len(terms)))
        operator = rng.choice(operators)
        result = _apply(operator, Fraction(a), Fraction(b))
        if result is None or result < 1 or result.denominator != 1:
            return None
        value = int(result)
        precedence = PRECEDENCE[operator]
        if a_precedence < precedence:
            a_text = f"({a_text})"
        if b_precedence < precedence or (b_precedence == precedence and operator in "-/"):
            b_text = f"({b_text})"
        terms.append((value, f"{a_text}{operator}{b_text}", precedence))
        steps.append(f"{a}{operator}{b}={value}")
    value, expression, _ = terms[0]
    return Way(expression, ",".join(steps), value)


def question_text(numbers: Sequence[int], target: int) -> str:
    """Return the prompt, such as `17?3,5,4:`."""
    return f"{target}?{','.join(map(str, numbers))}:"


def is_held_out(numbers: Sequence[int], target: int) -> bool:
    """Tell whether a question belongs to the test side, whatever the order of its numbers: one in eight does."""
    return zlib.crc32(question_text(sorted(numbers), target).encode()) % 8 == 0


def side(numbers: Sequence[int], target: int) -> str:
    """The split that a question may be in where there are three: "train", "test" or, of the test side, "validation"."""
    if not is_held_out(numbers, target):
        return "train"
    return "validation" if zlib.crc32(question_text(sorted(numbers), target).encode()) // 8 % 4 == 0 else "test"


def _tokens(expression: str) -> list[str]:
    """Split an expression into numbers, operators and brackets; nothing where it holds anything else."""
    tokens = TOKEN.findall(expression)
    return tokens if "".join(tokens) == expression else []


def _value(tokens: list[str]) -> Fraction | None:
    """Compute an expression exactly; None where it is malformed or divides by zero.

    Two stacks (Dijkstra's shunting yard) instead of recursion: a completion may open a thousand brackets.
    """
    values: list[Fraction] = []
    pending: list[str] = []
    after_value = False

    def reduce() -> bool:
        b, a = values.pop(), values.pop()
        value = _apply(pending.pop(), a, b)
        values.append(value if value is not None else Fraction())
        return value is not None

    for token in tokens:
        if (token.isdigit() or token == "(") == after_value:
            return None
        if token == "(":
            pending.append(token)
        elif token.isdigit():
            values.append(Fraction(int(token)))
            after_value = True
        elif token == ")":
            while pending and pending[-1] != "(":
                if not reduce():
                    return None
            if not pending:
                return None
            pending.pop()
        else:
            while pending and pending[-1] != "(" and PRECEDENCE[pending[-1]] >= PRECEDENCE[token]:
                if not reduce():
                    return None
            pending.append(token)
            after_value = False
    while after_value and pending:
        if pending[-1] == "(" or not reduce():
            return None
    return values[0] if after_value else None


def _cannot_go_on(expression: str, left: Counter[int]) -> bool:
    """Tell that an expression which begins like this is malformed, or takes a number that is not left."""
    tokens = _tokens(expression)
    if not tokens:
        return bool(expression)
    after_value, open_brackets = False, 0
    for token in tokens:
        if (token.isdigit() or token == "(") == after_value:
            return True
        open_brackets += (token == "(") - (token == ")")
        if open_brackets < 0:
            return True
        after_value = token.isdigit() or token == ")"
    growing = tokens.pop() if tokens[-1].isdigit() else None  # more digits may follow, after zeros too
    rest = left.copy()
    rest.subtract(int(token) for token in tokens if token.isdigit())
    if min(rest.values()) < 0:
        return True
    begins = (growing or "").lstrip("0")
    return (not after_value and not +rest) or (
        growing is not None and not any(str(number).startswith(begins) for number in (+rest).elements())
    )


@lru_cache(maxsize=100_000)
def _leads_to(numbers: tuple[Fraction, ...], target: int) -> bool:
    """Tell whether all of the numbers, in ascending order, can be combined to the target."""
    if len(numbers) == 1:
        return numbers[0] == target
    for i, j in itertools.permutations(range(len(numbers)), 2):
        others = [number for k, number in enumerate(numbers) if k not in (i, j)]
        for operator in OPERATORS:
            result = _apply(operator, numbers[i], numbers[j])
            if result is not None and _leads_to(tuple(sorted([*others, result])), target):
                return True
    return False


def _apply(operator: str, a: Fraction, b: Fraction) -> Fraction | None:
    """Compute a operator b; None for a division by zero."""
    if operator == "+":
        return a + b
    if operator == "-":
        return a - b
    if operator == "*":
        return a * b
    return a / b if b else None


def _split(
    name: str, seed: int, dial: Options, size: int, counts: Sequence[int], sides: tuple[str, ...]
) -> list[Example]:
    """Draw `size` distinct questions of these sides."""
    rng = random.Random(f"countdown {name} {seed}")
    examples: dict[tuple[int, ...], Example] = {}
    misses = 0  # draws since the last new question
    while len(examples) < size:
        if misses == 5000:
            raise ValueError(
                f"countdown option {name}_size: only {len(examples)} distinct questions found where {size} were "
                "expected; ask for fewer, or raise numbers, max_number or max_target"
            )
        numbers, way = make_question(rng, dial, rng.choice(counts))
        key = (way.value, *sorted(numbers))
        misses += 1
        if side(numbers, way.value) in sides and key not in examples:
            misses = 0
            columns = {"answer": way.expression, "numbers": numbers, "target": way.value}
            examples[key] = Example(prompt=question_text(numbers, way.value), columns=columns)
    return list(examples.values())
