"""Recompute a study's gains from cells.npz with NumPy alone, and compare them with its results.csv.

    python studies/recompute.py studies/results/NAME

An independent check: it imports nothing of bandit_rft and was written from docs/study.md. For every configuration,
final Pass@1 and the area under the curve, train and test, each condition and the mean over conditions: gain, standard
error and degrees of freedom with and without the floor, 95% interval, p-value, Holm's p-value. Exits with 1 where a
number differs by more than 1e-6 and what rounding to six significant digits, as results.csv has them, can do, is
unknown on one side alone, or is not there.
"""

import csv
import json
import math
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

COLUMNS = ("gain", "error", "degrees", "runs_error", "runs_degrees", "low", "high", "p", "p_holm")
TOLERANCE, ROUNDING = 1e-6, 5.1e-6


def read_cells(folder):
    """Every used cell: its places, condition, seed, and {split: (asked, final [Q], area [Q])}."""
    with np.load(folder / "cells.npz", allow_pickle=False) as archive:
        study = json.loads(archive["description"].tobytes())
        bits, numbers, queries = archive["bits"], archive["numbers"], archive["queries"]
    cells = []
    for entry in study["cells"]:
        if "evaluations" not in entry:
            continue
        spent = {round_: used for round_, used in entry["progress"]}
        found = {}
        for split, block in entry["evaluations"].items():
            count, at = math.prod(block["shape"]), block["at"]
            if block["in"] == "bits":
                values = np.unpackbits(bits[at : at + (count + 7) // 8])[:count].astype(float)
            else:
                values = numbers[at : at + count].astype(float)
            by_round = values.reshape(block["shape"]).mean(2)  # all samples of a question
            x = np.array([spent[round_] for round_ in block["rounds"]], dtype=float)
            area = by_round[-1]
            if x[-1] > x[0]:
                area = ((by_round[1:] + by_round[:-1]) / 2 * np.diff(x)[:, None]).sum(0) / (x[-1] - x[0])
            places = queries[block["queries"] : block["queries"] + block["shape"][1]]
            found[split] = {"asked": block["asked"], "queries": places, "final": by_round[-1], "auc": area}
        cells.append(
            {
                "levels": [tuple(place) for place in entry["places"]],
                "condition": (entry["model"], entry["task"]),
                "seed": entry["seed"],
                "run_seed": entry["config"].get("seed", entry["seed"]),
                "baseline": entry["baseline"],
                "splits": found,
            }
        )
    return study, cells


def student(degrees, t):
    """P(T <= t), by the continued fraction of the incomplete beta function (Lentz)."""
    if t == 0:
        return 0.5
    x, a, b = degrees / (degrees + t * t), degrees / 2, 0.5
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))

    def fraction(x, a, b):
        tiny = 1e-300
        c, d = 1.0, 1 - (a + b) * x / (a + 1)
        d = 1 / (d if abs(d) > tiny else tiny)
        h = d
        for m in range(1, 2000):
            for step in (
                m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
                -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
            ):
                d, c = 1 + step * d, 1 + step / c
                d, c = 1 / (d if abs(d) > tiny else tiny), c if abs(c) > tiny else tiny
                h *= d * c
            if abs(d * c - 1) < 1e-15:
                break
        return h

    tail = front * fraction(x, a, b) / a if x < (a + 1) / (a + b + 2) else 1 - front * fraction(1 - x, b, a) / b
    return 1 - tail / 2 if t > 0 else tail / 2


def quantile(degrees, level):
    """The t with student(degrees, t) = level, by bisection."""
    low, high = 0.0, 1e4
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if student(degrees, middle) < level else (low, middle)
    return (low + high) / 2


def estimate(pairs, split, metric, shared):
    """Gain, and errors and degrees with and without the floor.

    Of the mean over conditions of pairs {condition: [(level cell, baseline cell)]}.
    """
    weight = 1 / len(pairs)
    groups = defaultdict(list)  # what is averaged question by question: the same questions, or the same luck
    for condition, of_condition in pairs.items():
        rows, asked = [], []
        common = None
        for a, b in of_condition:
            for cell in (a, b):
                places = cell["splits"][split]["queries"]
                common = places if common is None else np.intersect1d(common, places)
        for a, b in of_condition:
            sides = [
                cell["splits"][split][metric][np.searchsorted(cell["splits"][split]["queries"], common)]
                for cell in (a, b)
            ]
            rows.append(sides[0] - sides[1])
            asked.append(b["splits"][split]["asked"])
        crossed = len(set(asked)) == 1
        key = (condition[1], tuple(asked[:1]) if crossed else tuple(asked))
        groups[key if crossed or shared else (key, condition)].append((condition, common, np.array(rows), crossed))
    gain, rows_of, columns_of, rest, rest_spread, own, own_spread = 0.0, defaultdict(float), {}, 0.0, 0.0, 0.0, 0.0
    fewest = min(len(of_condition) for of_condition in pairs.values())
    for key, members in groups.items():
        common = members[0][1]
        for _, places, _, _ in members[1:]:
            common = np.intersect1d(common, places)
        cut = [(condition, d[:, np.searchsorted(places, common)], crossed) for condition, places, d, crossed in members]
        if shared:
            cut = [("all", sum(d for _, d, _ in cut) / len(cut), cut[0][2])]
        each = weight * len(members) / len(cut)
        for condition, d, crossed in cut:
            seeds, questions = d.shape
            rows, columns, mean = d.mean(1), d.mean(0), d.mean()
            gain += each * mean
            rows_of[condition] = rows_of[condition] + each * rows
            if questions < 2:
                continue
            if crossed:
                columns_of[key] = columns_of.get(key, 0) + each * columns
                if seeds > 1:
                    left = d - rows[:, None] - columns[None, :] + mean
                    square = (left**2).sum() / ((seeds - 1) * (questions - 1))
                    part = each**2 * square / (seeds * questions)
                    rest += part
                    rest_spread += part**2 / ((seeds - 1) * (questions - 1))
            else:
                square = ((d - rows[:, None]) ** 2).sum() / (seeds * (questions - 1))
                part = each**2 * square / (seeds * questions)
                own += part
                own_spread += part**2 / (seeds * (questions - 1))
    if fewest < 2:
        return gain, [(math.nan, 1.0)] * 2  # one seed: no interval
    of_seeds = [(r.var(ddof=1) / len(r), len(r) - 1) for r in rows_of.values()]
    of_questions = [(c.var(ddof=1) / len(c), len(c) - 1) for c in columns_of.values()]
    a, b, floor = sum(v for v, _ in of_seeds), sum(v for v, _ in of_questions), rest + own
    spread = sum(v**2 / f for v, f in of_seeds) + sum(v**2 / f for v, f in of_questions) + rest_spread
    estimates = []
    for runs, squares in ((max(a, floor), spread + (rest_spread + own_spread if a < floor else 0)), (a, spread)):
        variance = runs + max(0.0, b - rest)
        estimates.append((math.sqrt(variance), max(variance**2 / squares if squares > 0 else 0.0, fewest - 1)))
    return gain, estimates


def holm(values):
    """Adjusted p-values, in the order given."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    adjusted, largest = [0.0] * len(values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, values[i] * (len(values) - rank)))
        adjusted[i] = largest
    return adjusted


def recompute(folder):
    """{(factor, level, metric, split, model, task): {column: number}} of every distinct configuration."""
    _, cells = read_cells(folder)
    conditions = list(dict.fromkeys(cell["condition"] for cell in cells))
    baselines = {(c["condition"], c["seed"]): c for c in cells if c["baseline"]}
    run_seeds = defaultdict(set)
    for cell in cells:
        run_seeds[cell["seed"]].add(cell["run_seed"])
    shared = len(conditions) > 1 and all(len(seeds) == 1 for seeds in run_seeds.values())
    levels = defaultdict(dict)
    for cell in cells:
        if not cell["baseline"]:
            levels[cell["levels"][0]][cell["condition"], cell["seed"]] = cell
    found = {}
    for metric in ("final", "auc"):
        for split in ("train", "test"):
            for scope in (None, *conditions):
                family = {}
                for level, of_level in levels.items():
                    pairs = defaultdict(list)
                    for condition, seed in sorted(of_level.keys() & baselines.keys(), key=lambda key: key[1]):
                        if scope in (None, condition):
                            pairs[condition].append((of_level[condition, seed], baselines[condition, seed]))
                    if shared and pairs:
                        every = set.intersection(*({a["seed"] for a, _ in of} for of in pairs.values()))
                        pairs = {c: [p for p in of if p[0]["seed"] in every] for c, of in pairs.items()}
                        pairs = pairs if every else {}
                    if pairs:
                        pairs = {c: pairs[c] for c in conditions if c in pairs}
                        family[level] = estimate(pairs, split, metric, shared)
                model, task = scope or ("all", "all")
                for level, (gain, estimates) in family.items():
                    (error, degrees), (runs_error, runs_degrees) = estimates
                    row = dict.fromkeys(COLUMNS, math.nan) | {"gain": gain, "error": error, "degrees": degrees}
                    row |= {"runs_error": runs_error, "runs_degrees": runs_degrees}
                    if error > 0:  # of the two estimates, what says less
                        known = [(e, f) for e, f in estimates if e > 0]
                        half = max(quantile(f, 0.975) * e for e, f in known)
                        row |= {"low": gain - half, "high": gain + half}
                        row["p"] = max(2 * student(f, -abs(gain) / e) for e, f in known)
                    elif error == 0 and gain == 0:
                        row["p"] = 1.0
                    found[(*level, metric, split, model, task)] = row
    families = defaultdict(list)
    for key in found:
        families[key[2], key[3], key[4] == "all"].append(key)
    for keys in families.values():
        values = [1.0 if math.isnan(found[key]["p"]) else found[key]["p"] for key in keys]
        for key, value in zip(keys, holm(values), strict=True):
            found[key]["p_holm"] = math.nan if math.isnan(found[key]["p"]) else value
    return found


def main(folder):
    """Compare and print how many numbers agree."""
    found, differing, compared = recompute(folder), [], 0
    missing = set(found)
    with (folder / "results.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            key = tuple(row[name] for name in ("factor", "level", "metric", "split", "model", "task"))
            if key not in found:
                continue
            missing.discard(key)
            for column in COLUMNS:
                if column in ("low", "high") and found[key]["error"] == 0:  # docs/study.md: a bound, from runs alone
                    continue
                compared += 1
                ours, theirs = found[key][column], float(row[column] or "nan")
                unknown = math.isnan(ours) and math.isnan(theirs)
                if not unknown and not abs(ours - theirs) <= TOLERANCE + ROUNDING * abs(theirs):
                    differing.append(f"{'/'.join(key)} {column}: {ours!r} here, {theirs!r} in results.csv")
    differing += [f"{'/'.join(key)} is not in results.csv" for key in sorted(missing)]
    print(f"{compared} numbers of {len(found)} rows compared, {len(differing)} differ by more than {TOLERANCE:g}")
    print("\n".join(differing[:20]))
    return compared, differing


if __name__ == "__main__":
    compared, differing = main(Path(sys.argv[1]))
    sys.exit(1 if differing or not compared else 0)
