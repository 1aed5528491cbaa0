"""Read a study folder that may be unfinished: what each finished cell measured, and why each other cell is not used.

A cell's evaluations are reduced as they are read to four numbers a question, so that ten thousand cells fit in memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bandit_rft.study.measured import BUDGET_RULES, SPLITS, Measured, UnusableError, measure
from bandit_rft.study.packed import FILE, Packed, Packer

__all__ = ["BASELINE", "MEASURES", "SPLITS", "Cell", "Outcome", "Study", "heights", "load_study", "use"]

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
    curves: dict[str, list[tuple[float, float]]] = field(default_factory=dict)  # split -> (place, Pass@1), see `marks`
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
    tuning: dict[str, Any] | None = None  # tuning.json: how levels got their value of the tuned key

    @property
    def axis(self) -> str:
        """What learning curves are drawn over, and cells have equally much of: round, tokens or seconds."""
        rule = _rule(self.settings)
        return "round" if rule == "rounds" else rule

    def marks(self, curves: Iterable[Sequence[tuple[float, float]]]) -> list[float]:
        """Places on the axis at which all of some curves are known.

        At equal rounds those where all were evaluated. At equal tokens or seconds every run was evaluated at places of
        its own: quarters of the budget, between which a curve is taken as straight (as the area below it is).
        """
        places = [[place for place, _ in curve] for curve in curves]
        if not places or not all(places):
            return []
        if self.axis == "round":
            return sorted(set.intersection(*map(set, places)))
        quarters = [float(self.settings["budget"]["amount"]) * i / 4 for i in range(5)]
        return [mark for mark in quarters if all(of[0] <= mark <= of[-1] for of in places)]

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


def _rule(settings: Mapping[str, Any]) -> str:
    """Of a study's budget."""
    budget = settings.get("budget")
    rule: str = budget.get("rule", "rounds") if isinstance(budget, dict) else "rounds"
    if rule not in BUDGET_RULES:
        raise ValueError(f"budget.rule must be one of {', '.join(BUDGET_RULES)}; got {rule!r}")
    return rule


def load_study(folder: Path | str, packer: Packer | None = None) -> Study:
    """Read a study folder, or the results of one that were packed into cells.npz.

    Args:
        folder: what `study run` made, or a folder that holds cells.npz.
        packer: is given every cell as it is read.

    Raises:
        FileNotFoundError: neither plan.json and study.yaml are there nor cells.npz.
        ValueError: naming what is wrong in one of them.
    """
    import yaml

    folder = Path(folder)
    packed = Packed(folder / FILE) if not (folder / "plan.json").is_file() and (folder / FILE).is_file() else None
    if packed is not None:
        text, tuning = str(packed.description["study"]), packed.description["tuning"]
    else:
        for name in ("plan.json", "study.yaml"):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"study_folder: {folder} holds no {name}; expected what `study run` makes")
        text, tuning = (folder / "study.yaml").read_text(encoding="utf-8"), _tuning(folder / "tuning.json")
    settings = yaml.safe_load(text)
    if not isinstance(settings, dict):
        raise ValueError(f"study_folder: study.yaml of {folder} must hold keys and values")
    rule = _rule(settings)
    name = str(settings.get("name") or folder.resolve().name)
    if packer is not None:
        packer.study(name, text, tuning)
    cells = _packed_cells(packed, packer) if packed is not None else _run_cells(folder, rule, packer)
    if not any(cell.baseline for cell in cells):
        raise ValueError(f"study_folder: plan.json of {folder} has no baseline cell: there is nothing to compare with")
    of_baseline = dict.fromkeys(place for cell in cells if cell.baseline for place in cell.places)
    places = [cell.places[0] for cell in cells] + [place for cell in cells for place in cell.places]
    levels = _ordered(dict.fromkeys(places), settings.get("factors"))
    return Study(
        folder, name, settings, text, cells,
        [v for v in levels if v not in of_baseline], [v for v in levels if v in of_baseline],
        list(dict.fromkeys(cell.condition for cell in cells)), sorted({cell.seed for cell in cells}),
        {place: cell.places[0] for cell in reversed(cells) for place in cell.places[1:] if place not in of_baseline},
        tuning,
    )  # fmt: skip


def _run_cells(folder: Path, rule: str, packer: Packer | None) -> list[Cell]:
    """The cells of a plan with what their run folders hold."""
    try:
        plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
        entries = plan["cells"] if isinstance(plan, dict) else plan
        cells = [_planned(entry, folder) for entry in entries]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"study_folder: {folder / 'plan.json'} is not a list of cells ({error!r})") from None
    shared: dict[bytes, NDArray[Any]] = {}
    resolved: dict[Any, dict[str, Any]] = {}
    for cell in cells:
        measured = None
        if not cell.problem:
            try:
                measured = measure(folder / "cells" / cell.id, rule)
                use(cell, measured, shared)
            except UnusableError as error:
                measured, cell.problem = None, str(error)
            except (OSError, ValueError, KeyError, TypeError) as error:
                measured, cell.problem = None, f"metrics.jsonl: {error!r}"
        if measured is not None:  # cells that differ in nothing but the seed have one configuration
            kind = (cell.places[0], cell.condition)
            if kind not in resolved:
                resolved[kind] = resolved_config(folder, cell)
            cell.config = resolved[kind] | {"seed": cell.config.get("seed", cell.seed)}
        if packer is not None:
            packer.add(_entry(cell), cell.record, measured)
    return cells


def _entry(cell: Cell) -> dict[str, Any]:
    """A cell as cells.npz describes it."""
    keys = ("id", "model", "task", "seed", "baseline", "config", "status", "problem")
    return {"places": [list(place) for place in cell.places]} | {key: getattr(cell, key) for key in keys}


def _packed_cells(packed: Packed, packer: Packer | None) -> list[Cell]:
    shared: dict[bytes, NDArray[Any]] = {}
    cells = []
    for entry, record, measured in packed.cells():
        places = [(str(factor), str(level)) for factor, level in entry["places"]]
        cell = Cell(
            entry["id"], places, entry["model"], entry["task"], entry["seed"], entry["baseline"], entry["config"],
            entry["status"], entry["problem"], record=record,
        )  # fmt: skip
        if measured is not None:
            use(cell, measured, shared)
        if packer is not None:
            packer.add(_entry(cell), record, measured)
        cells.append(cell)
    return cells


def _tuning(path: Path) -> dict[str, Any] | None:
    """What tuning.json says of how levels got their values; None for a study without."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """A nested mapping by dotted key."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def resolved_config(folder: Path, cell: Cell) -> dict[str, Any]:
    """The cell's config.yaml by dotted key, without where it was written; the plan's overrides where it is missing."""
    import yaml

    path = folder / "cells" / cell.id / "config.yaml"
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        loaded = None
    config = dict(flat(loaded if isinstance(loaded, dict) else cell.config))
    config.pop("output_dir", None)
    for key in ("model_name_or_path", "data_path"):
        if isinstance(config.get(key), str):
            config[key] = short(config[key])
    return config


def short(name: str) -> str:
    """The last part of a path to a model, so that a report says nothing of the machine; hub names as they are."""
    return Path(name).name if name.startswith(("/", ".", "~")) or name.count("/") > 1 else name


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
        places = [measured.progress[round_] for round_ in found.rounds]
        cell.curves[split] = list(zip(places, by_round.tolist(), strict=True))


def heights(curve: Sequence[tuple[float, float]], marks: Sequence[float]) -> NDArray[np.float64]:
    """A learning curve at such places."""
    places, values = zip(*curve, strict=True)
    found: NDArray[np.float64] = np.interp(marks, places, values)
    return found


def _area(at: NDArray[np.float64], rewards: NDArray[np.float32]) -> NDArray[np.float32]:
    """Mean height of the curves rewards [E, Q] over the axis at [E], by the trapezoid rule."""
    span = at[-1] - at[0]
    if not span > 0:
        last: NDArray[np.float32] = rewards[-1]
        return last
    steps = np.diff(at) / span
    weights = (np.append(steps, 0) + np.append(0, steps)) / 2
    return np.asarray(weights @ rewards, dtype=np.float32)
