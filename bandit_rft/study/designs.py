"""What a level changes, read from the resolved configurations: its place on the plane, and the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bandit_rft.config import NOT_DESIGN
from bandit_rft.study.cells import BASELINE, Study, flat
from bandit_rft.study.pairing import Level


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
        config, base = (dict(flat(side[condition][seed].config)) for side in (cells, base_cells))
        shown = shown or base
        changes = {key: config.get(key) for key in sorted({*config, *base}) if config.get(key) != base.get(key)}
        sizes = [
            config.get(key) if isinstance(config.get(key), int) else None for key in ("batch_size", "num_generations")
        ]
        tuned = (study.tuning or {}).get("key")  # chosen for the level, not what the level is
        rest = frozenset((k, str(value)) for k, value in changes.items() if k not in NOT_DESIGN and k != tuned)
        of_level[level] = Design(sizes[0], sizes[1], changes, rest)
    return of_level, shown


def planes(of_level: Mapping[Level, Design]) -> list[dict[tuple[int, int], Level]]:
    """Levels that differ in batch size and rollouts alone, as {(B, n): level}; only where both vary."""
    groups: dict[frozenset[tuple[str, str]], dict[tuple[int, int], Level]] = {}
    for level, design in of_level.items():
        if level != BASELINE and design.batch is not None and design.rollouts is not None:
            groups.setdefault(design.rest, {}).setdefault((design.batch, design.rollouts), level)
    return [g for g in groups.values() if len(g) > 2 and all(len({point[i] for point in g}) > 1 for i in (0, 1))]
