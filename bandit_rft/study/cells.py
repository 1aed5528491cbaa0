"""Read a study folder that may be unfinished: what each finished cell measured, and why each other cell is not used.

A cell's evaluations are reduced as they are read to four numbers a question, so that ten thousand cells fit in memory.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SPLITS = ("train", "test")
BASELINE = ("baseline", "baseline")
#: What is kept of a question: its reward before training, at the end, at the best evaluation, and over the whole run.
MEASURES = ("initial", "final", "best", "auc")
#: Summed over the rounds of a run.
TOTALS = ("tokens/generated", "tokens/trained", "seconds/round", "seconds/evaluate")
PATTERNS = {key: re.compile(f'"{key}": ([-+.0-9eE]+)') for key in ("round", *TOTALS)}
#: What makes cells comparable, and so the axis of a learning curve: all have equally much of it.
BUDGET_RULES = ("rounds", "tokens", "seconds")


@dataclass
class Outcome:
    """One split of one cell: `queries` [Q] ascending, and a reward for each and every measure, [Q] float32."""

    queries: NDArray[np.int64]
    rewards: dict[str, NDArray[np.float32]]


@dataclass
class Cell:
    """One run of the study. `problem` says why its results are not used; empty when they are."""

    id: str
    places: list[tuple[str, str]]  # every (factor, level) it stands for
    model: str
    task: str
    seed: int
    baseline: bool
    config: dict[str, Any]
    status: str
    problem: str = ""
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)  # eval/<split>/<metric> -> (round, value)
    totals: dict[str, float] = field(default_factory=dict)  # rounds, tokens/..., seconds/..., summed over the run
    record: dict[str, Any] = field(default_factory=dict)  # cell.json

    @cached_property
    def final(self) -> dict[str, float]:
        """Evaluation metrics of the last round."""
        last = self.totals["rounds"]
        return {key: curve[-1][1] for key, curve in self.curves.items() if curve[-1][0] == last}

    @property
    def condition(self) -> tuple[str, str]:
        """What a level is compared within."""
        return self.model, self.task


@dataclass
class Study:
    """A study folder in memory. `levels` has every (factor, level) in the plan's order, without the baseline's own."""

    folder: Path
    name: str
    settings: dict[str, Any]
    settings_text: str
    cells: list[Cell]
    levels: list[tuple[str, str]]
    baseline_levels: list[tuple[str, str]]  # levels that are the baseline by another name
    conditions: list[tuple[str, str]]
    seeds: list[int]
    same_as: dict[tuple[str, str], tuple[str, str]]  # a level that is another's cells by another name -> that level

    @property
    def unused(self) -> list[Cell]:
        """Cells that were planned but are not in the results."""
        return [cell for cell in self.cells if cell.problem]

    def index(self) -> dict[tuple[str, str], dict[tuple[str, str], dict[int, Cell]]]:
        """Usable cells by level, condition and seed; the baseline's under BASELINE, whatever else they stand for."""
        found: dict[tuple[str, str], dict[tuple[str, str], dict[int, Cell]]] = {}
        for cell in self.cells:
            if cell.problem:
                continue
            for place in {**dict.fromkeys(cell.places), **({BASELINE: None} if cell.baseline else {})}:
                found.setdefault(place, {}).setdefault(cell.condition, {})[cell.seed] = cell
        return found


def load_study(folder: Path | str) -> Study:
    """Read a study folder.

    Raises:
        FileNotFoundError: study.yaml or plan.json is missing.
        ValueError: naming what is wrong in one of them.
    """
    import yaml

    folder = Path(folder)
    for name in ("plan.json", "study.yaml"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"study_folder: {folder} holds no {name}; expected what `study run` makes")
    text = (folder / "study.yaml").read_text(encoding="utf-8")
    settings = yaml.safe_load(text)
    if not isinstance(settings, dict):
        raise ValueError(f"study_folder: {folder / 'study.yaml'} must hold keys and values")
    budget = settings.get("budget")
    rule = budget.get("rule", "rounds") if isinstance(budget, dict) else "rounds"
    if rule not in BUDGET_RULES:
        raise ValueError(f"budget.rule must be one of {', '.join(BUDGET_RULES)}; got {rule!r}")
    try:
        plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
        entries = plan["cells"] if isinstance(plan, dict) else plan
        cells = [_planned(entry, folder) for entry in entries]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"study_folder: {folder / 'plan.json'} is not a list of cells ({error!r})") from None
    if not any(cell.baseline for cell in cells):
        raise ValueError(
            f"study_folder: {folder / 'plan.json'} has no baseline cell, so there is nothing to compare with"
        )
    shared: dict[bytes, NDArray[Any]] = {}
    for cell in cells:
        if not cell.problem:
            try:
                _measure(cell, folder / "cells" / cell.id, rule, shared)
            except (OSError, ValueError, KeyError, TypeError) as error:
                cell.problem = f"metrics.jsonl: {error!r}"
    of_baseline = dict.fromkeys(place for cell in cells if cell.baseline for place in cell.places)
    places = [cell.places[0] for cell in cells] + [place for cell in cells for place in cell.places]
    levels = _ordered(dict.fromkeys(places), settings.get("factors"))
    return Study(
        folder, str(settings.get("name") or folder.resolve().name), settings, text, cells,
        [v for v in levels if v not in of_baseline], [v for v in levels if v in of_baseline],
        list(dict.fromkeys(cell.condition for cell in cells)), sorted({cell.seed for cell in cells}),
        {place: cell.places[0] for cell in reversed(cells) for place in cell.places[1:] if place not in of_baseline},
    )  # fmt: skip


def _ordered(places: Iterable[tuple[str, str]], factors: Any) -> list[tuple[str, str]]:
    """Levels as study.yaml lists them, factor by factor; what it does not list comes after, in the plan's order."""
    listed = {str(f): [str(v) for v in levels] for f, levels in factors.items()} if isinstance(factors, dict) else {}
    places = list(places)
    appearance = list(dict.fromkeys([*listed, *(factor for factor, _ in places)]))

    def rank(place: tuple[str, str]) -> tuple[int, int]:
        levels = listed.get(place[0], [])
        return appearance.index(place[0]), levels.index(place[1]) if place[1] in levels else len(levels)

    return sorted(places, key=rank)


def _planned(entry: Mapping[str, Any], folder: Path) -> Cell:
    """A cell of the plan with what cell.json says of it."""
    places = [(str(entry["factor"]), str(entry["level"])), *((str(f), str(v)) for f, v in entry.get("also") or ())]
    cell = Cell(
        str(entry["id"]), list(dict.fromkeys(places)), str(entry["model"]), str(entry["task"]), int(entry["seed"]),
        bool(entry.get("baseline")), dict(entry.get("config") or {}), "not started",
    )  # fmt: skip
    if Path(cell.id).name != cell.id:
        raise ValueError(f"cell id {cell.id!r} is not the name of a folder")
    try:
        record = json.loads((folder / "cells" / cell.id / "cell.json").read_text(encoding="utf-8"))
        cell.record = record if isinstance(record, dict) else {}
        cell.status = str(cell.record.get("status", "unknown"))
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        cell.status, cell.problem = "unreadable", f"cell.json: {error}"
    if cell.status != "finished" and not cell.problem:
        lines = str(cell.record.get("error") or "").strip().splitlines()
        cell.problem = lines[-1] if lines else cell.status
    return cell


def _measure(cell: Cell, folder: Path, rule: str, shared: dict[bytes, NDArray[Any]]) -> None:
    """Fill in what a finished cell measured, or the problem that keeps it out."""
    progress: dict[int, float] = {}
    lines, totals = _lines(folder / "metrics.jsonl"), dict.fromkeys(TOTALS, 0.0)
    for round_ in sorted(lines):
        line = lines[round_]
        for key in TOTALS:
            totals[key] += line.get(key) or 0.0
        if rule == "rounds":
            progress[round_] = round_
        elif rule == "tokens":
            progress[round_] = totals["tokens/generated"]
        else:
            progress[round_] = totals["seconds/round"] - totals["seconds/evaluate"]
        for key, value in line.items() if len(line) > len(PATTERNS) else ():  # else there was no evaluation
            if key.startswith("eval/") and isinstance(value, int | float) and math.isfinite(value):
                cell.curves.setdefault(key, []).append((round_, float(value)))
    cell.totals = totals
    if not lines:
        cell.problem = "metrics.jsonl is missing or empty"
        return
    cell.totals["rounds"] = float(max(lines))
    files: dict[str, list[tuple[int, Path]]] = {split: [] for split in SPLITS}
    for path in (folder / "evaluations").glob("*.parquet"):
        match = re.fullmatch(r"round-(\d+)-(.+)\.parquet", path.name)
        if match and match[2] in files and int(match[1]) in lines:
            files[match[2]].append((int(match[1]), path))
    for split, found in files.items():
        if not found:
            cell.problem = f"no evaluation of the {split} split"
            return
        try:
            cell.outcomes[split] = _outcome(sorted(found), progress, shared)
        except (OSError, ValueError, KeyError) as error:  # pyarrow's errors are ValueErrors and OSErrors
            cell.problem = f"evaluation of the {split} split: {error}"
            return
        if max(found)[0] != max(lines):
            cell.problem = f"its last round {max(lines)} was not evaluated on the {split} split"
            return


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


def _outcome(files: list[tuple[int, Path]], progress: dict[int, float], shared: dict[bytes, NDArray[Any]]) -> Outcome:
    queries, first = _rewards(files[0][1])
    rewards = [first]
    for _, path in files[1:]:
        of_round, values = _rewards(path)
        if not np.array_equal(of_round, queries):
            raise ValueError(f"{path.name} has other questions than {files[0][1].name}")
        rewards.append(values)
    at = np.array([progress[round_] for round_, _ in files])
    best = int(np.argmax([values.mean() for values in rewards]))
    measures = {"initial": first, "final": rewards[-1], "best": rewards[best]}
    measures["auc"] = _area(at, np.stack(rewards))

    def once(array: NDArray[Any]) -> Any:
        """Equal arrays are kept once: cells of a seed start alike, and all have the same questions."""
        return shared.setdefault(hashlib.blake2b(array.tobytes() + array.dtype.char.encode()).digest(), array)

    return Outcome(once(queries), {name: once(values) for name, values in measures.items()})


def _rewards(path: Path) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Questions and the rewards of their first sample (Pass@1); a completion that was not scored earned 0."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pa.OSFile(str(path)) as source, pq.ParquetFile(source) as file:
        table = file.read(columns=["query", "sample", "reward"], use_threads=False)
    query, sample, reward = (table[name].to_numpy() for name in ("query", "sample", "reward"))
    if sample.any():  # more samples than the first, or the greedy answer (-1)
        query, reward = query[sample == 0], reward[sample == 0]
    reward = np.where(np.isnan(reward), 0, reward).astype(np.float32)
    if (query[1:] < query[:-1]).any():
        order = np.argsort(query)
        query, reward = query[order], reward[order]
    if not len(query) or (query[1:] == query[:-1]).any():
        raise ValueError(f"{path.name} must hold one first sample of every question")
    return query, reward


def _area(at: NDArray[np.float64], rewards: NDArray[np.float32]) -> NDArray[np.float32]:
    """Mean height of the curves rewards [E, Q] over the axis at [E], by the trapezoid rule."""
    span = at[-1] - at[0]
    if not span > 0:
        last: NDArray[np.float32] = rewards[-1]
        return last
    steps = np.diff(at) / span
    weights = (np.append(steps, 0) + np.append(0, steps)) / 2
    return np.asarray(weights @ rewards, dtype=np.float32)
