"""The same question before and after training: which of its answers is shown, on the page and in the terminal alike."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bandit_rft.intervals import earned

#: What became of a question: of rewards 0 and 1, and of others, which do not say what is right.
OF_BINARY = ("gained", "lost", "still right", "still wrong")
OF_OTHERS = ("gained", "lost", "same")
OUTCOMES = (*OF_BINARY, "same")
PAIR_COLUMNS = ["query", "sample", "prompt", "completion", "answer", "reward"]

Table = Mapping[str, Sequence[Any]]


@dataclass
class Pair:
    """One question answered at two evaluations. Rewards are None where a completion could not be scored."""

    split: str
    query: int
    prompt: str
    answer: str | None
    before: str
    after: str
    before_reward: float | None
    after_reward: float | None
    outcome: str
    binary: bool = True  # whether every reward of both evaluations was 0 or 1

    @property
    def gain(self) -> float:
        """Change of the reward; what could not be scored earned 0, or as little as the other."""
        before, after = earned([self.before_reward, self.after_reward])
        return after - before


def first_answers(table: Table) -> dict[int, dict[str, Any]]:
    """One row a question: its first sample, the one that Pass@1 counts.

    The greedy answer is stored as sample -1. It stands for a question only where nothing else was drawn.
    """
    if not {"query", "prompt", "completion"} <= table.keys():
        return {}
    chosen: dict[int, tuple[float, dict[str, Any]]] = {}
    for i, query in enumerate(table["query"]):
        sample = table["sample"][i] if "sample" in table else 0
        rank = sample if sample >= 0 else math.inf
        if query not in chosen or rank < chosen[query][0]:
            row = {key: values[i] for key, values in table.items()}
            chosen[query] = rank, {"answer": None, "reward": None} | row
    return {query: row for query, (_, row) in chosen.items()}


def match(split: str, before: Table, after: Table) -> list[Pair]:
    """The questions of both tables, by number. One whose prompt differs is another question and is left out.

    "Right" and "wrong" are said of rewards 0 and 1 alone; where any reward is another, only how it changed.
    """
    old_rows, new_rows = first_answers(before), first_answers(after)
    binary = is_binary(before.get("reward", ())) and is_binary(after.get("reward", ()))
    pairs = []
    for query in sorted(old_rows.keys() & new_rows.keys()):
        old, new = old_rows[query], new_rows[query]
        if old["prompt"] != new["prompt"]:  # the data changed under a resumed run
            continue
        a, b = (None if row["reward"] is None else float(row["reward"]) for row in (old, new))
        low, high = (-math.inf if value is None else value for value in (a, b))
        unchanged = ("still right" if high > 0 else "still wrong") if binary else "same"
        outcome = "gained" if high > low else "lost" if high < low else unchanged
        answer = None if old["answer"] is None else str(old["answer"])
        texts = old["completion"], new["completion"]
        pairs.append(Pair(split, query, old["prompt"], answer, *texts, a, b, outcome, binary))
    return pairs


def is_binary(rewards: Iterable[float | None]) -> bool:
    """Whether every reward is 0 or 1, so that their mean is a Pass@1; what could not be scored says nothing."""
    return all(reward is None or not abs(reward) < 1e100 or reward in (0.0, 1.0) for reward in rewards)


def measured_binary(folder: Path, split: str, rounds: Iterable[int] | None = None) -> bool:
    """Whether the stored evaluations of a split, of some rounds or of all, have rewards 0 and 1 alone.

    True where none is stored: the caller's values are all there is to judge by.
    """
    files, wanted = evaluation_files(folder).get(split, []), None if rounds is None else set(rounds)
    return all(
        is_binary(_read(path, ["reward"]).get("reward", ()))
        for round_, path in files
        if wanted is None or round_ in wanted
    )


def showcase(pairs: Sequence[Pair]) -> Pair | None:
    """The question to show first: the one that gained most, the lowest number among equals."""
    return max(pairs, key=lambda pair: (pair.gain, -pair.query), default=None)


def evaluation_files(folder: Path) -> dict[str, list[tuple[int, Path]]]:
    """(round, file) of every split's stored evaluations, by round; test first, then the splits by name."""
    found: dict[str, list[tuple[int, Path]]] = {}
    for path in folder.joinpath("evaluations").iterdir() if folder.joinpath("evaluations").is_dir() else ():
        if match := re.fullmatch(r"round-(\d+)-(.+)\.parquet", path.name):
            found.setdefault(match[2], []).append((int(match[1]), path))
    return {split: sorted(found[split]) for split in sorted(found, key=lambda s: (s != "test", s))}


def first_and_last(
    split: str, files: Sequence[tuple[int, Path]], read: Callable[[Path, list[str]], Table]
) -> tuple[tuple[int, int], list[Pair]] | None:
    """The rounds of a split's first and last evaluation and its questions at both; None with fewer than two."""
    if len(files) < 2:
        return None
    (first, before), (last, after) = files[0], files[-1]
    return (first, last), match(split, read(before, PAIR_COLUMNS), read(after, PAIR_COLUMNS))


def showcase_of_run(folder: Path) -> tuple[tuple[int, int], Pair] | None:
    """What the terminal shows at the end of a run: the rounds, and the question that the page shows first."""
    for split, files in evaluation_files(folder).items():
        found = first_and_last(split, files, _read)
        if found is not None and (pair := showcase(found[1])) is not None:
            return found[0], pair
    return None


def _read(path: Path, columns: list[str]) -> Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            table: Table = file.read(columns=[c for c in columns if c in file.schema_arrow.names]).to_pydict()
            return table
    except (pa.ArrowException, OSError, UnicodeDecodeError):
        return {}
