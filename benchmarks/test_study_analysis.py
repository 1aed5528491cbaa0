"""The analysis of a study of 10,000 finished cells: at most 60 s of one core and 2 GiB, in a process of its own.

2 models x 2 tasks x 5 seeds x 500 levels; 100 rounds a cell, evaluated 3 times on 200 train and 200 test questions.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

LEVELS, SEEDS, QUESTIONS, ROUNDS, EVALUATED, TEMPLATES = 500, 5, 200, 100, (0, 50, 100), 64
ANALYSE = """
import json, resource, sys, time
start = time.perf_counter()
from bandit_rft.study.analyse import analyse_study
analysis = analyse_study(sys.argv[1])
wall, seconds = time.perf_counter() - start, time.process_time()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(json.dumps([len(analysis.study.cells), len(analysis.study.unused), len(analysis.results), wall, seconds, peak]))
"""


def fabricate(folder: Path) -> None:
    """Cells share the files of a few templates by hard links: what is read is the same as if they were their own."""
    rng, templates = np.random.default_rng(0), folder / "templates"
    templates.mkdir(parents=True)
    texts = {
        "prompt": ["What is 12 plus 34?" * 4] * QUESTIONS,
        "completion": ["12 + 34: carry.\n#### 46" * 4] * QUESTIONS,
    }
    for number in range(TEMPLATES):
        rewards = (rng.random(QUESTIONS) < 0.5).astype(float)
        whole = {
            "query": range(QUESTIONS),
            "sample": pa.array([0] * QUESTIONS, pa.int32()),
            **texts,
            "answer": ["46"] * QUESTIONS,
        }
        pq.write_table(
            pa.table({**whole, "reward": rewards, "truncated": [False] * QUESTIONS}), templates / f"{number}.parquet"
        )
    lines = []
    for round_ in range(ROUNDS + 1):
        line = {"round": round_, "tokens/generated": 384, "tokens/trained": 200, "seconds/round": 0.5}
        line |= {f"metric/{i}": rng.random() for i in range(24)}
        if round_ in EVALUATED:
            line |= {
                f"eval/{s}/{m}": rng.random()
                for s in ("train", "test")
                for m in ("pass@1", "pass@4", "entropy", "mean_length")
            }
        lines.append(json.dumps(line))
    (templates / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (templates / "cell.json").write_text(
        json.dumps({"status": "finished", "attempts": 1, "seconds": 60.0, "error": None})
    )
    plan = []
    for level in range(LEVELS):
        for condition in range(4):
            for seed in range(SEEDS):
                name = f"level-{level}-{condition}-{seed}"
                plan.append({
                    "id": name, "factor": f"factor {level // 10}", "level": str(level),
                    "model": f"model {condition // 2}", "task": f"task {condition % 2}", "seed": seed, "config": {},
                    "baseline": level == 0, "also": [],
                })  # fmt: skip
                home = folder / "cells" / name
                (home / "evaluations").mkdir(parents=True)
                for file in ("metrics.jsonl", "cell.json"):
                    os.link(templates / file, home / file)
                for round_ in EVALUATED:
                    for split in ("train", "test"):
                        target = home / "evaluations" / f"round-{round_:06d}-{split}.parquet"
                        os.link(templates / f"{rng.integers(TEMPLATES)}.parquet", target)
    (folder / "plan.json").write_text(json.dumps(plan))
    (folder / "study.yaml").write_text("name: large\nbudget: {rule: rounds, amount: 100}\n")


@pytest.mark.timeout(600)
def test_ten_thousand_cells(tmp_path: Path) -> None:
    fabricate(tmp_path)
    result = subprocess.run([sys.executable, "-c", ANALYSE, str(tmp_path)], capture_output=True, text=True, check=True)
    cells, unused, rows, wall, seconds, peak = json.loads(result.stdout)
    print(f"\n{cells:,} cells, {rows:,} rows: {seconds:.1f} s of one core, {wall:.1f} s by the clock, {peak:.2f} GiB")
    assert (cells, unused) == (10_000, 0)
    assert rows > 50_000
    assert seconds <= 60
    assert peak <= 2
