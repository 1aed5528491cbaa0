"""Each level's own value of the tuned key, by the final Pass@1 of runs on seeds and questions that serve nothing else.

A level is a procedure here: "try these values, keep the best, train". So every level, the baseline too, gets the same
number of tries, and one value for all models and tasks: a recommendation that names a level can name its value. With a
value for each model and task, the choice would rest on a run or two and be mostly noise.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bandit_rft.study.cells import Study
from bandit_rft.study.measured import question_rewards
from bandit_rft.study.plan import Level, Plan, PlannedCell, StudyError, Tune, replace_file
from bandit_rft.study.run import read_record

FOLDER = "tuning"  # in the study folder: the folder of the runs that decide
FILE = "tuning.json"
ENDED = ("finished", "failed")
IDENTITY = ("levels", "model", "task", "seed", "value")  # of a run in tuning.json: which one it is


def undecided(tuning: Plan, folder: Path) -> int:
    """How many cells of the tuning plan have not ended yet, in its folder."""
    return sum(read_record(folder, cell.id).get("status") not in ENDED for cell in tuning.cells)


def failures(tuning: Plan, folder: Path) -> list[str]:
    """The cells of the tuning plan that failed, in its folder."""
    return [cell.id for cell in tuning.cells if read_record(folder, cell.id).get("status") == "failed"]


def recorded(plan: Plan, folder: Path) -> dict[Level, Any] | None:
    """What `folder`/tuning.json chose, where it is of these very runs; None otherwise.

    A choice that cells were trained with must not change because a tuning run was tried again.
    """
    if plan.tune is None or plan.tuning is None:
        return None
    try:
        found = json.loads((folder / FILE).read_text(encoding="utf-8"))
        if {**found, "chosen": 0, "runs": 0} != {**_about(plan.tune), "chosen": 0, "runs": 0}:
            return None
        expected = [_identity(cell, plan.tune) for cell in plan.tuning.cells]
        if [{key: row[key] for key in IDENTITY} for row in found["runs"]] != expected:
            return None
        chosen = {(factor, level): value for factor, level, value in found["chosen"]}
        levels = {(factor, level) for row in expected for factor, level in row["levels"]}
        return chosen if chosen.keys() == levels and set(chosen.values()) <= set(plan.tune.grid) else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def choose(plan: Plan, folder: Path) -> dict[Level, Any]:
    """The value of every level, from the runs in `folder`/tuning; recorded in `folder`/tuning.json, and kept.

    The mean over models, tasks and tuning seeds decides; equal means: the smaller value. A run that failed earned 0,
    since a value that makes runs diverge is no choice.

    Raises:
        StudyError: a run has not ended, or a finished one left no evaluation of the split.
    """
    if plan.tune is None or plan.tuning is None:
        raise StudyError("this study has no tune")
    if (before := recorded(plan, folder)) is not None:
        return before
    runs = folder / FOLDER
    if missing := undecided(plan.tuning, runs):
        of = f"{missing} of {len(plan.tuning.cells)} runs that choose {plan.tune.key} have not ended"
        raise StudyError(f"{of}; run the study again when they have")
    rows = [_row(cell, plan.tune, runs) for cell in plan.tuning.cells]
    chosen = best(plan.tune, rows)
    text = _about(plan.tune) | {"chosen": [[*level, value] for level, value in chosen.items()], "runs": rows}
    replace_file(folder / FILE, json.dumps(text, indent=1) + "\n")
    return chosen


def best(tune: Tune, rows: Sequence[Mapping[str, Any]]) -> dict[Level, Any]:
    """The value of each level with the highest mean score, the smaller one of two that are alike."""
    scores: dict[Level, dict[Any, list[float]]] = {}
    for row in rows:
        for factor, level in row["levels"]:
            scores.setdefault((factor, level), {}).setdefault(row["value"], []).append(row["score"])
    return {
        level: max(sorted(of_level), key=lambda value: round(float(np.mean(of_level[value])), 12))
        for level, of_level in scores.items()
    }


def tuning_rows(study: Study) -> list[dict[str, Any]]:
    """The mean score of every level and value, over models, tasks and tuning seeds, and whether it was chosen."""
    if study.tuning is None:
        return []
    chosen = {(factor, level): value for factor, level, value in study.tuning["chosen"]}
    scores: dict[Level, dict[float, list[float]]] = {}
    for row in study.tuning["runs"]:
        for factor, level in row["levels"]:
            scores.setdefault((factor, level), {}).setdefault(row["value"], []).append(row["score"])
    return [
        {
            "factor": level[0], "level": level[1], "key": study.tuning["key"], "value": value, "runs": len(found),
            "score": float(np.mean(found)), "chosen": value == chosen.get(level),
        }
        for level, of_level in scores.items()
        for value, found in sorted(of_level.items())
    ]  # fmt: skip


def _about(tune: Tune) -> dict[str, Any]:
    return {"key": tune.key, "grid": list(tune.grid), "seeds": list(tune.seeds), "split": tune.split}


def _identity(cell: PlannedCell, tune: Tune) -> dict[str, Any]:
    levels = [[cell.factor, cell.level], *map(list, cell.also)]
    return {
        "levels": levels, "model": cell.model, "task": cell.task, "seed": cell.seed, "value": cell.config[tune.key]
    }  # fmt: skip


def _row(cell: PlannedCell, tune: Tune, folder: Path) -> dict[str, Any]:
    """One run: what it stands for, its value, and its mean reward on the split at its end."""
    failed = read_record(folder, cell.id).get("status") == "failed"
    score = 0.0 if failed else _score(folder / "cells" / cell.id, tune.split)
    return _identity(cell, tune) | {"failed": failed, "score": score}


def _score(cell: Path, split: str) -> float:
    files = {
        int(found[1]): path
        for path in (cell / "evaluations").glob("*.parquet")
        if (found := re.fullmatch(rf"round-(\d+)-{re.escape(split)}\.parquet", path.name))
    }
    if not files:
        raise StudyError(f"{cell.name} is finished but has no evaluation of the {split} split")
    return float(question_rewards(files[max(files)])[1].mean())
