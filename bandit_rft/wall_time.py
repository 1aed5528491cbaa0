"""How long a run will take: two rounds and a small evaluation are timed, the rest is arithmetic."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from tempfile import TemporaryDirectory

from bandit_rft.budget import evaluation_count, evaluation_rollouts, planned_rounds
from bandit_rft.config import Config
from bandit_rft.progress import duration
from bandit_rft.records import Records
from bandit_rft.trainer import Trainer

#: Questions of a split that are evaluated, at least.
QUESTIONS = 16


class _NothingSaved(Records):
    """Of a folder that is thrown away."""

    def checkpoint(self) -> None:
        self.saved_round = self.trainer.round


class _Probe(Trainer):
    make_records = _NothingSaved


def probe_round(config: Config) -> Iterator[tuple[str, str]]:
    """Time two rounds and an evaluation of a few questions; (what, in words) of these and of the whole run.

    Args:
        config: of the run; its limits, the course of its learning rate, its trackers and its folder play no part.
    """
    e = config.evaluation
    samples = max(1, e.num_samples + e.greedy)
    few = max(QUESTIONS, config.rollout.batch_size // samples)
    with TemporaryDirectory(prefix="bandit-rft-probe-") as folder:
        small = replace(
            config, output_dir=folder, max_rounds=2, num_train_epochs=None, max_generated_tokens=None, max_seconds=None,
            save_steps=0, eval_steps=0, report_to=[], resume="never", lr_scheduler_type="constant", warmup_rounds=0,
            warmup_ratio=0.0, min_lr_ratio=0.0, lr_scheduler_rounds=None,
            evaluation=replace(e, max_queries=min(few, e.max_queries or few)),
        )  # fmt: skip
        trainer = _Probe(small)
        before, first, second = trainer.run()
    data = trainer.data
    sizes = [len(trainer.task.splits[prompts.name]) for prompts in data.evaluation]
    drawn, whole = sum(map(len, data.evaluation)) * samples, evaluation_rollouts(config, sizes)
    evaluating = before["seconds/evaluate"]
    # The first round loads what later ones have: only its check of the gradient counts.
    round_ = second["seconds/round"] - second["seconds/evaluate"] - (second.get("seconds/verify") or 0.0)
    verify = first.get("seconds/verify") or 0.0
    phases = ", ".join(
        f"{name} {second[f'seconds/{name}']:.2f}"
        for name in ("rollout", "reward", "update")
        if f"seconds/{name}" in second
    )
    yield "a round", f"{round_:.2f} s ({phases}), {second['tokens/generated']:,} tokens drawn"
    yield "evaluation", f"{drawn:,} completions in {evaluating:.2f} s; there are {whole:,} each time"
    rounds = planned_rounds(config, len(data.train))
    if config.max_generated_tokens is not None:
        rounds = min(rounds, math.ceil(config.max_generated_tokens / max(1, second["tokens/generated"])))
    if config.max_seconds is not None:
        rounds = min(rounds, math.ceil(config.max_seconds / round_))
    checks = 1 + (rounds - 1) // config.verify_steps if config.verify_steps and rounds else 0
    training, times = rounds * round_ + checks * verify, evaluation_count(config, rounds)
    evaluations = times * evaluating * whole / max(1, drawn)
    yield (
        "wall time",
        (
            f"about {duration(training + evaluations)}: {rounds:,} rounds {duration(training)}, {times:,} evaluations "
            f"{duration(evaluations)}; a prediction from two rounds, without checkpoints; completions may grow longer"
        ),
    )
