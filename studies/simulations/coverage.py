"""Coverage and family-wise error of the study's intervals, by simulating whole studies; writes coverage.md beside it.

    python studies/simulations/coverage.py

K levels against one shared baseline, all without effect; the runs' luck, differences between questions and between
models, noise, runs that collapse. What a study computes from rewards is drawn here as the mean squares themselves
(chi-square where the parts are normal), so that ten thousand studies take seconds. Layouts:

- shared, crossed: all conditions have the same seeds, all runs of a task the same questions (files of questions);
- shared, own questions: the same seeds, questions made from the seed (the tiny study);
- own seeds: every condition has seeds of its own, and each run its own questions (studies of `paper-rounds`).
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bandit_rft.study.statistics import Contrast, Part, combine, holm, p_value, t_interval

STUDIES, AT_ONCE = 2000, 500
QUESTIONS, TASKS = 150, 2
NOISE = 0.3  # of one question in one run, four samples averaged
COLLAPSE = -0.3  # of Pass@1, in a run that collapses
Values = NDArray[np.float64]


@dataclass(frozen=True)
class Truth:
    """What varies: between runs (sd), between questions of a level (sd), and how."""

    name: str
    runs: float = 0.03
    questions: float = 0.1
    collapsing: float = 0.0
    heavy: bool = False
    unequal: bool = False  # models whose runs vary 0.4, 1 and 1.8 times as much


TRUTHS = [
    Truth("runs differ", questions=0.0),
    Truth("runs and questions differ"),
    Truth("questions differ, runs hardly", 0.003, 0.2),
    Truth("nothing but noise", 0.0, 0.0),
    Truth("10% of the runs collapse", collapsing=0.1),
    Truth("20% of the runs collapse", collapsing=0.2),
    Truth("heavy tails (t with 3 degrees)", heavy=True),
    Truth("models vary unequally", unequal=True),
]
LAYOUTS = {"shared, crossed": 6, "shared, own questions": 6, "own seeds": 12}  # conditions
SIZES = [(15, 3), (15, 5), (15, 10), (15, 20), (30, 5), (30, 10)]  # levels, seeds


def simulate(rng: np.random.Generator, truth: Truth, layout: str, levels: int, seeds: int) -> Contrast:
    """AT_ONCE studies, [AT_ONCE, levels]."""
    conditions = LAYOUTS[layout]
    models, weight = conditions // TASKS, 1 / conditions
    shape = (AT_ONCE, levels + 1, conditions, seeds)  # side 0 is the baseline
    luck = rng.standard_t(3, shape) / np.sqrt(3) if truth.heavy else rng.standard_normal(shape)
    scale = np.resize([0.4, 1.0, 1.8], conditions) if truth.unequal else np.ones(conditions)
    luck = truth.runs * scale[:, None] * luck + COLLAPSE * (rng.random(shape) < truth.collapsing)
    pair = (AT_ONCE, levels)
    questions, crossed, within = list[Part](), list[Part](), list[Part]()
    if layout == "shared, crossed":
        grand = NOISE / np.sqrt(seeds * QUESTIONS) * rng.standard_normal((*shape[:3], 1))
        rows = NOISE / np.sqrt(QUESTIONS) * rng.standard_normal(shape)
        runs = luck + rows - rows.mean(-1, keepdims=True) + grand
        own = truth.questions * rng.standard_normal((AT_ONCE, levels + 1, TASKS, QUESTIONS), dtype=np.float32)
        noise = rng.standard_normal(own.shape, dtype=np.float32) * (NOISE / np.sqrt(seeds * models))
        columns = (
            own + noise - noise.mean(-1, keepdims=True) + grand.reshape(*shape[:2], models, TASKS).mean(2)[..., None]
        )
        columns = (columns[:, 1:] - columns[:, :1]) * (models * weight)
        questions = [Part(columns[:, :, t].var(-1, ddof=1) / QUESTIONS, QUESTIONS - 1) for t in range(TASKS)]
        runs = runs + np.tile(own.mean(-1), (1, 1, models))[..., None]
        freedom = (seeds - 1) * (QUESTIONS - 1)
        for _ in range(conditions):
            square = 2 * NOISE**2 * rng.chisquare(freedom, pair) / freedom
            crossed.append(Part(weight**2 * square / (seeds * QUESTIONS), freedom))
    else:
        variance = truth.questions**2 + NOISE**2
        runs = luck + np.sqrt(variance / QUESTIONS) * rng.standard_normal(shape)
        freedom = seeds * (QUESTIONS - 1)
        for _ in range(conditions):
            square = 2 * variance * rng.chisquare(freedom, pair) / freedom
            within.append(Part(weight**2 * square / (seeds * QUESTIONS), freedom))
    difference = runs[:, 1:] - runs[:, :1]
    if layout == "own seeds":
        parts = [Part(weight**2 * difference[:, :, c].var(-1, ddof=1) / seeds, seeds - 1) for c in range(conditions)]
    else:
        parts = [Part(difference.mean(2).var(-1, ddof=1) / seeds, seeds - 1)]
    return combine(difference.mean((2, 3)), parts, questions, crossed, within, seeds)


def rates(truth: Truth, layout: str, levels: int, seeds: int, studies: int) -> tuple[float, float]:
    """Share of 95% intervals that hold 0, and of studies in which any level is found after Holm's correction."""
    rng = np.random.default_rng([len(truth.name), levels, seeds, len(layout)])
    covered, found = [], []
    for _ in range(max(1, studies // AT_ONCE)):
        drawn = simulate(rng, truth, layout, levels, seeds)
        low, high = t_interval(drawn.gain, drawn.spread)
        covered.append(((low <= 0) & (high >= 0)).mean())
        p = p_value(drawn.gain, drawn.spread)
        found.append(np.mean([(holm(row) <= 0.05).any() for row in p]))
    return float(np.mean(covered)), float(np.mean(found))


def table(studies: int = STUDIES) -> str:
    """Every layout, truth and size as Markdown; what leaves 0.93 to 0.97 or exceeds 0.055 is bold."""
    lines = []
    for layout in LAYOUTS:
        lines += [f"## {layout}, {LAYOUTS[layout]} conditions", "", "| what varies | " + " | ".join(
            f"K = {k}, S = {s}" for k, s in SIZES) + " |", "|---|" + "---|" * len(SIZES)]  # fmt: skip
        for truth in TRUTHS:
            cells = []
            for levels, seeds in SIZES:
                covered, error = rates(truth, layout, levels, seeds, studies)
                first = f"{covered:.3f}" if 0.93 <= covered <= 0.97 else f"**{covered:.3f}**"
                cells.append(f"{first}, {error:.3f}" if error <= 0.055 else f"{first}, **{error:.3f}**")
            lines.append(f"| {truth.name} | " + " | ".join(cells) + " |")
            print(lines[-1], file=sys.stderr, flush=True)
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Write coverage.md."""
    start = time.perf_counter()
    body = table()
    head = (
        "# Coverage and family-wise error\n\nMade by `python studies/simulations/coverage.py`: "
        f"{STUDIES:,} simulated studies a cell, no level with an effect. First number: share of nominal 95% intervals "
        "that hold the true gain; second: share of studies in which any of K levels is found after Holm's correction "
        "(nominal 0.05). K levels, S seeds a condition. Bold: outside 0.93 to 0.97, or above 0.055.\n\n"
    )
    Path(__file__).with_name("coverage.md").write_text(head + body, encoding="utf-8")
    print(f"{time.perf_counter() - start:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
