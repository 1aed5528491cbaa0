"""Read a study folder that may be unfinished: what each finished cell measured, and why each other cell is not used.

A cell's evaluations are reduced as they are read to four numbers a question, so that ten thousand cells fit in memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bandit_rft.study.measured import BUDGET_RULES, SPLITS, Measured, UnusableError, measure

__all__ = ["BASELINE", "MEASURES", "SPLITS", "Cell", "Outcome", "Study", "load_study", "use"]

BASELINE = ("baseline", "baseline")
#: What is kept of a question: its reward before training, at the end, at the best evaluation, and over the whole run.
MEASURES = ("initial", "final", "best", "auc")


@dataclass
class Outcome:
    """One split of one cell: `queries` [Q] ascending, and for every measure each question's mean reward, [Q] float32.

    `asked` tells questions apart that have the same place in different runs (measured.py); the mean is over `samples`.
    """

    queries: NDArray[np.int64]
    rewards: dict[str, NDArray[np.float32]]
    asked: int = 0
    samples: int = 1


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
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)  # eval/<split>/pass@1 -> (round, value)
    final: dict[str, float] = field(default_factory=dict)  # metrics of the last evaluation
    totals: dict[str, float] = field(default_factory=dict)  # rounds, tokens/..., seconds/..., summed over the run
    record: dict[str, Any] = field(default_factory=dict)  # cell.json

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
                use(cell, measure(folder / "cells" / cell.id, rule), shared)
            except UnusableError as error:
                cell.problem = str(error)
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


def use(cell: Cell, measured: Measured, shared: dict[bytes, NDArray[Any]]) -> None:
    """Give a cell its results, reduced to a few numbers a question; equal arrays are kept once, in `shared`."""
    cell.totals, cell.final = measured.totals, measured.final

    def once(array: NDArray[Any]) -> Any:
        """Cells of a seed start alike, and all have the same questions."""
        return shared.setdefault(hashlib.blake2b(array.tobytes() + array.dtype.char.encode()).digest(), array)

    for split, found in measured.evaluations.items():
        rewards = found.rewards.mean(-1)  # [E, Q]: all samples count
        by_round = rewards.mean(-1, dtype=np.float64)
        measures = {
            "initial": rewards[0], "final": rewards[-1], "best": rewards[int(np.argmax(by_round))],
            "auc": _area(np.array([measured.progress[round_] for round_ in found.rounds]), rewards),
        }  # fmt: skip
        samples = found.rewards.shape[-1]
        of_question = {name: once(values) for name, values in measures.items()}
        cell.outcomes[split] = Outcome(once(found.queries), of_question, found.asked, samples)
        cell.curves[f"eval/{split}/pass@1"] = list(zip(found.rounds, by_round.tolist(), strict=True))


def _area(at: NDArray[np.float64], rewards: NDArray[np.float32]) -> NDArray[np.float32]:
    """Mean height of the curves rewards [E, Q] over the axis at [E], by the trapezoid rule."""
    span = at[-1] - at[0]
    if not span > 0:
        last: NDArray[np.float32] = rewards[-1]
        return last
    steps = np.diff(at) / span
    weights = (np.append(steps, 0) + np.append(0, steps)) / 2
    return np.asarray(weights @ rewards, dtype=np.float32)
