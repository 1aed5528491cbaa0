"""Data and rewards, which a program may give where no configuration can name them: of use, and the same as before?"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from bandit_rft.config import Config, ConfigError
from bandit_rft.rewards import RewardFunction
from bandit_rft.rewards.session import code_digest
from bandit_rft.rewards.source import source_digest
from bandit_rft.rewards.spec import SESSION, given_in_python
from bandit_rft.tasks import Task, task_option_model

logger = logging.getLogger(__name__)


def check_use(task: Task, splits: Sequence[str], batch_size: int) -> None:
    """Refuse a task that lacks a split that is asked for, or has fewer training prompts than a batch (ConfigError)."""
    for name in ("train", *splits):
        if name not in task.splits:
            key = "evaluation.splits: " if name in splits else ""
            raise ConfigError(f"{key}{name!r} is none of the splits of task {task.name}: {', '.join(task.splits)}")
    if (size := len(task.splits["train"])) < batch_size:
        raise ConfigError(f"batch_size={batch_size} is more than the {size} training prompts")


def reward_records(task: Task, config: Config, *, in_python: bool) -> list[dict[str, Any]]:
    """What a checkpoint keeps of each reward.

    Args:
        task: as it is trained on.
        config: of the run; its weights come before the task's.
        in_python: whether a program gave the rewards, in place of the task's or the configuration's.

    Returns:
        For each its name, weight and options; "given": "session", a function that no other process can import,
        "python", another that a program gave, or "name"; "code": a digest, of a session's function by `code_digest`,
        of one in a file by `source_digest`, None of what comes with this package.
    """
    weights = config.reward.weights or task.reward_weights
    records = []
    for reward, weight in zip(task.rewards, weights, strict=False):  # a wrong number of weights is refused elsewhere
        assert isinstance(reward, RewardFunction)
        code = source_digest(reward) if reward.function is None else code_digest(reward.function)
        given = "session" if reward.function is not None else "python" if in_python else "name"
        options = json.loads(json.dumps(dict(reward.options), default=repr))
        records.append({"name": reward.name, "weight": weight, "options": options, "given": given, "code": code})
    return records


def reward_difference(before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> str | None:
    """Say how rewards differ from what a checkpoint keeps of them, naming the key; None if nothing does."""
    names = [[reward["name"] for reward in rewards] for rewards in (before, now)]
    if names[0] != names[1]:
        return f"reward.functions: {names[0]} -> {names[1]}"
    for old, new in zip(before, now, strict=True):
        moved = [reward["given"] == "session" for reward in (old, new)]
        if moved == [False, True]:
            return f"reward.functions: {new['name']} was named and is now a function given in Python"
        if moved[0] == moved[1] and _other_code(old["code"], new["code"]):
            return f"reward.functions: the code of {new['name']} is another"
        if old["options"] != new["options"]:
            return f"reward.functions: the options of {new['name']}: {old['options']} -> {new['options']}"
    weights = [[float(reward["weight"]) for reward in rewards] for rewards in (before, now)]
    return None if weights[0] == weights[1] else f"reward.weights: {weights[0]} -> {weights[1]}"


def _other_code(old: str | None, new: str | None) -> bool:
    """Whether two digests differ; those of two versions of Python say nothing."""
    if old is None or new is None:
        return False
    return old != new and old.partition(":")[0] == new.partition(":")[0]


def same_functions(old: Any, new: Any) -> bool:
    """Whether reward.functions names, by file, what was a function given in Python: as one of the same name."""
    if not (isinstance(old, list) and isinstance(new, list) and len(old) == len(new)):
        return False
    moved = [(a, b) for a, b in zip(old, new, strict=True) if a != b]
    same = all(
        a.startswith(SESSION) and not b.startswith(SESSION) and a.rpartition(":")[2] == b.rpartition(":")[2]
        for a, b in moved
    )
    if moved and same:
        logger.warning(
            "reward.functions: %s is taken for the function of that name that was given in Python", moved[0][1]
        )
    return same


def refuse_python_inputs(config: Config, file: str | Path | None, asked: Collection[str]) -> None:
    """Refuse the configuration of a run folder whose data or rewards a program gave, where no flag names others.

    Args:
        config: as it results from the file and the flags.
        file: it comes from; of another folder than a run's it is somebody's own, and left to the usual checks.
        asked: dotted keys that were given beside it.

    Raises:
        ConfigError: naming the flags that say it.
    """
    if file is None:
        return
    folder = Path(file).parent
    if not ((folder / "metrics.jsonl").is_file() or (folder / "checkpoints").is_dir()):
        return
    session = any(text.startswith(SESSION) for text in config.reward.functions)
    rewards = given_in_python(config.reward.functions) if session else ""
    rows = config.task == "dataset" and config.data_path is None
    if "task" not in asked and (rows or task_option_model(config.task) is None):
        also = "" if "reward.functions" in asked else f". {rewards}" if rewards else ", and rewards: --reward.functions"
        raise ConfigError(
            f"{file}: the data (task {config.task!r}) were given in Python, and the run folder does not hold them. "
            f"Name data: --task dataset --data_path FILE_OR_FOLDER{also}"
        )
    if rewards:
        raise ConfigError(f"{file}: {rewards}")


def saved_state(checkpoint: Path) -> dict[str, Any]:
    """What state.json of a checkpoint says, unchecked; {} where there is none, as in a model's folder."""
    try:
        state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}
