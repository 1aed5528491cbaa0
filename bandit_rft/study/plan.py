"""From a study file to its cells: every level of every factor, for every model, task and seed; each run once.

The seed alone decides data order and random streams, so cells of one model, task and seed are paired: rollout 0 of
eight is the rollout of one. Other models and tasks have seeds of their own, so that their runs are independent. Levels
that come out as the same configuration are one cell that stands for all of them.

A study with `tune` is two plans. The first runs every level with every value of the tuned key, on seeds and questions
of its own; the second runs every level with the value that was best for it (tuning.py).
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from bandit_rft.config import FREE, Config, ConfigError, build_config
from bandit_rft.options import nearest, read_value, read_yaml
from bandit_rft.paths import change_paths
from bandit_rft.presets import PRESETS

#: budget.rule -> the key of a run that it sets.
BUDGETS = {"rounds": "max_rounds", "tokens": "max_generated_tokens", "seconds": "max_seconds"}
#: What budget.amount has to be.
AMOUNTS = {"rounds": "a whole number >= 0", "tokens": "a whole number >= 1", "seconds": "a number > 0"}
KEYS = (
    "name",
    "preset",
    "baseline",
    "factors",
    "models",
    "tasks",
    "seeds",
    "shared_seeds",
    "tune",
    "contrasts",
    "budget",
    "stopping",
    "keep_checkpoints",
    "cost",
)
#: Keys of a model or task that only the cost estimate reads.
NOT_CONFIG = ("parameters", "cost")
#: Runs that no budget in tokens or seconds stops earlier.
MAX_ROUNDS = 1_000_000
BASELINE = ("baseline", "baseline")
#: How far apart the seeds of two tasks and of two models are, so that no two runs of a study share a seed.
TASK_STRIDE, MODEL_STRIDE = 10**6, 10**9

Level = tuple[str, str]


class StudyError(ConfigError):
    """A study file that cannot be used, with the key and what was expected in its message."""


@dataclass
class PlannedCell:
    """One run.

    Attributes:
        id: the name of its folder.
        factor: the design choice it belongs to.
        level: which value of that choice.
        model: as the study file names it.
        task: likewise.
        seed: as the study file lists it; the run's own is config["seed"].
        baseline: whether it is the baseline.
        config: dotted overrides of the configuration.
        also: further (factor, level) pairs with the same configuration.
    """

    id: str
    factor: str
    level: str
    model: str
    task: str
    seed: int
    baseline: bool
    config: dict[str, Any]
    also: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Tune:
    """How each level gets its own value of a key: by the final Pass@1 of runs that serve no other purpose.

    Attributes:
        key: of a run.
        grid: the values that are tried.
        seeds: of the runs that try them; none of the study's.
        split: whose questions decide; not "test".
    """

    key: str
    grid: tuple[Any, ...]
    seeds: tuple[int, ...]
    split: str


@dataclass
class Plan:
    """A checked study.

    Attributes:
        settings: the study file as written.
        base: the folder that paths in it start from.
        cells: in the order they are run. Seeds come first in that order: a study that is stopped early has few seeds,
            but whole ones. Before `tuned`, levels have the tuned key's value that the baseline has.
        tune: how levels get their value of a key, if they do.
        tuning: the plan of the runs that decide it.
    """

    settings: dict[str, Any]
    base: Path
    cells: list[PlannedCell]
    tune: Tune | None = None
    tuning: Plan | None = None

    @property
    def name(self) -> str:
        """The study's name, from its file."""
        return str(self.settings["name"])

    def config(self, cell: PlannedCell, folder: Path) -> Config:
        """The cell's configuration when it is run from `folder`: paths of the study file are found from there."""
        overrides = dict(cell.config)
        for key, value in cell.config.items():
            overrides[key] = change_paths(key, value, self._from(folder))
        return build_config({**overrides, "output_dir": f"cells/{cell.id}"})

    def tuned(self, chosen: Mapping[Level, Any]) -> Plan:
        """The plan with the tuned key's value of each level, the baseline's under BASELINE."""
        if self.tune is None:
            raise ValueError("this study has no tune")
        plan = Plan(self.settings, self.base, [], self.tune)
        levels = {level: [("", {**keys, self.tune.key: chosen[level]})] for level, keys in _levels(self).items()}
        plan.cells = list(_cells(plan, self.settings["seeds"], levels))
        return plan

    def _from(self, folder: Path) -> Callable[[str], str]:
        """Paths that start at the study file, as they lead there from `folder`; any other text as it is."""

        def change(path: str) -> str:
            place = self.base / path
            return os.path.relpath(place, folder) if place.exists() else path

        return change

    def write(self, folder: Path) -> None:
        """Write study.yaml and plan.json.

        Raises:
            StudyError: `folder` holds another study's cells.
        """
        text = json.dumps([asdict(cell) for cell in self.cells], indent=1) + "\n"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "plan.json"
        if path.is_file():
            before = {cell["id"]: cell.get("config") for cell in planned_cells(folder)}
            now = {cell.id: cell.config for cell in self.cells}
            changed = [name for name in now.keys() & before.keys() if now[name] != before[name]]
            started = [name for name in sorted(changed) if (folder / "cells" / name / "cell.json").exists()]
            if started:
                raise StudyError(
                    f"output_dir={folder} has begun cell {started[0]} with another configuration; choose another folder"
                )
        for name, content in (("study.yaml", yaml.safe_dump(self.settings, sort_keys=False)), ("plan.json", text)):
            replace_file(folder / name, content)


def planned_cells(folder: Path) -> list[dict[str, Any]]:
    """The cells that a study folder's plan.json lists, at least one, each with its `id`.

    Raises:
        StudyError: there is something else in it.
    """
    path = folder / "plan.json"
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(cells, list) or not cells:
            raise ValueError("no cells" if cells in ([], {}) else f"a {type(cells).__name__}")
        for cell in cells:
            if not isinstance(cell, dict) or not isinstance(cell.get("id"), str) or Path(cell["id"]).name != cell["id"]:
                raise ValueError(f"{str(cell)[:80]!r}, which is no cell with the name of a folder as its id")
    except (OSError, ValueError, RecursionError) as error:
        raise StudyError(
            f"{path} lists not the cells of a study but {error}; remove it, and `study run` writes it anew"
        ) from None
    return cells


def replace_file(path: Path, text: str) -> None:
    """Write a small file in one step: a reader sees the old one or the new one."""
    partial = path.with_name(f".{path.name}.{os.uname().nodename}-{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def load_plan(file: str | Path) -> Plan:
    """Read and check a study file (docs/study.md), every cell's configuration too.

    Raises:
        StudyError: naming the key.
    """
    file = Path(file)
    try:
        settings = read_yaml(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, ValueError) as error:
        raise StudyError(f"study file {file}: {error}") from None
    if not isinstance(settings, dict):
        raise StudyError(f"study file {file}: expected keys and values")
    for key in settings:
        if key not in KEYS:
            raise StudyError(f"unknown key {key!r} in {file}{nearest(key, KEYS) or '; known: ' + ', '.join(KEYS)}")
    settings.setdefault("name", file.stem)
    _fill_in(settings)
    for key in ("models", "tasks"):
        if not isinstance(settings.get(key), dict) or not settings[key]:
            raise StudyError(f"{key} must be a mapping with at least one entry; got {settings.get(key)!r}")
    seeds = _read_seeds("seeds", settings.setdefault("seeds", [0]))
    if not isinstance(settings.get("shared_seeds", False), bool):
        raise StudyError(f"shared_seeds must be true or false; got {settings['shared_seeds']!r}")
    tune = _read_tune(settings)
    for name, listed in (("seeds", seeds), ("tune.seeds", tune.seeds if tune is not None else ())):
        if not settings.get("shared_seeds") and max(listed, default=0) >= TASK_STRIDE:
            raise StudyError(f"{name} must be below {TASK_STRIDE:,}, or shared_seeds: true be given; got {max(listed)}")
    plan = Plan(settings, file.absolute().parent, [], tune)
    levels = _levels(plan)
    read_contrasts(settings, levels)
    plan.cells = list(_cells(plan, seeds, {level: [("", keys)] for level, keys in levels.items()}))
    if tune is not None:
        plan.tuning = Plan(settings, plan.base, [], tune)
        once = {"evaluation.splits": [tune.split], "evaluation.greedy": False, "eval_steps": 0}
        grid = {
            level: [(f"-{_slug(f'{value:g}')}", {**keys, **once, tune.key: value}) for value in tune.grid]
            for level, keys in levels.items()
        }
        plan.tuning.cells = list(_cells(plan.tuning, tune.seeds, grid))
    return plan


def read_contrasts(settings: Mapping[str, Any], levels: Collection[Level]) -> dict[tuple[str, str], dict[Level, float]]:
    """(family, name) -> the weights of levels, which sum to 0, of the comparisons that a study file asks for.

    Raises:
        StudyError: naming the comparison.
    """
    given = settings.get("contrasts") or {}
    named = {f"{factor}/{level}": (factor, level) for factor, level in levels} | {"baseline": BASELINE}
    found: dict[tuple[str, str], dict[Level, float]] = {}
    if not isinstance(given, dict) or not all(isinstance(family, dict) and family for family in given.values()):
        raise StudyError(f"contrasts must be a mapping of families to names to levels and weights; got {given!r}")
    for family, name, weights in ((f, n, w) for f, names in given.items() for n, w in names.items()):
        where = f"contrasts.{family}.{name}"
        if not isinstance(weights, dict) or len(weights) < 2:
            raise StudyError(f"{where} must give weights to two levels or more; got {weights!r}")
        for level, weight in weights.items():
            if level not in named:
                raise StudyError(f"{where}: there is no level {level!r}{nearest(str(level), named)}")
            if isinstance(weight, bool) or not isinstance(weight, int | float):
                raise StudyError(f"{where}.{level} must be a number; got {weight!r}")
        if abs(sum(weights.values())) > 1e-9:
            raise StudyError(f"{where}: the weights must sum to 0; got {sum(weights.values()):g}")
        found[str(family), str(name)] = {named[level]: float(weight) for level, weight in weights.items()}
    return found


def _read_seeds(name: str, seeds: Any) -> list[int]:
    whole = isinstance(seeds, list) and all(type(seed) is int and seed >= 0 for seed in seeds)
    if not whole or not seeds or len(set(seeds)) < len(seeds):
        raise StudyError(f"{name} must be a list of different whole numbers >= 0; got {seeds!r}")
    return list(seeds)


def _read_tune(settings: Mapping[str, Any]) -> Tune | None:
    given = settings.get("tune")
    if given is None:
        return None
    known = ("key", "grid", "seeds", "split")
    if not isinstance(given, dict) or not {"grid", "seeds"} <= set(given) <= set(known):
        raise StudyError(f"tune must be a mapping of grid and seeds, and of key and split at will; got {given!r}")
    key, split = given.get("key", "learning_rate"), given.get("split", "validation")
    grid = given["grid"] if isinstance(given["grid"], list) else []
    values = [read_value(float, value) for value in grid]  # YAML 1.1 reads 1e-4 as text
    if len(values) < 2 or not all(isinstance(v, float) for v in values) or len(set(values)) < len(values):
        raise StudyError(f"tune.grid must be a list of at least two different numbers; got {given['grid']!r}")
    seeds = _read_seeds("tune.seeds", given["seeds"])
    if not isinstance(split, str) or split == "test":
        raise StudyError(f"tune.split must name a split that nothing is reported on, so not test; got {split!r}")
    if twice := set(seeds) & set(settings["seeds"]):
        raise StudyError(f"tune.seeds must be none of seeds, or a choice would be judged by its own luck; got {twice}")
    return Tune(str(key), tuple(values), tuple(seeds), split)


def _fill_in(settings: dict[str, Any]) -> None:
    """Fill in what a short study file leaves out: its preset, and the one model and task that it is about."""
    baseline = settings.setdefault("baseline", {})
    if not isinstance(baseline, dict) or not (baseline or "preset" in settings):
        raise StudyError(f"baseline must be a mapping with at least one entry, or a preset be given; got {baseline!r}")
    if (preset := settings.pop("preset", None)) is not None:
        if baseline.get("preset", preset) != preset:
            raise StudyError(f"preset={preset!r} and baseline.preset={baseline['preset']!r}: give one of them")
        settings["baseline"] = baseline = {"preset": preset, **baseline}
    chosen = baseline.get("preset")
    if chosen is not None and (not isinstance(chosen, str) or chosen not in PRESETS):
        key = "preset" if preset is not None else "baseline.preset"
        raise StudyError(f"{key} must be one of {', '.join(PRESETS)}; got {chosen!r}{nearest(chosen, PRESETS)}")
    keys = {"models": "model_name_or_path", "tasks": "task"}
    for name, key in keys.items():
        if name not in settings:
            given = dict(_dotted(baseline, "baseline")).get(key) or PRESETS.get(str(baseline.get("preset")), {}).get(
                key
            )
            if not given:
                raise StudyError(f"{name} is missing, and neither baseline nor its preset says which {key} to use")
            settings[name] = {Path(str(given)).name: {key: given}}


def seed_warning(plan: Plan) -> str | None:
    """What one or two seeds cannot show; None for more."""
    seeds = len(plan.settings["seeds"])
    if seeds == 1:
        return "one seed: no interval can be given at all. Five seeds are a good beginning"
    if seeds == 2:
        return (
            "two seeds: where runs differ, an interval reaches 12.7 standard errors to each side (5 seeds: 2.8), so "
            "hardly anything will be found. Give three seeds at least"
        )
    return None


def _cells(
    plan: Plan, seeds: Sequence[int], levels: Mapping[Level, Sequence[tuple[str, Mapping[str, Any]]]]
) -> Iterator[PlannedCell]:
    """The cells of all levels, each with its variants: (what its cells' names end in, the keys it changes)."""
    settings, budget = plan.settings, _budget(plan.settings)
    apart = (0, 0) if settings.get("shared_seeds") else (MODEL_STRIDE, TASK_STRIDE)
    for seed in seeds:
        for i, (model, of_model) in enumerate(settings["models"].items()):
            for k, (task, of_task) in enumerate(settings["tasks"].items()):
                same: dict[str, PlannedCell] = {}
                own = seed + i * apart[0] + k * apart[1]
                for (factor, level), ending, keys in ((v, *variant) for v in levels for variant in levels[v]):
                    where = f"{level if factor == level else f'factors.{factor}.{level}'}, model {model}, task {task}"
                    parts = (
                        ("baseline", settings["baseline"]),
                        (f"models.{model}", of_model),
                        (f"tasks.{task}", of_task),
                    )
                    config: dict[str, Any] = {}
                    for name, part in (*parts, (where, keys)):
                        config |= {
                            key: value for key, value in _dotted(part, name) if key.split(".")[0] not in NOT_CONFIG
                        }
                    config |= {"seed": own, **budget}
                    name = "-".join(map(_slug, (str(model), str(task), factor, level))) + f"{ending}-s{seed}"
                    cell = PlannedCell(
                        name, factor, level, str(model), str(task), seed, (factor, level) == BASELINE, config
                    )
                    try:
                        resolved = asdict(plan.config(cell, plan.base))
                    except ConfigError as error:
                        raise StudyError(f"{where}: {error}") from None
                    resolved.pop("output_dir")
                    first = same.setdefault(json.dumps(resolved, sort_keys=True), cell)
                    if first is not cell:
                        first.also.append((factor, level))
                names = [cell.id for cell in same.values()]
                if len(set(names)) < len(names):
                    twice = next(name for name in names if names.count(name) > 1)
                    raise StudyError(f"two cells would be called {twice}; give factors and levels different names")
                yield from same.values()


def _budget(settings: Mapping[str, Any]) -> dict[str, Any]:
    budget, stopping = settings.get("budget"), settings.get("stopping") or {}
    if not isinstance(budget, dict) or set(budget) != {"rule", "amount"} or budget["rule"] not in BUDGETS:
        raise StudyError(f"budget must be {{rule: {' | '.join(BUDGETS)}, amount: a number}}; got {budget!r}")
    if not isinstance(stopping, dict) or set(stopping) - {"max_rounds", "failed_cells"}:
        raise StudyError(f"stopping knows max_rounds and failed_cells; got {stopping!r}")
    rule, amount = budget["rule"], read_value(float if budget["rule"] == "seconds" else int, budget["amount"])
    number = isinstance(amount, float if rule == "seconds" else int) and not isinstance(amount, bool)
    if not number or not 0 <= amount < math.inf or (amount == 0 and rule != "rounds"):
        raise StudyError(f"budget.amount must be {AMOUNTS[rule]} with rule={rule}; got {budget['amount']!r}")
    rounds = {} if rule == "rounds" else {"max_rounds": stopping.get("max_rounds", MAX_ROUNDS)}
    return {**rounds, BUDGETS[rule]: budget["amount"]}


def _levels(plan: Plan) -> dict[Level, Mapping[str, Any]]:
    """Every level with the keys it changes, the baseline first."""
    levels: dict[Level, Mapping[str, Any]] = {BASELINE: {}}
    factors = plan.settings.get("factors") or {}
    if not isinstance(factors, dict):
        raise StudyError(f"factors must be a mapping of factors to levels; got {factors!r}")
    for factor, of_factor in factors.items():
        if not isinstance(of_factor, dict) or not of_factor:
            raise StudyError(f"factors.{factor} must be a mapping of levels to keys; got {of_factor!r}")
        for level, keys in of_factor.items():
            if plan.tune is not None and isinstance(keys, dict) and plan.tune.key in dict(_dotted(keys, str(level))):
                raise StudyError(f"factors.{factor}.{level} sets {plan.tune.key}, which tune.grid decides")
            levels[str(factor), str(level)] = keys or {}
    return levels


def _dotted(tree: Any, name: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """A nested mapping by dotted key; the options of a task and an advantage too, so that a level can change one."""
    if not isinstance(tree, Mapping):
        raise StudyError(f"{name} must be a mapping of configuration keys; got {tree!r}")
    for key, value in tree.items():
        if isinstance(value, Mapping) and (not prefix or prefix.rstrip(".") not in FREE):
            yield from _dotted(value, name, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "_", text.lower()).strip("_.") or "x"
