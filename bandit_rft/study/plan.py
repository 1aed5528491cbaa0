"""From a study file to its cells: every level of every factor, for every model, task and seed; each run once.

The seed alone decides data order and random streams, so cells of one seed are paired: rollout 0 of eight is the rollout
of one. Levels that come out as the same configuration are one cell that stands for all of them.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from bandit_rft.advantages import ADVANTAGES
from bandit_rft.budget import evaluation_count, planned_rounds
from bandit_rft.config import FREE, Config, ConfigError, build_config
from bandit_rft.options import nearest, read_value, read_yaml
from bandit_rft.paths import change_paths
from bandit_rft.presets import PRESETS

#: budget.rule -> the key of a run that it sets.
BUDGETS = {"rounds": "max_rounds", "tokens": "max_generated_tokens", "seconds": "max_seconds"}
KEYS = (
    "name",
    "preset",
    "baseline",
    "factors",
    "models",
    "tasks",
    "seeds",
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
        seed: of the run.
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


@dataclass
class Plan:
    """A checked study.

    Attributes:
        settings: the study file as written.
        base: the folder that paths in it start from.
        cells: in the order they are run. Seeds come first in that order: a study that is stopped early has few seeds,
            but whole ones.
    """

    settings: dict[str, Any]
    base: Path
    cells: list[PlannedCell]

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
    seeds = settings.setdefault("seeds", [0])
    whole = isinstance(seeds, list) and all(type(seed) is int and seed >= 0 for seed in seeds)
    if not whole or not seeds or len(set(seeds)) < len(seeds):
        raise StudyError(f"seeds must be a list of different whole numbers >= 0; got {seeds!r}")
    plan = Plan(settings, file.absolute().parent, [])
    plan.cells = list(_cells(plan))
    return plan


def _fill_in(settings: dict[str, Any]) -> None:
    """Fill in what a short study file leaves out: its preset, and the one model and task that it is about."""
    baseline = settings.setdefault("baseline", {})
    if not isinstance(baseline, dict) or not (baseline or "preset" in settings):
        raise StudyError(f"baseline must be a mapping with at least one entry, or a preset be given; got {baseline!r}")
    if (preset := settings.pop("preset", None)) is not None:
        if baseline.get("preset", preset) != preset:
            raise StudyError(f"preset={preset!r} and baseline.preset={baseline['preset']!r}: give one of them")
        settings["baseline"] = baseline = {"preset": preset, **baseline}
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


def _cells(plan: Plan) -> Iterator[PlannedCell]:
    settings, budget = plan.settings, _budget(plan.settings)
    levels = {BASELINE: {}, **_levels(settings)}
    for seed in settings["seeds"]:
        for model, of_model in settings["models"].items():
            for task, of_task in settings["tasks"].items():
                same: dict[str, PlannedCell] = {}
                for (factor, level), of_level in levels.items():
                    where = f"{level if factor == level else f'factors.{factor}.{level}'}, model {model}, task {task}"
                    parts = (
                        ("baseline", settings["baseline"]),
                        (f"models.{model}", of_model),
                        (f"tasks.{task}", of_task),
                    )
                    config: dict[str, Any] = {}
                    for name, part in (*parts, (where, of_level)):
                        config |= {
                            key: value for key, value in _dotted(part, name) if key.split(".")[0] not in NOT_CONFIG
                        }
                    config |= {"seed": seed, **budget}
                    name = "-".join(map(_slug, (str(model), str(task), factor, level))) + f"-s{seed}"
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
    rounds = {} if budget["rule"] == "rounds" else {"max_rounds": stopping.get("max_rounds", MAX_ROUNDS)}
    return {**rounds, BUDGETS[budget["rule"]]: budget["amount"]}


def _levels(settings: Mapping[str, Any]) -> dict[tuple[str, str], Mapping[str, Any]]:
    levels: dict[tuple[str, str], Mapping[str, Any]] = {}
    factors = settings.get("factors") or {}
    if not isinstance(factors, dict):
        raise StudyError(f"factors must be a mapping of factors to levels; got {factors!r}")
    for factor, of_factor in factors.items():
        if not isinstance(of_factor, dict) or not of_factor:
            raise StudyError(f"factors.{factor} must be a mapping of levels to keys; got {of_factor!r}")
        for level, keys in of_factor.items():
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


# --- what a study costs -----------------------------------------------------------------------------------------------

#: Assumed where the study file's `cost` says nothing: an H100-class GPU in bfloat16 at a usual utilization.
COST = {
    "prompt_tokens": 128, "completion_tokens": 256, "train_questions": 7473, "test_questions": 1319,
    "flops": 4e14, "bytes_per_second": 2.5e12, "bytes_per_parameter": 2, "decode_batch": 256,
}  # fmt: skip


@dataclass
class Cost:
    """An estimate: tokens drawn for training and for evaluation, tokens trained on, and GPU-hours."""

    generated: float = 0.0
    evaluated: float = 0.0
    trained: float = 0.0
    gpu_hours: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True)))


def estimate_cost(plan: Plan, cell: PlannedCell) -> Cost:
    """What a cell uses up, from the study file's `cost` (lengths, questions, rates) and its model's `parameters` P.

    FLOP: 2 P a token drawn, scored or read as a prompt, 6 P a token trained on. Decoding takes the longer of that and
    of reading the weights once a step for every `decode_batch` sequences. Nothing is skipped: an upper estimate where
    rewards of 0 cost no update. A budget in seconds buys rounds at that price; without P nobody knows how many, and
    the tokens are NaN.
    """
    of_study, of_task = plan.settings.get("cost") or {}, plan.settings["tasks"][cell.task].get("cost") or {}
    assumed = {**COST, **of_study, **of_task}
    for name, value in assumed.items():
        if name not in COST:
            raise StudyError(f"cost.{name} is unknown{nearest(name, COST)}; known: {', '.join(COST)}")
        assumed[name] = read_value(float, value)  # YAML 1.1 reads 4e14 as text
        count = name.endswith(("_questions", "_tokens"))
        if not isinstance(assumed[name], float) or not (assumed[name] > 0 or (count and assumed[name] == 0)):
            raise StudyError(f"cost.{name} must be a number {'>=' if count else '>'} 0; got {value!r}")
    parameters = float(plan.settings["models"][cell.model].get("parameters", 0))
    c = plan.config(cell, plan.base)
    rollouts = c.batch_size * c.num_generations
    length, prompt = min(assumed["completion_tokens"], c.max_completion_length), assumed["prompt_tokens"]
    kept = c.batch_size * (1 if ADVANTAGES[c.advantage].trains_on_first else c.rollout.keep or c.num_generations)
    replayed = kept * c.replay.ratio if c.replay.capacity else 0.0
    passes = (kept + replayed) * c.update.epochs
    trained = passes * (prompt + length)  # in one round, as `scored` and `seconds`
    scored = (passes if c.objective.kl_coef else replayed) * (prompt + length)

    def decode(sequences: float) -> float:
        compute = 2 * parameters * sequences * (prompt + length) / assumed["flops"]
        reads = math.ceil(sequences / assumed["decode_batch"]) * length * parameters
        return float(max(compute, reads * assumed["bytes_per_parameter"] / assumed["bytes_per_second"]))

    seconds = decode(rollouts) + (6 * trained + 2 * scored) * parameters / assumed["flops"]
    rounds = planned_rounds(c, int(assumed["train_questions"]))
    if c.max_generated_tokens is not None:
        rounds = min(rounds, math.ceil(c.max_generated_tokens / (rollouts * length)))
    if c.max_seconds is not None:
        if not parameters:
            return Cost(math.nan, math.nan, math.nan)
        rounds = min(rounds, math.ceil(c.max_seconds / seconds))
    evaluations = evaluation_count(c, rounds)
    splits = c.evaluation.splits or ["train", "test"]
    questions = sum(
        min(assumed.get(f"{split}_questions", assumed["test_questions"]), c.evaluation.max_queries or math.inf)
        for split in splits
    )
    answers = evaluations * questions * (c.evaluation.num_samples + c.evaluation.greedy)
    return Cost(
        generated=float(rounds * rollouts * length),
        evaluated=answers * length,
        trained=float(rounds * trained),
        gpu_hours=(rounds * seconds + decode(answers)) / 3600,
    )
