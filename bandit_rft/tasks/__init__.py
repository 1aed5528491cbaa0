"""Tasks: prompts, splits and rewards, by name. The libraries a task needs are imported when it is loaded."""

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bandit_rft.options import OptionModel
from bandit_rft.rewards.spec import RewardFunction, unknown_name
from bandit_rft.tasks.base import Example, Task, collate
from bandit_rft.tasks.checks import check_task
from bandit_rft.tasks.files import named_files

__all__ = ["TASKS", "Example", "Task", "collate", "load_task", "task_option_model"]

# Name -> module. These make their own examples, the others read them from a file, a folder or the hub.
GENERATED = {"arithmetic": "arithmetic", "countdown": "countdown", "reasoning_gym": "reasoning_gym"}
READ = {"gsm8k": "gsm8k", "math": "math_problems", "summarize": "summarize", "dataset": "dataset"}
#: Rows of what is loaded from the hub where no data_path is given, as far as they are known without asking.
HUB_SIZES = {
    "gsm8k": {"train": 7473, "test": 1319}, "math": {"train": 7500, "test": 5000},
    "summarize": {"train": 1992, "validation": 619, "test": 618},
}  # fmt: skip
SAME_AS_DATASET = ("jsonl", "json", "parquet", "csv")
TASKS = (*GENERATED, *READ)


def task_option_model(name: str) -> type[OptionModel] | None:
    """The options of a task with their rules, as its module declares them; None for a task that is not of ours."""
    key = "dataset" if _reads_a_dataset(name) else name.replace("-", "_")
    if key not in TASKS:
        return None
    module = importlib.import_module(f"bandit_rft.tasks.{(GENERATED | READ)[key]}")
    declared: type[OptionModel] = module.Options
    return declared


def _reads_a_dataset(name: str) -> bool:
    return name in SAME_AS_DATASET or "/" in name or Path(name).suffix in (".jsonl", ".json", ".parquet", ".csv")


def load_task(
    name: str,
    *,
    data_path: str | None = None,
    seed: int = 0,
    reward: Sequence[RewardFunction | Callable[..., Any] | str] | None = None,
    options: dict[str, Any] | None = None,
    evaluation_files: Sequence[str] = (),
) -> Task:
    """Load a task.

    Args:
        name: one of TASKS, or what "dataset" would take as data_path: a file (.jsonl, .json, .parquet, .csv) or a
            dataset of the Hugging Face hub as owner/name.
        data_path: a file, or a folder with train.jsonl and test.jsonl (or .json, .parquet, .csv); for "dataset" a
            dataset of the hub, too. Without it gsm8k, math and summarize are loaded from the hub.
        seed: of what a task draws: made examples, held-out rows.
        reward: replaces the task's rewards; each a function, or a text for RewardFunction.parse, such as
            "module.py:function".
        options: the task's own, see its module.
        evaluation_files: further splits to evaluate on, each a text "name=path". The task reads them as it reads its
            own files; one that makes its own examples reads them as "dataset" does.

    Raises:
        ValueError: naming the argument, for unknown names and options, missing files, columns or rewards, broken rows,
            answers of which none can earn the reward.
        ImportError: naming the extra, for a library that is not installed.
    """
    key = "dataset" if name in SAME_AS_DATASET else name.replace("-", "_")
    if key not in TASKS and ("/" in name or Path(name).suffix in (".jsonl", ".json", ".parquet", ".csv")):
        if data_path is not None:
            raise ValueError(f"data_path: not taken where the task is itself a path or dataset, {name!r}")
        key, data_path = "dataset", name
    if key not in TASKS:
        raise ValueError(unknown_name("task", name, TASKS))
    if isinstance(reward, str):
        reward = [reward]
    rewards = [RewardFunction.of(one) for one in reward or []]
    if key in GENERATED:
        if data_path is not None:
            raise ValueError(f"data_path: task {key!r} makes its own examples, got {data_path!r}")
        module = importlib.import_module(f"bandit_rft.tasks.{GENERATED[key]}")
        task: Task = module.load(seed, options or {})
    else:
        module = importlib.import_module(f"bandit_rft.tasks.{READ[key]}")
        task = module.load(data_path, seed, options or {})
    for split, path in named_files(evaluation_files).items():
        if split in task.splits:
            raise ValueError(f"evaluation.files: task {task.name!r} has a split {split!r}; give the file another name")
        task.splits[split] = _read_file(path, READ.get(key, "dataset"), seed, options or {}, key in READ)
    if rewards:
        task = Task(task.name, task.splits, rewards)
    if not task.rewards:
        raise ValueError(
            f"reward: task {task.name!r} brings none; give a list such as ['rewards.py:my_reward'], or a built-in: "
            "exact_match, gsm8k, math, math_verify, rouge_l, rouge_l_length_penalized"
        )
    if key in READ or evaluation_files:  # what a task makes itself is right by construction, and its tests say so
        check_task(task)
    return task


def _read_file(path: str, module: str, seed: int, options: dict[str, Any], own: bool) -> list[Example]:
    """The examples of one file, read as the task reads its own; of one that makes its own, as a dataset."""
    if not Path(path).expanduser().is_file():
        raise ValueError(f"evaluation.files: there is no file {path!r}")
    kept = {name: value for name, value in options.items() if own and name not in ("test_path", "test_size")}
    read = importlib.import_module(f"bandit_rft.tasks.{module}")
    try:
        splits: dict[str, list[Example]] = read.load(path, seed, kept).splits
    except ValueError as error:
        raise ValueError(f"evaluation.files, {path}: {error}") from error
    if not splits:
        raise ValueError(f"evaluation.files: {path} has no row with an answer")
    return next(iter(splits.values()))
