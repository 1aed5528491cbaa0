"""SciTLDR (Cachola et al. 2020): a one-sentence summary of a paper from its abstract, scored by ROUGE-L in [0, 1].

A paper of the validation and test splits has several references; the best match counts.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pydantic import Field

from bandit_rft.options import OptionModel
from bandit_rft.rewards.spec import builtin
from bandit_rft.tasks.base import Example, Task, read_options
from bandit_rft.tasks.files import Row, read_hub, read_splits

# The dataset itself is a script, which the datasets library no longer runs; the hub keeps its tables on a branch.
HUB = ("allenai/scitldr", "Abstract", "refs/convert/parquet")
PREFIX = "Summarize the following abstract in one sentence."
SUFFIX = "TL;DR:"


class Options(OptionModel):
    """The reward's length penalty, and what may be said about the data.

    With length_penalty a, a summary of c words scores exp(-a * max(0, c / r - 1)) times its ROUGE-L against a reference
    of r words.
    """

    length_penalty: float = Field(0.0, ge=0, description="0: plain ROUGE-L")
    test_path: str | None = Field(None, description="a file for the split test")


def load(data_path: str | None, seed: int, options: dict[str, Any]) -> Task:
    """Load SciTLDR: 1,992 train, 619 validation, 618 test; rows have `source`, sentences, and `target`, references."""
    chosen = read_options("summarize", Options, options)
    test = chosen.test_path
    rows = read_hub(*HUB, test_path=test) if data_path is None else read_splits(data_path, test_path=test)
    splits = {
        split: [example(row, f"summarize {split} row {number}") for number, row in enumerate(split_rows)]
        for split, split_rows in rows.items()
    }
    reward = builtin("rouge_l")
    if chosen.length_penalty:
        reward = replace(builtin("rouge_l_length_penalized"), options={"length_penalty": chosen.length_penalty})
    return Task("summarize", splits, [reward])


def example(row: Row, where: str) -> Example:
    """Make an example; `source` and `target` are texts or lists of texts.

    Raises:
        ValueError: naming the row.
    """
    source, references = _texts(row.get("source")), _texts(row.get("target"))
    if not source or not references:
        raise ValueError(f"{where}: expected texts in the columns source and target, got the columns {sorted(row)}")
    abstract = " ".join(sentence.strip() for sentence in source)
    return Example(prompt=f"{PREFIX}\n\n{abstract}\n\n{SUFFIX}", columns={"answer": references})


def _texts(value: Any) -> list[str]:
    """Return a text or a list of texts as a list; an empty one for anything else."""
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(text, str) for text in values):
        return []
    return [text for text in values if text.strip()]


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
            score *= math.exp(-length_penalty * excess)
        best = max(best, score)
    return best


@functools.cache
def _rouge_scorer() -> Any:
    """Make the scorer once; its stemmer is slow to build."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError("the rouge-score library is missing: pip install 'bandit_rft[train]'") from error
    return RougeScorer(["rougeL"], use_stemmer=True)


PREPARE = {"rouge_l": _rouge_scorer}
