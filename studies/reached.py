"""Where each level's mean learning curve reaches the baseline's end, and what a round costs beside the baseline's.

python studies/reached.py studies/results/skipping-tokens

From curves.csv and costs.csv, over all models and tasks: a curve is taken as straight between its points.
"""

import csv
import math
import sys
from itertools import pairwise
from pathlib import Path

BASELINE = ("baseline", "baseline")


def pooled(path: Path) -> list[dict[str, str]]:
    """The rows over all models and tasks."""
    with path.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row["model"] == row["task"] == "all"]


def crossing(points: list[tuple[float, float]], height: float) -> float:
    """Where a curve first reaches a height; NaN if it does not."""
    for (x, y), (to_x, to_y) in pairwise(points):
        if y < height <= to_y:
            return x + (height - y) / (to_y - y) * (to_x - x)
    return math.nan


def reached(folder: Path) -> dict[tuple[str, str], dict[str, float]]:
    """Level -> test, train: tokens (or rounds) at the baseline's final Pass@1, NaN where it is not reached; `cost`."""
    curves: dict[tuple[str, str], dict[str, list[tuple[float, float]]]] = {}
    for row in pooled(folder / "curves.csv"):
        place = next(float(row[name]) for name in ("tokens", "round", "seconds") if name in row)
        points = curves.setdefault((row["factor"], row["level"]), {}).setdefault(row["split"], [])
        points.append((place, float(row["value"])))
    rows = pooled(folder / "costs.csv")
    costs = {(row["factor"], row["level"]): float(row["tokens_generated"]) / float(row["rounds"]) for row in rows}
    found: dict[tuple[str, str], dict[str, float]] = {}
    for level, of_level in curves.items():
        found[level] = {"cost": costs[level] / costs[BASELINE]}
        for split, points in of_level.items():
            found[level][split] = crossing(points, curves[BASELINE][split][-1][1])
    return found


if __name__ == "__main__":
    print(f"{'level':<32} {'test':>8} {'train':>8}  tokens a round / the baseline's")
    for (factor, level), values in reached(Path(sys.argv[1])).items():
        print(f"{factor + ', ' + level:<32} {values['test']:8.0f} {values['train']:8.0f}  {values['cost']:.2f}")
