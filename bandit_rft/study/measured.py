"""What a finished cell left in its run folder: tokens and seconds of its rounds, every reward of its evaluations."""

from __future__ import annotations

import json
import math
import re
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bandit_rft.intervals import earned

SPLITS = ("train", "test")
#: Summed over the rounds of a run.
TOTALS = ("tokens/generated", "tokens/trained", "seconds/round", "seconds/evaluate")
PATTERNS = {key: re.compile(f'"{key}": ([-+.0-9eE]+)') for key in ("round", *TOTALS)}
#: What makes cells comparable, and so the axis of a learning curve: all have equally much of it.
BUDGET_RULES = ("rounds", "tokens", "seconds")


@dataclass
class Evaluations:
    """One split of one cell.

    Attributes:
        rounds: when it was evaluated, ascending [E].
        queries: the questions' places in their split, ascending [Q].
        rewards: of all K samples, [E, Q, K] float32; of one that was not scored what `intervals.earned` says.
        asked: a checksum of the questions' text. Tasks that make their questions from a run's seed ask other questions
            under the same places.
    """

    rounds: list[int]
    queries: NDArray[np.int64]
    rewards: NDArray[np.float32]
    asked: int


@dataclass
class Measured:
    """What a finished cell measured.

    Attributes:
        totals: `rounds`, and TOTALS summed over the run.
        progress: evaluated round -> how much of the budget was used up by then.
        final: metrics of the last evaluation, such as eval/test/entropy.
        evaluations: by split.
    """

    totals: dict[str, float]
    progress: dict[int, float]
    final: dict[str, float]
    evaluations: dict[str, Evaluations] = field(default_factory=dict)


class UnusableError(ValueError):
    """A finished cell whose results cannot be used, with the reason in words."""


def measure(folder: Path, rule: str) -> Measured:
    """Read a finished cell's run folder.

    Args:
        folder: of the run.
        rule: of the study's budget, one of BUDGET_RULES.

    Raises:
        UnusableError: something is missing or cannot be read.
    """
    lines = _lines(folder / "metrics.jsonl")
    if not lines:
        raise UnusableError("metrics.jsonl is missing or empty")
    totals, progress = dict.fromkeys(TOTALS, 0.0), dict[int, float]()
    last = max(lines)
    final: dict[str, float] = {}
    for round_ in sorted(lines):
        line = lines[round_]
        for key in TOTALS:
            totals[key] += line.get(key) or 0.0
        spent = {
            "rounds": float(round_), "tokens": totals["tokens/generated"],
            "seconds": totals["seconds/round"] - totals["seconds/evaluate"],
        }  # fmt: skip
        progress[round_] = spent[rule]
        for key, value in line.items() if round_ == last else ():
            if key.startswith("eval/") and isinstance(value, int | float) and math.isfinite(value):
                final[key] = float(value)
    totals["rounds"] = float(last)
    files: dict[str, list[tuple[int, Path]]] = {split: [] for split in SPLITS}
    for path in (folder / "evaluations").glob("*.parquet"):
        match = re.fullmatch(r"round-(\d+)-(.+)\.parquet", path.name)
        if match and match[2] in files and int(match[1]) in lines:
            files[match[2]].append((int(match[1]), path))
    found = Measured(totals, {}, final)
    for split, of_split in files.items():
        if not of_split:
            raise UnusableError(f"no evaluation of the {split} split")
        try:
            found.evaluations[split] = _evaluations(sorted(of_split))
        except (OSError, ValueError, KeyError) as error:  # pyarrow's errors are ValueErrors and OSErrors
            raise UnusableError(f"evaluation of the {split} split: {error}") from None
        if max(of_split)[0] != last:
            raise UnusableError(f"its last round {last} was not evaluated on the {split} split")
        found.progress |= {round_: progress[round_] for round_, _ in of_split}
    return found


def _lines(path: Path) -> dict[int, dict[str, Any]]:
    """metrics.jsonl by round: whole lines where there was an evaluation, the summed keys alone of the others.

    Decoding 100 lines whole takes 1.6 ms, which is much for each of ten thousand cells.
    """
    lines: dict[int, dict[str, Any]] = {}
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return lines
    for line in text.splitlines():
        if not (line.startswith("{") and line.endswith("}")):  # torn by a kill
            break
        values = json.loads(line) if '"eval/' in line else {
            key: float(match[1]) for key, pattern in PATTERNS.items() if (match := pattern.search(line))
        }  # fmt: skip
        lines[int(values["round"])] = values
    return lines


def _evaluations(files: list[tuple[int, Path]]) -> Evaluations:
    queries, first = question_rewards(files[0][1])
    rewards = [first]
    for _, path in files[1:]:
        of_round, values = question_rewards(path)
        if not np.array_equal(of_round, queries):
            raise ValueError(f"{path.name} has other questions than {files[0][1].name}")
        if values.shape != first.shape:
            raise ValueError(f"{path.name} has another number of samples than {files[0][1].name}")
        rewards.append(values)
    return Evaluations([round_ for round_, _ in files], queries, np.stack(rewards), _asked(files[0][1]))


def question_rewards(path: Path) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Questions [Q] and the rewards of all their samples [Q, K]; see `intervals.earned` for those not scored."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pa.OSFile(str(path)) as source, pq.ParquetFile(source) as file:
        table = file.read(columns=["query", "sample", "reward"], use_threads=False)
    query, sample, reward = (table[name].to_numpy() for name in ("query", "sample", "reward"))
    if (sample < 0).any():  # the greedy answer (-1) is no sample
        query, reward, sample = query[sample >= 0], reward[sample >= 0], sample[sample >= 0]
    samples = int(sample.max(initial=-1)) + 1
    order = np.lexsort((sample, query))
    fits = samples > 0 and len(query) % samples == 0
    if fits:
        queries, numbers = query[order].reshape(-1, samples), sample[order].reshape(-1, samples)
        fits = bool((numbers == np.arange(samples)).all() and (queries == queries[:, :1]).all())
    if not fits:
        raise ValueError(f"{path.name} must hold the first sample of every question, and of others equally many")
    reward = np.array(earned([None if np.isnan(one) else one for one in reward[order]]), np.float32)
    return queries[:, 0].copy(), reward.reshape(-1, samples)


def _asked(path: Path) -> int:
    """A checksum of the prompts of an evaluation, in the order of their questions."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    with pa.OSFile(str(path)) as source, pq.ParquetFile(source) as file:
        table = file.read(columns=["query", "sample", "prompt"], use_threads=False)
    table = table.filter(pc.equal(table["sample"], 0)).sort_by("query")
    return zlib.crc32("\0".join(str(prompt) for prompt in table["prompt"].to_pylist()).encode())
