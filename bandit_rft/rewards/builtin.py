r"""The rewards that come with the package, each for one completion, so that a batch can be divided among workers.

gsm8k and math are the paper's, to the letter (arXiv 2601.22532 and its released configuration).
This module imports the standard library alone; math-verify and rouge-score are imported by the rewards that use them.
"""

import functools
import logging
import math as _math
import re
from collections.abc import Sequence
from typing import Any

# The paper reads an answer off the last 300 characters alone; a longer tail cannot change its length.
GSM8K_TAIL = 300
_GSM8K_ANSWER = re.compile(r"#### (\-?[0-9\.\,]+)")


def exact_match(completion: str, answer: Any) -> float:
    """1.0 if the completion is the answer, outer white space apart; 0.0 otherwise."""
    return float(completion.strip() == str(answer).strip())


def gsm8k(completion: str, answer: str) -> float:
    """1.0 if the last `#### number` within the last 300 characters, commas removed, is the answer; 0.0 otherwise.

    Strings are compared, as in the paper: 18.0 is not 18. There is no bonus for the format.
    """
    matches = _GSM8K_ANSWER.findall(completion[-GSM8K_TAIL:])
    return float(bool(matches) and matches[-1].replace(",", "") == answer)


def math(completion: str, answer: str) -> float:
    r"""1.0 if what the last `\boxed{...}` holds equals the answer after normalize_math(); 0.0 otherwise."""
    boxed = last_boxed(completion)
    return float(boxed is not None and normalize_math(boxed) == normalize_math(answer))


def math_verify(completion: str, answer: str) -> float:
    r"""1.0 if what the last `\boxed{...}` holds equals the answer, as strings or by the math-verify library; else 0.0.

    The library's own limits use SIGALRM, which does nothing outside a main thread: they are off, the worker's holds.
    """
    if math(completion, answer):
        return 1.0
    boxed = last_boxed(completion)
    if boxed is None:
        return 0.0
    parse, verify = _math_verify_functions()
    gold = parse(f"\\boxed{{{answer}}}", parsing_timeout=None)
    target = parse(f"\\boxed{{{boxed}}}", parsing_timeout=None)
    return float(bool(verify(gold, target, timeout_seconds=None)))


def rouge_l(completion: str, answer: str | Sequence[str], length_penalty: float = 0.0) -> float:
    """Return the F-measure of ROUGE-L (longest common subsequence of stemmed words) against the best of the references.

    With a length penalty a > 0 each reference's score is multiplied by exp(-a * max(0, c / r - 1)), c and r the number
    of words of completion and reference, before the best one is taken: no cost up to the reference's length, and at
    a = 1 a factor 0.37 at twice that. Scores lie in [0, 1].

    Source: Lin 2004, as computed by the rouge-score library, which reads the letters a-z and digits alone.
    """
    references = [answer] if isinstance(answer, str) else list(answer)
    if not references:
        raise ValueError("answer: expected at least one reference, got an empty list")
    scorer = _rouge_scorer()
    words = len(scorer._tokenizer.tokenize(completion)) if length_penalty else 0
    best = 0.0
    for reference in references:
        score = float(scorer.score(reference, completion)["rougeL"].fmeasure)
        if length_penalty and score:
            excess = max(0.0, words / len(scorer._tokenizer.tokenize(reference)) - 1)
            score *= _math.exp(-length_penalty * excess)
        best = max(best, score)
    return best


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
    (r"\\text\{ [^{}]*\}(\^(\d|\{\d\}))?$", ""),  # a unit at the end, which starts with a space: \text{ cm}^2
    (r"\\%", ""),
    (r"(^|[ {])\.(?=\d)", r"\g<1>0."),  # .5 is 0.5
    (r"^[^=]{1,2}=([^=]*)$", r"\1"),  # x = 5 is 5
    (r"\\sqrt\s*(\w)", r"\\sqrt{\1}"),
    (r" ", ""),
    (r"\\frac([^{\\])([^{\\])", r"\\frac{\1}{\2}"),  # \frac12
    (r"\\frac([^{\\])\{", r"\\frac{\1}{"),  # \frac1{72}
    (r"\\frac(\{[^{}]*\})([^{\\])", r"\\frac\1{\2}"),  # \frac{1}2
    (r"^0\.5$", r"\\frac{1}{2}"),
    (r"^(-?\d+)/(-?\d+)$", r"\\frac{\1}{\2}"),
)
_COMPILED = [(re.compile(pattern), replacement) for pattern, replacement in _SPELLINGS]


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


@functools.cache
def _rouge_scorer() -> Any:
    """Make the scorer once; its stemmer is slow to build."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError("the rouge-score library is missing: pip install 'bandit_rft[train]'") from error
    return RougeScorer(["rougeL"], use_stemmer=True)


PREPARE = {"math_verify": _math_verify_functions, "rouge_l": _rouge_scorer}
