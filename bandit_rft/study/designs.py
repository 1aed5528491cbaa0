"""What a level changes, read from the resolved configurations: its place on the plane, and the rest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bandit_rft.config import NOT_DESIGN
from bandit_rft.study.analyse import Level
from bandit_rft.study.cells import BASELINE, Cell, Study


@dataclass(frozen=True)
class Design:
    """A level's resolved configuration: its place on the B x n plane and everything else it changes."""

    batch: int | None
    rollouts: int | None
    changes: dict[str, Any]  # all keys in which it differs from the baseline
    rest: frozenset[tuple[str, str]]  # those that are neither an axis nor how it is carried out

    @property
    def replays(self) -> bool:
        """Whether rewards or trajectories of earlier rounds are used."""
        rest = dict(self.rest)
        return rest.get("advantage", "").startswith("history") or rest.get("replay.capacity", "0") not in ("0", "0.0")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _resolved(folder: Path, cell: Cell) -> dict[str, Any]:
    """The cell's config.yaml by dotted key, without where it was written; the plan's overrides where it is missing."""
    import yaml

    path = folder / "cells" / cell.id / "config.yaml"
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        loaded = None
    config = dict(_flat(loaded if isinstance(loaded, dict) else cell.config))
    config.pop("output_dir", None)
    for key in ("model_name_or_path", "data_path"):
        if isinstance(config.get(key), str):
            config[key] = short(config[key])
    return config


def short(name: str) -> str:
    """The last part of a path to a model, so that a report says nothing of the machine; hub names as they are."""
    return Path(name).name if name.startswith(("/", ".", "~")) or name.count("/") > 1 else name


def designs(study: Study) -> tuple[dict[Level, Design], dict[str, Any]]:
    """The design of every level that has run, and the baseline's resolved configuration."""
    index = study.index()
    of_level: dict[Level, Design] = {}
    base_cells = index.get(BASELINE, {})
    shown: dict[str, Any] = {}
    for level in [BASELINE, *study.levels]:
        cells = index.get(level, {})
        found = [
            (c, seed) for c in study.conditions for seed in sorted(cells.get(c, {})) if seed in base_cells.get(c, {})
        ]
        if not found:
            continue
        condition, seed = found[0]
        config, base = (_resolved(study.folder, side[condition][seed]) for side in (cells, base_cells))
        shown = shown or base
        changes = {key: config.get(key) for key in sorted({*config, *base}) if config.get(key) != base.get(key)}
        sizes = [
            config.get(key) if isinstance(config.get(key), int) else None for key in ("batch_size", "num_generations")
        ]
        rest = frozenset((key, str(value)) for key, value in changes.items() if key not in NOT_DESIGN)
        of_level[level] = Design(sizes[0], sizes[1], changes, rest)
    return of_level, shown


def planes(of_level: Mapping[Level, Design]) -> list[dict[tuple[int, int], Level]]:
    """Levels that differ in batch size and rollouts alone, as {(B, n): level}; only where both vary."""
    groups: dict[frozenset[tuple[str, str]], dict[tuple[int, int], Level]] = {}
    for level, design in of_level.items():
        if level != BASELINE and design.batch is not None and design.rollouts is not None:
            groups.setdefault(design.rest, {}).setdefault((design.batch, design.rollouts), level)
    return [g for g in groups.values() if len(g) > 2 and all(len({point[i] for point in g}) > 1 for i in (0, 1))]
