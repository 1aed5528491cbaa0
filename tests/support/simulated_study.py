"""Study folders as `bandit-rft study run` leaves them, with effects that are known because they were planted."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

Place = tuple[str, str]

#: The paper's factors in small: (factor, level) -> (planted gain on train and on test, overrides).
PAPER_LIKE: dict[Place, tuple[float, float, dict[str, Any]]] = {
    ("advantage", "8 rollouts, train on 1"): (0.01, 0.0, {"advantage": "extra_rollouts", "num_generations": 8}),
    ("rollouts", "n=8"): (0.06, 0.03, {"advantage": "group_norm", "num_generations": 8, "batch_size": 32}),
    ("rollouts", "n=16"): (0.08, 0.05, {"advantage": "group_norm", "num_generations": 16, "batch_size": 32}),
    ("batch", "B=64"): (0.07, 0.04, {"advantage": "group_norm", "num_generations": 8, "batch_size": 64}),
    ("trade-off", "(16, 16)"): (0.05, 0.02, {"advantage": "group_norm", "num_generations": 16, "batch_size": 16}),
    ("trade-off", "(64, 4)"): (0.02, 0.0, {"advantage": "group_norm", "num_generations": 4, "batch_size": 64}),
    ("trade-off", "(128, 2)"): (-0.1, -0.12, {"advantage": "group_norm", "num_generations": 2, "batch_size": 128}),
    ("replay", "(64, 4)"): (0.05, 0.03, {"advantage": "history_norm", "num_generations": 4, "batch_size": 64}),
    ("replay", "(128, 2)"): (0.04, 0.03, {"advantage": "history_norm", "num_generations": 2, "batch_size": 128}),
    ("replay", "(256, 1)"): (0.0, 0.0, {"advantage": "history_norm", "num_generations": 1, "batch_size": 256}),
}  # fmt: skip


def make_study(
    folder: Path,
    levels: Mapping[Place, tuple[float, float, dict[str, Any]]] = PAPER_LIKE,
    *,
    models: Sequence[str] = ("models/llama-tiny", "models/qwen3-tiny"),
    tasks: Sequence[str] = ("arithmetic", "countdown"),
    seeds: int = 5,
    questions: int = 150,
    evaluations: Sequence[int] = (0, 10, 20),
    also: Mapping[Place, Sequence[Place]] | None = None,
    problems: Mapping[str, str] | None = None,
    hostile: str = "",
    seed_effect: float = 0.02,
    rule: str = "rounds",
) -> Path:
    """Write a study; `problems` maps a cell id to the status (failed, running) that it gets instead of its results."""
    baseline = {("baseline", "baseline"): (0.0, 0.0, {"advantage": "reward", "num_generations": 1, "batch_size": 32})}
    also, problems = also or {("rollouts", "n=8"): [("batch", "B=32"), ("trade-off", "(32, 8)")]}, problems or {}
    also = {**also, ("baseline", "baseline"): [("rollouts", "n=1")]}
    plan = []
    for place, (train_gain, test_gain, config) in {**baseline, **levels}.items():
        for model in models:
            for task in tasks:
                for seed in range(seeds):
                    name = "-".join("".join(c if c.isalnum() else "_" for c in part) for part in (*place, model, task))
                    entry = {
                        "id": f"{name}-s{seed}", "factor": place[0] + hostile, "level": place[1] + hostile,
                        "model": model + hostile, "task": task, "seed": seed, "config": config,
                        "baseline": place == ("baseline", "baseline"),
                        "also": [[factor + hostile, level + hostile] for factor, level in also.get(place, ())],
                    }  # fmt: skip
                    plan.append(entry)
                    status = problems.get(entry["id"], "finished")
                    _cell(
                        folder,
                        entry,
                        {"train": train_gain, "test": test_gain},
                        questions,
                        evaluations,
                        status,
                        seed_effect,
                    )
    (folder / "plan.json").write_text(json.dumps(plan))
    (folder / "study.yaml").write_text(
        f"name: simulated\nbudget:\n  rule: {rule}\n  amount: {evaluations[-1]}\nseeds: {seeds}\n"
        f"note: {json.dumps(hostile)}\n"
    )
    return folder


def _cell(
    folder: Path, entry: dict[str, Any], gains: dict[str, float], questions: int, evaluations: Sequence[int],
    status: str, seed_effect: float,
) -> None:  # fmt: skip
    home = folder / "cells" / entry["id"]
    (home / "evaluations").mkdir(parents=True)
    rng = np.random.default_rng(zlib.crc32(entry["id"].encode()))
    luck = seed_effect * rng.standard_normal()
    record = {"status": status, "attempts": 1, "seconds": 10 + rng.random(), "host": "here", "error": None}
    if status == "failed":
        record["error"] = "Traceback (most recent call last):\nRuntimeError: <b>out of memory</b>"
    (home / "cell.json").write_text(json.dumps(record))
    config = {**entry["config"], "model_name_or_path": entry["model"], "task": entry["task"], "seed": entry["seed"]}
    (home / "config.yaml").write_text(json.dumps(config))
    if status != "finished":
        return
    lines: list[dict[str, Any]] = []
    n, batch = entry["config"].get("num_generations", 1), entry["config"].get("batch_size", 32)
    for round_ in range(evaluations[-1] + 1):
        tokens = n * batch * 12
        line = {"round": round_} | ({"tokens/generated": tokens, "tokens/trained": tokens // 2} if round_ else {})
        line["seconds/round"] = 0.1 * (1 + rng.random())
        if round_ in evaluations:
            done = round_ / evaluations[-1]
            for split, gain in gains.items():
                shared = np.random.default_rng([zlib.crc32(f"{entry['task']} {split}".encode())])
                ability, size = shared.uniform(0.1, 0.6, questions), questions
                noise = np.random.default_rng([zlib.crc32(f"{entry['task']} {split}".encode()), entry["seed"]])
                chance = ability + done * (0.15 + gain + luck)
                rewards = (noise.random(size) < chance).astype(float)
                rewards = np.where(rng.random(size) < 0.7, rewards, rng.random(size) < chance)
                rewards = rewards.astype(float) if round_ else (noise.random(size) < ability).astype(float)
                line |= {
                    f"eval/{split}/pass@1": rewards.mean(), f"eval/{split}/pass@4": min(1.0, rewards.mean() + 0.2),
                    f"eval/{split}/entropy": 0.9 - 0.4 * done + 0.01 * rng.standard_normal(),
                }  # fmt: skip
                table = {
                    "query": pa.array(range(size), pa.int64()), "sample": pa.array([0] * size, pa.int32()),
                    "prompt": ["What?"] * size, "completion": ["That."] * size, "answer": ["1"] * size,
                    "reward": rewards, "truncated": [False] * size,
                }  # fmt: skip
                pq.write_table(pa.table(table), home / "evaluations" / f"round-{round_:06d}-{split}.parquet")
            line["seconds/evaluate"] = 0.05
        lines.append(line)
    (home / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
