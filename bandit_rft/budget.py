"""How much a configuration asks for: rounds, rollouts of evaluation, the course of the learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bandit_rft.config import Config


def last_position(config: Config, prompts: int) -> int | None:
    """The place in the order of queries at which num_train_epochs are over; None without such a limit.

    A pass is the training prompts without the last partial batch; half a pass is half of these queries.

    Args:
        config: of the run.
        prompts: how many are trained on.
    """
    if config.num_train_epochs is None:
        return None
    length = prompts // config.batch_size * config.batch_size
    return math.ceil(round(config.num_train_epochs * length, 6))  # 0.1 * 30 is 3, not 3.0000000000000004


def planned_rounds(config: Config, prompts: int | None) -> int:
    """Rounds until max_rounds or num_train_epochs end the run, whichever comes first.

    An upper bound: dynamic sampling goes through the prompts faster, other limits may come before.

    Args:
        config: of the run.
        prompts: how many are trained on; None: unknown, and num_train_epochs is left out of account.
    """
    last = None if prompts is None else last_position(config, prompts)
    return config.max_rounds if last is None else min(config.max_rounds, math.ceil(last / config.batch_size))


def evaluation_count(config: Config, rounds: int) -> int:
    """How often a run of so many rounds evaluates: before training, every eval_steps rounds, at its end."""
    if rounds == 0:
        return 1
    return 1 + (math.ceil(rounds / config.eval_steps) if config.eval_steps else 1)


def evaluation_rollouts(config: Config, sizes: Iterable[int]) -> int:
    """Completions that one evaluation draws, of splits with so many questions each."""
    limit = config.evaluation.max_queries or math.inf
    questions = sum(int(min(size, limit)) for size in sizes)
    return questions * (config.evaluation.num_samples + config.evaluation.greedy)


def schedule_rounds(config: Config, rounds: int) -> tuple[int, int]:
    """(rounds of the learning rate's whole course, rounds of its warm-up) in a run of so many rounds."""
    course = config.lr_scheduler_rounds or rounds
    return course, config.warmup_rounds or math.ceil(round(config.warmup_ratio * course, 6))


def check_schedule(config: Config) -> None:
    """Raise ValueError where the learning rate's course cannot be known, or a key of it cannot act."""
    if config.warmup_rounds and config.warmup_ratio:
        raise ValueError("warmup_rounds and warmup_ratio are both given: choose one")
    falls = config.lr_scheduler_type != "constant"
    if config.min_lr_ratio and not falls:
        raise ValueError("min_lr_ratio has no effect with lr_scheduler_type=constant; choose linear or cosine")
    if not falls and not config.warmup_ratio:
        if config.lr_scheduler_rounds is not None:
            raise ValueError("lr_scheduler_rounds has no effect with a constant learning rate and no warmup_ratio")
        return
    by_tokens = config.max_generated_tokens is not None
    if config.lr_scheduler_rounds is None and (by_tokens or config.max_seconds is not None):
        what = f"lr_scheduler_type={config.lr_scheduler_type}" if falls else f"warmup_ratio={config.warmup_ratio:g}"
        limit = "max_generated_tokens" if by_tokens else "max_seconds"
        raise ValueError(
            f"{what} needs to know how many rounds there are, and {limit} leaves that open: give lr_scheduler_rounds"
        )
