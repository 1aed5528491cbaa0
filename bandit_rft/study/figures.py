"""What the study's page draws: the forest of gains, curves beside the baseline's, maps of batch by rollouts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from markupsafe import Markup

from bandit_rft.report.figures import TEST, TRAIN, Charts, Figure, shared_range
from bandit_rft.report.plot import SMALL, Line
from bandit_rft.report.shell import signed
from bandit_rft.report.text import visible
from bandit_rft.study.cells import BASELINE, SPLITS, short
from bandit_rft.study.findings import SIGNIFICANT
from bandit_rft.study.pairing import ALL, Condition, Level
from bandit_rft.study.plots import Forest, Mark, heat_map
from bandit_rft.study.points import Curve, Pairs, simultaneous
from bandit_rft.study.tables import Tables, Text, interval

MAX_PANELS = 80
MAX_POINTS = 60
SLOTS = {"test": TEST, "train": TRAIN}
BASE = 4


class ForestRow(NamedTuple):
    """A configuration: its name, its other names, the drawing, and its gains as text."""

    name: str
    also: str
    svg: Markup
    texts: dict[str, Text]


@dataclass
class ForestPlot:
    """The forest of one scope, factor by factor."""

    title: str
    axis: Markup
    factors: dict[str, list[ForestRow]]


class Panel(NamedTuple):
    """A level's two curves."""

    name: str
    figures: list[Figure]


@dataclass
class Curves:
    """Panels by factor, and how many levels there was no room for."""

    factors: dict[str, list[Panel]]
    left_out: int


class Map(NamedTuple):
    """A heat map and what its levels have in common."""

    title: str
    svg: Markup


def forests(tables: Tables, pairs: Pairs) -> list[ForestPlot]:
    """All models and tasks together, then each."""
    conditions = tables.study.conditions
    scopes: list[tuple[str, str, str, list[Condition]]] = [("", ALL, ALL, conditions)]
    if len(conditions) > 1:
        scopes += [(f"{short(model)} on {task}", model, task, [(model, task)]) for model, task in conditions]
    return [_forest(tables, pairs, *scope) for scope in scopes]


def _forest(tables: Tables, pairs: Pairs, title: str, model: str, task: str, conditions: list[Condition]) -> ForestPlot:
    analysis = tables.analysis
    marks: dict[Level, list[Mark]] = {}
    for level in tables.levels:
        found = [(split, analysis.row(level, "final", split, model, task)) for split in ("test", "train")]
        marks[level] = [
            Mark(
                split, SLOTS[split], row["low"], row["gain"], row["high"], row["p_holm"] <= SIGNIFICANT,
                simultaneous(row), pairs.gains(level, split, conditions),
            )
            for split, row in found if row is not None
        ]  # fmt: skip
    every = [mark for of_level in marks.values() for mark in of_level]
    forest = Forest([(m.low, m.gain, m.high, *m.seeds) for m in every], [m.wide for m in every if m.wide])
    factors: dict[str, list[ForestRow]] = {factor: [] for factor in tables.factors}
    same = ", ".join(f"{factor} {name}" for factor, name in tables.study.baseline_levels if (factor, name) != BASELINE)
    for level, of_level in marks.items():
        texts: dict[str, Text] = {
            split: (signed(row["gain"]), interval(row))
            if (row := analysis.row(level, "final", split, model, task)) is not None
            else "not measured"
            for split in ("test", "train")
        }
        also = ", ".join(f"{factor} {name}" for factor, name in tables.also(level))
        factors[level[0]].append(ForestRow(level[1], also, Markup(forest.row(of_level)), texts))
    axis = Markup(forest.axis("gain in final Pass@1 over the baseline"))
    baseline = ForestRow("the baseline", same, Markup(forest.row([])), {"test": "0", "train": "0"})
    return ForestPlot(title, axis, {"": [baseline], **{factor: rows for factor, rows in factors.items() if rows}})


def curves(tables: Tables, pairs: Pairs, charts: Charts) -> Curves:
    """Every level beside the baseline, train and test on one scale from 0."""
    found: dict[Level, dict[str, Curve]] = {}
    for level in tables.levels:
        drawn = {split: pairs.curve(level, split, tables.study.conditions) for split in SPLITS}
        if known := {split: curve for split, curve in drawn.items() if curve is not None}:
            found[level] = known
    shown = dict(list(found.items())[: MAX_PANELS // 2])
    lines = {
        level: {split: _lines(level[1], c, SLOTS[split]) for split, c in of.items()} for level, of in shown.items()
    }
    span = shared_range([line for of in lines.values() for pair in of.values() for line in pair])
    factors: dict[str, list[Panel]] = {}
    for level, of_level in lines.items():
        figures = [
            charts.figure(split, pair, size=SMALL, y_range=span, y_title="Pass@1", x_title=tables.study.axis)
            for split, pair in sorted(of_level.items(), key=lambda item: item[0] != "test")
        ]
        also = "".join(f", {factor} {name}" for factor, name in tables.also(level))
        factors.setdefault(level[0], []).append(Panel(visible(level[1] + also, 120), figures))
    return Curves(factors, len(found) - len(shown))


def _lines(name: str, curve: Curve, slot: int) -> list[Line]:
    xs = curve.marks
    level = Line(visible(name, 60), xs, curve.level.tolist(), slot, markers=True)
    if not any(map(math.isnan, curve.low)):  # with one seed nothing is known of the spread
        level.low, level.high = [max(0.0, y) for y in curve.low], [min(1.0, y) for y in curve.high]
    at = range(len(xs)) if curve.seeds.size <= MAX_POINTS else [len(xs) - 1]
    level.points = [(xs[i], float(y)) for i in at for y in curve.seeds[:, i]]
    return [level, Line("baseline", xs, curve.baseline.tolist(), BASE)]


def maps(tables: Tables) -> list[Map]:
    """Batch size against rollouts, where both vary; n = 1 among them."""
    found = []
    for plane in tables.planes:
        whole = tables.whole(plane)
        rows = {point: row for point, level in whole.items() if (row := tables.analysis.row(level)) is not None}
        if not rows:
            continue
        base = tables.designs.get(BASELINE)
        zero = (base.batch, base.rollouts) if base and base.batch and base.rollouts and whole is not plane else None
        points = {*rows, *([zero] if zero else [])}
        batches, rollouts = (sorted({point[i] for point in points}) for i in (0, 1))
        cells = {point: (row["gain"], row["low"], row["high"]) for point, row in rows.items()}
        shown = [point for point, row in rows.items() if row["p_holm"] <= SIGNIFICANT]
        design = tables.designs[next(iter(plane.values()))].rest
        title = ", ".join(f"{key}: {value}" for key, value in sorted(design)) or "baseline otherwise"
        drawn = heat_map("Gain in final test Pass@1", batches, rollouts, cells, ("B", "n"), zero, shown)
        found.append(Map(visible(title, 300), Markup(drawn)))
    return found
