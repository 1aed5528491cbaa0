"""The built-in task: arithmetic questions answered at once or worked out step by step, made from a seed.

A question ends in `=` and a completion continues it, so a worked answer is a chain of equalities, one operation a link:

    question     47+85-36=           47*6-12=
    at once      96                  270
    worked out   (132-36)=96         (240+42-12)=(282-12)=270

The reward reads only what follows the last `=`: 1 when it is the right number, 0 otherwise. Whether the model works is
its own choice, which is what reinforcement has to teach it.
"""

import random
import re
import zlib
from typing import Any

from pydantic import Field, ValidationInfo, field_validator

from bandit_rft.options import OptionModel
from bandit_rft.tasks.base import Example, Task, read_options

KINDS = ("sum", "mixed", "product")
ALPHABET = "0123456789+-*=()"  # every character a question or a worked answer can hold


class Options(OptionModel):
    """The difficulty dial. Sizes count questions; a train or test question has min_terms to max_terms numbers.

    kinds: "sum" adds, "mixed" adds and subtracts, "product" starts with a product by one digit.
    digits: the most digits of a number (a multiplier always has one).
    extra_terms: a question of the "longer" split has 1 to extra_terms numbers more than max_terms.
    validation_size: of a split "validation" to choose by. Where it is not 0, a quarter of the test side is its alone.
    """

    kinds: tuple[str, ...] = KINDS
    min_terms: int = Field(3, ge=2, le=32)
    max_terms: int = Field(3, ge=2, le=32)
    digits: int = Field(2, ge=1, le=9)
    extra_terms: int = Field(2, ge=0, le=32)
    train_size: int = Field(2000, ge=1, le=10**7)
    test_size: int = Field(500, ge=1, le=10**7)
    longer_size: int = Field(200, ge=0, le=10**7)
    validation_size: int = Field(0, ge=0, le=10**7)

    @field_validator("kinds", mode="before")
    @classmethod
    def _known_kinds(cls, value: Any) -> tuple[str, ...]:
        kinds = [value] if isinstance(value, str) else value
        if not isinstance(kinds, list | tuple) or not kinds:
            raise ValueError(f"expected a list out of {list(KINDS)}, got {value!r}")
        if unknown := [kind for kind in kinds if kind not in KINDS]:
            raise ValueError(f"unknown {unknown}, expected some of {list(KINDS)}")
        if len(set(kinds)) < len(kinds):
            raise ValueError(f"expected each at most once, got {list(kinds)}")
        return tuple(kinds)

    @field_validator("max_terms")
    @classmethod
    def _not_below(cls, value: int, info: ValidationInfo) -> int:
        if value < info.data.get("min_terms", 0):
            raise ValueError(f"expected {info.data['min_terms']} to 32, got {value}")
        return value


def load(seed: int = 0, options: dict[str, Any] | None = None) -> Task:
    """Make the task: splits "train", "test" and, unless its size or extra_terms is 0, "longer"; all questions distinct.

    The same seed and options give the same questions. Whether a question may be in "train" or only in "test" is a hash
    of its text, the same for every seed: a model warm-started on train-side questions has seen no test question, and
    what is chosen by a "validation" split has seen none of any seed's "test".

    Raises:
        OptionError: a ValueError and TypeError that names the option: unknown, or impossible.
        ValueError: under these options there are too few distinct questions.
    """
    dial = read_options("arithmetic", Options, options)
    trained = range(dial.min_terms, dial.max_terms + 1)
    longer = range(dial.max_terms + 1, dial.max_terms + dial.extra_terms + 1)
    test = ("test",) if dial.validation_size else ("test", "validation")
    splits = {
        "train": _split("train", seed, dial, dial.train_size, trained, ("train",)),
        "test": _split("test", seed, dial, dial.test_size, trained, test),
    }
    if dial.longer_size and longer:
        splits["longer"] = _split("longer", seed, dial, dial.longer_size, longer, test)
    if dial.validation_size:
        splits["validation"] = _split("validation", seed, dial, dial.validation_size, trained, ("validation",))
    return Task(name="arithmetic", splits=splits, rewards=[exact_answer], reward_weights=[1.0])


def exact_answer(prompts: list[str], completions: list[str], answer: list[str], **columns: Any) -> list[float | None]:
    """1.0 where the completion, after its last `=` if it has one, is exactly the right number; else 0.0."""
    return [float(final_answer(text) == right) for text, right in zip(completions, answer, strict=True)]


def final_answer(completion: str) -> str:
    """Return what follows the last `=` of a completion, or all of it where there is none; outer spaces removed.

    >>> final_answer("(132-36)=96"), final_answer("96")
    ('96', '96')
    """
    return completion.rpartition("=")[2].strip()


def make_question(rng: random.Random, kind: str, terms: int, digits: int) -> str:
    """Draw one question with `terms` numbers of at most `digits` digits, ending in `=`."""
    numbers = [str(rng.randint(1, 10**digits - 1)) for _ in range(terms)]
    signs = [rng.choice("+-") if kind != "sum" else "+" for _ in range(terms - 1)]
    if kind == "product":
        numbers[1], signs[0] = str(rng.randint(2, 9)), "*"
    elif kind == "mixed" and "-" not in signs:
        signs[rng.randrange(terms - 1)] = "-"
    return numbers[0] + "".join(sign + number for sign, number in zip(signs, numbers[1:], strict=True)) + "="


def work_out(question: str) -> str:
    """Return the worked answer: a product is first split digit by digit, then the two leftmost numbers are joined.

    Each link of the chain is equal to the question; the last one is the answer. Unfinished links stand in brackets, so
    that the first character tells whether work follows. With two numbers to add there is one link, the answer.

    >>> work_out("47+85-36=")
    '(132-36)=96'
    >>> work_out("47*6-12=")
    '(240+42-12)=(282-12)=270'
    """
    if not re.fullmatch(r"\d+(\*\d)?([+-]\d+)+=|\d+\*\d=", question):
        raise ValueError(f"question: expected something like 47+85-36= or 47*6-12=, got {question!r}")
    expression = question.removesuffix("=")
    chain = []
    if "*" in expression:
        number, multiplier, rest = re.fullmatch(r"(\d+)\*(\d)(.*)", expression).groups()  # type: ignore[union-attr]
        places = [int(digit) * 10**place for place, digit in enumerate(reversed(number)) if digit != "0"]
        expression = "+".join(str(value * int(multiplier)) for value in reversed(places)) + rest
        chain.append(expression)
    summands = [int(text) for text in re.findall(r"[+-]?\d+", expression)]
    while len(summands) > 1:
        summands = [summands[0] + summands[1], *summands[2:]]
        chain.append(str(summands[0]) + "".join(f"{value:+d}" for value in summands[1:]))
    return "=".join([*(f"({link})" for link in chain[:-1]), chain[-1]])


def is_held_out(question: str) -> bool:
    """Tell whether a question belongs to the test side: a hash of its text says so for one in eight."""
    return zlib.crc32(question.encode()) % 8 == 0


def side(question: str) -> str:
    """The split that a question may be in where there are three: "train", "test" or, of the test side, "validation"."""
    if not is_held_out(question):
        return "train"
    return "validation" if zlib.crc32(question.encode()) // 8 % 4 == 0 else "test"


def _split(name: str, seed: int, dial: Options, size: int, terms: range, sides: tuple[str, ...]) -> list[Example]:
    """Draw `size` distinct questions of these sides, kinds and numbers of terms in equal parts as far as they last."""
    rng = random.Random(f"arithmetic {name} {seed}")
    examples: dict[str, Example] = {}
    misses = 0  # draws since the last new question
    while len(examples) < size:
        if misses == 5000:
            raise ValueError(
                f"arithmetic option {name}_size: only {len(examples)} distinct questions found where {size} were "
                "expected; ask for fewer, or raise digits or max_terms"
            )
        kind, count = rng.choice(dial.kinds), rng.choice(terms)
        question = make_question(rng, kind, count, dial.digits)
        misses += 1
        if side(question) in sides and question not in examples:
            misses = 0
            answer = final_answer(work_out(question))
            examples[question] = Example(prompt=question, columns={"answer": answer, "kind": kind, "terms": count})
    return list(examples.values())
