"""Run folders as the trainer writes them, in which Pass@1 rises from about 0.35 to about 0.85."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from browser import HOSTILE


def make_run(
    folder: Path,
    rounds: int = 40,
    *,
    every: int = 10,
    questions: int = 200,
    hostile: bool = False,
    rollout_rounds: int | None = None,
    skip: tuple[str, ...] = (),
    max_rounds: int | None = None,
) -> Path:
    """A run folder as the trainer writes it, in which Pass@1 rises from about 0.35 to about 0.85."""
    rng = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    planned = rounds if max_rounds is None else max_rounds
    (folder / "config.yaml").write_text(
        f"model_name_or_path: demo-1M\ntask: arithmetic\nmax_rounds: {planned}\nbatch_size: 32\nnum_generations: 1\n"
        "learning_rate: 0.0001\nseed: 0\nobjective:\n  kind: reinforce\n  aggregation: token-mean\n"
    )
    lines = []
    for round_ in range(rounds + 1):
        share = 0.35 + 0.5 * (1 - math.exp(-4 * round_ / max(1, rounds)))
        line: dict[str, Any] = {"round": round_}
        if round_:
            hits = sum(rng.random() < share for _ in range(32)) / 32
            line |= {
                "reward": hits,
                "reward_std": math.sqrt(hits * (1 - hits)),
                "loss": 0.08 * hits * (1 + 0.3 * rng.gauss(0, 1)),
                "entropy": 0.6 * math.exp(-round_ / max(1, rounds)) + 0.03 * rng.gauss(0, 1),
                "kl": 0.0004 * round_ * rng.random(),
                "grad_norm": rng.uniform(0.3, 0.9),
                "learning_rate": 1e-4,
                "completions/mean_length": 12 + 14 * share + rng.gauss(0, 1),
                "completions/truncated_fraction": rng.random() / 20,
                "sampler_trainer_logprob_diff/mean": 1e-7 * rng.uniform(1, 3),
                "sampler_trainer_logprob_diff/max": 1e-6 * rng.uniform(1, 9),
                "rewards/exact": hits,
                "rewards/failures": 0,
                "tokens/generated": 700,
                "tokens/trained": int(700 * hits),
                "tokens/skipped": 700 - int(700 * hits),
                "tokens/scored": 700,
                "seconds/rollout": 0.12,
                "seconds/reward": 0.01,
                "seconds/update": 0.08,
                "seconds/round": 0.22,
            }
        if round_ % every == 0:
            for split, factor in (("train", 1.0), ("test", 0.97), ("longer", 0.35)):
                correct = round(questions * share * factor)
                line |= {
                    f"eval/{split}/pass@1": correct / questions,
                    f"eval/{split}/greedy": min(1.0, share * factor + 0.05),
                    f"eval/{split}/pass@8": min(1.0, share * factor + 0.2),
                    f"eval/{split}/mean_length": 12 + 14 * share,
                }
                write_evaluation(folder, round_, split, questions, correct, hostile)
            line["seconds/evaluate"] = 0.9
        lines.append(json.dumps({k: v for k, v in line.items() if k not in skip}))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    for round_ in range(1, (rounds if rollout_rounds is None else rollout_rounds) + 1):
        write_rollouts(folder, round_, rng, hostile)
    return folder


def write_evaluation(folder: Path, round_: int, split: str, questions: int, correct: int, hostile: bool) -> None:
    (folder / "evaluations").mkdir(exist_ok=True)
    prompts = [f"Add {q} and {q + 1}." + (HOSTILE[q % len(HOSTILE)] if hostile else "") for q in range(questions)]
    rewards = [float((q * 7919) % questions < correct) for q in range(questions)]
    texts = [
        (
            HOSTILE[(q + 1) % len(HOSTILE)]
            if hostile and q % 2
            else f"{q} + {q + 1}: carry the tens.\n#### {2 * q + 1 - (not r)}"
        )
        for q, r in enumerate(rewards)
    ]
    table = {
        "query": pa.array(range(questions), pa.int64()),
        "sample": pa.array([0] * questions, pa.int32()),
        "prompt": prompts,
        "completion": texts,
        "answer": [str(2 * q + 1) for q in range(questions)],
        "reward": rewards,
        "truncated": [False] * questions,
    }
    pq.write_table(pa.table(table), folder / "evaluations" / f"round-{round_:06d}-{split}.parquet")


def write_rollouts(folder: Path, round_: int, rng: random.Random, hostile: bool = False, count: int = 32) -> None:
    (folder / "rollouts").mkdir(exist_ok=True)
    rows = []
    for i in range(count):
        reward = float(rng.random() < 0.6)
        text = HOSTILE[i % len(HOSTILE)] if hostile else f"Step 1: {i} + {round_}.\nStep 2: carry.\n#### {i + round_}"
        length = rng.randint(4, 30)
        rows.append(
            {
                "round": round_,
                "query": rng.randrange(1000),
                "rollout": 0,
                "prompt": f"Add {i} and {round_}. {text[:9]}",
                "completion": text,
                "answer": None if i == 3 else str(i + round_),
                "reward": None if i == 5 else reward,
                "advantage": reward,
                "token_ids": list(range(length)),
                "logprobs": [-0.3] * length,
                "entropy": [0.4] * length,
                "truncated": i % 11 == 0,
            }
        )
    pq.write_table(pa.Table.from_pylist(rows), folder / "rollouts" / f"round-{round_:06d}.parquet")
