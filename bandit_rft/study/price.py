"""What a study costs, before it is run: tokens and GPU-hours of each cell, from the assumptions of its file."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from bandit_rft.advantages import ADVANTAGES
from bandit_rft.budget import evaluation_count, planned_rounds
from bandit_rft.options import nearest, read_value
from bandit_rft.study.plan import Plan, PlannedCell, StudyError

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
