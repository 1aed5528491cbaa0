"""A run as a script or a notebook asks for it: a model, data, rewards and keys of the configuration, by keyword.

What comes of it is what the command line would make: a `Config`, and what no configuration can name (a model in memory,
a task, functions). Everything is checked here, before anything is loaded that takes long.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from typing import Any, NamedTuple, TypeAlias

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from bandit_rft.config import Config, ConfigError, build_config, check_config
from bandit_rft.inputs import check_use, reward_records
from bandit_rft.launched import launched_rank
from bandit_rft.listener import Listener, Listeners
from bandit_rft.model import Policy
from bandit_rft.rewards import RewardFunction
from bandit_rft.rewards.session import reward_text
from bandit_rft.rewards.spec import RewardError
from bandit_rft.tasks import Task, load_task
from bandit_rft.tasks.checks import check_task
from bandit_rft.tasks.dataset import examples_of

Model: TypeAlias = "str | PathLike[str] | PreTrainedModel | Policy"
Reward: TypeAlias = "RewardFunction | Callable[..., Any] | str"
Rows: TypeAlias = "Iterable[Mapping[str, Any]]"


class Run(NamedTuple):
    """What a Trainer is made of; no policy where the configuration names it."""

    config: Config
    listener: Listener
    task: Task
    rewards: list[dict[str, Any]]  # what a checkpoint keeps of them
    policy: Policy | None = None
    shows: Callable[[], contextlib.AbstractContextManager[object]] = (
        contextlib.nullcontext
    )  # open while the run goes on


def make_run(
    config: Config | None, listener: Listener | None, *, model: Model | None, tokenizer: PreTrainedTokenizerBase | None,
    task: Task | str | None, train_dataset: Rows | None, eval_dataset: Rows | Mapping[str, Rows] | None,
    reward_funcs: Reward | Sequence[Reward] | None, reward_weights: Sequence[float] | None, progress: bool,
    keys: Mapping[str, Any],
) -> Run:  # fmt: skip
    """What `Trainer(...)` is made of; see there for the arguments.

    Raises:
        ConfigError, ValueError, TypeError: naming the argument and what was expected.
    """
    if config is not None:
        given = {"train_dataset": train_dataset, "eval_dataset": eval_dataset, "reward_funcs": reward_funcs}
        _refuse_beside_config(**given, reward_weights=reward_weights, **keys)
        return _from_config(config, listener, model, tokenizer, task)
    given = dict(keys)
    policy, rewards = _policy(model, tokenizer, given), _rewards(reward_funcs, given)
    _name_task(task, train_dataset, eval_dataset, given)
    config = build_config(given, check=False)
    if not config.task:
        raise ConfigError("task or train_dataset must be given (or preset='demo', which names both model and task)")
    if policy is None and not config.model_name_or_path:
        raise ConfigError("model must be given: a folder, a hub name, a transformers model or a Policy")
    _say_what_cannot_act(config, task, train_dataset)
    made = _task(task, train_dataset, eval_dataset, rewards or config.reward.functions, config)
    if reward_weights is not None:
        weights = [float(weight) for weight in reward_weights]
        if len(weights) != len(made.rewards):
            raise ValueError(f"reward_weights: expected {len(made.rewards)}, one a reward, got {len(weights)}")
        config = replace(config, reward=replace(config.reward, weights=weights))
    return _watched(_run(config, listener, made, policy, in_python=bool(rewards)), progress)


def _say_what_cannot_act(config: Config, task: Any, train: Rows | None) -> None:
    """Refuse, or warn of, keys that only act on a run that the command line starts."""
    _refuse_files(config, task, train)
    if config.thread_wait != "bounded":
        warnings.warn(
            f"thread_wait={config.thread_wait} acts on bandit-rft's commands alone: torch is imported already. Set "
            "OMP_WAIT_POLICY in the environment before Python starts",
            stacklevel=4,
        )


def _refuse_files(config: Config, task: Any, train: Rows | None = None) -> None:
    """Refuse evaluation.files where no task reads them (ConfigError)."""
    if config.evaluation.files and (train is not None or isinstance(task, Task)):
        where = "eval_dataset={name: rows}" if train is not None else "splits of the Task"
        raise ConfigError(
            f"evaluation.files={config.evaluation.files} cannot act here: a named task reads such files. "
            f"Give further splits as {where}"
        )


def _from_config(
    config: Config, listener: Listener | None, model: Model | None, tokenizer: PreTrainedTokenizerBase | None,
    task: Task | str | None,
) -> Run:  # fmt: skip
    """A configuration, maybe with the model or the task of a program."""
    if not isinstance(config, Config):
        raise TypeError(
            f"config must be a Config; got {type(config).__name__} (keys go by keyword: learning_rate=1e-5)"
        )
    for name, value in (("model", model), ("task", task)):
        if isinstance(value, str | PathLike):
            raise TypeError(f"{name}={str(value)!r} beside a config: the config names it")
    if model is None and task is None:
        check_config(config)
    _refuse_files(config, task)
    policy = None
    if model is not None:
        policy = Policy.of(model, tokenizer)  # type: ignore[arg-type]
        config = replace(config, **_place(policy, vars(config)))  # type: ignore[arg-type]
    made = _task(task, None, None, config.reward.functions, config)
    return _run(config, listener, made, policy, in_python=False)


def _run(config: Config, listener: Listener | None, task: Task, policy: Policy | None, *, in_python: bool) -> Run:
    """The parts together; `in_python` as in reward_records."""
    check_use(task, config.evaluation.splits, config.batch_size)
    return Run(config, listener or Listener(), task, reward_records(task, config, in_python=in_python), policy)


def _refuse_beside_config(**given: Any) -> None:
    """Refuse keywords that would say something else than the configuration beside them (TypeError)."""
    if said := [name for name, value in given.items() if value is not None]:
        raise TypeError(f"{', '.join(said)}: a config is given, which says everything; leave them out, or the config")


def _policy(model: Model | None, tokenizer: PreTrainedTokenizerBase | None, keys: dict[str, Any]) -> Policy | None:
    """A model in memory as a Policy; the name of another goes to the configuration."""
    if model is None or isinstance(model, str | PathLike):
        if tokenizer is not None:
            raise TypeError("tokenizer goes with a model in memory; a model that is named brings its own")
        if model is not None:
            if keys.get("model_name_or_path") not in (None, str(model)):
                raise TypeError(f"model and model_name_or_path name two: {model} and {keys['model_name_or_path']}")
            keys["model_name_or_path"] = str(model)
        return None
    policy = Policy.of(model, tokenizer)
    if policy.tokenizer is None:
        raise ValueError(
            "tokenizer must be given with a model in memory: training turns prompts into tokens, completions into text"
        )
    keys |= _place(policy, keys)
    return policy


def _place(policy: Policy, keys: Mapping[str, Any]) -> dict[str, str]:
    """The keys of a configuration that a model in memory decides: dtype, device and, where none is given, the name.

    Raises:
        ConfigError: `keys` say something else.
    """
    dtype = str(policy.weight.dtype).removeprefix("torch.")
    device = str(policy.device) if launched_rank()[1] == 1 else policy.device.type  # each rank has a GPU of its own
    for key, has, fits in (("dtype", dtype, "auto"), ("device", device, policy.device.type)):
        if keys.get(key, has) not in (has, fits, None):
            raise ConfigError(
                f"{key}={keys[key]!r}, but the model that was given is {has}: leave {key} out, or move it"
            )
    name = getattr(policy.model.config, "name_or_path", "") or type(policy.causal_lm).__name__
    return {"dtype": dtype, "device": device, "model_name_or_path": keys.get("model_name_or_path") or name}


def _rewards(reward_funcs: Reward | Sequence[Reward] | None, keys: dict[str, Any]) -> list[RewardFunction]:
    """Rewards of this session; what a notebook's cell or a script defines is kept, not imported again.

    The configuration names them as well: by what a worker can import, else by "session:" and the function's name.
    """
    if reward_funcs is None:
        return []
    alone = isinstance(reward_funcs, str | RewardFunction) or callable(reward_funcs)
    functions: list[Any] = [reward_funcs] if alone else list(reward_funcs)  # type: ignore[arg-type]
    if not functions:
        raise ValueError("reward_funcs must be a function, or a list of at least one; got an empty one")
    try:
        rewards = [RewardFunction.of_session(function) for function in functions]
    except (TypeError, ValueError) as error:
        raise type(error)(f"reward_funcs: {str(error).removeprefix('reward: ')}") from None
    keys["reward.functions"] = [
        function if isinstance(function, str) else reward_text(reward)
        for function, reward in zip(functions, rewards, strict=True)
    ]
    return rewards


def _name_task(task: Any, train: Rows | None, evaluation: Any, keys: dict[str, Any]) -> None:
    """What is trained on, as the configuration calls it."""
    if train is not None and task is not None:
        raise TypeError("task and train_dataset are two ways to say what is trained on: give one of them")
    if evaluation is not None and train is None:
        raise TypeError("eval_dataset goes with train_dataset; a task brings its own splits")
    if task is not None and not isinstance(task, str | PathLike | Task):
        raise TypeError(f"task must be a Task or a name such as 'gsm8k'; got {type(task).__name__}")
    if task is not None:
        keys["task"] = task.name if isinstance(task, Task) else str(task)
    elif train is not None:
        keys["task"] = "dataset"


def _task(
    task: Task | str | PathLike[str] | None, train: Rows | None, evaluation: Rows | Mapping[str, Rows] | None,
    rewards: Sequence[RewardFunction | str], config: Config,
) -> Task:  # fmt: skip
    """The task that is given, made of rows, or named by the configuration; with other rewards where there are any."""
    if isinstance(task, Task):
        made = replace(task, rewards=rewards, reward_weights=[]) if rewards else task
    elif train is None:
        made = load_task(
            config.task, data_path=config.data_path, seed=config.seed, reward=rewards or None,
            options=config.task_options, evaluation_files=config.evaluation.files,
        )  # fmt: skip
    else:
        if not rewards:
            raise ValueError("reward_funcs must be given with train_dataset: a function, or a list of them")
        rows: dict[str, Rows] = {"train": _rows("train_dataset", train)}
        if isinstance(evaluation, Mapping):
            if "train" in evaluation:
                raise ValueError("eval_dataset: 'train' is the split that is trained on; choose another name")
            rows |= {name: _rows(f"eval_dataset[{name!r}]", part) for name, part in evaluation.items()}
        elif evaluation is not None:
            rows["test"] = _rows("eval_dataset", evaluation)
        made = Task("dataset", examples_of(rows, config.task_options), rewards)
    if isinstance(task, Task) or train is not None:  # one that is named was checked when it was loaded
        check_task(made)
    for reward in made.rewards:
        if isinstance(reward, RewardFunction) and reward.function is not None:
            try:  # others are imported in a worker, which checks them
                reward.check_columns(reward.function, made.columns)
            except RewardError as error:
                raise ValueError(f"reward_funcs: {error}") from None
    return made


def _rows(name: str, rows: Any) -> Rows:
    if isinstance(rows, str | PathLike):
        raise TypeError(
            f"{name} must be a datasets.Dataset, a DataFrame or a list of dicts; a file or a name is task={str(rows)!r}"
        )
    if hasattr(rows, "to_dict") and hasattr(rows, "iterrows"):  # a pandas DataFrame
        return rows.to_dict("records")  # type: ignore[no-any-return]
    if isinstance(rows, Mapping) or not isinstance(rows, Iterable):
        hint = ": give one of its splits" if isinstance(rows, Mapping) else ""
        raise TypeError(
            f"{name} must be a datasets.Dataset, a DataFrame or a list of dicts; got a {type(rows).__name__}{hint}"
        )
    return rows


def _watched(run: Run, progress: bool) -> Run:
    """With the report, and a terminal or notebook that shows the run, beside the caller's own listener."""
    from rich.console import Console

    from bandit_rft.progress import ConsoleListener
    from bandit_rft.report import ReportWriter

    if not progress:
        return run._replace(listener=Listeners(run.listener, ReportWriter()), shows=_without_bars)
    # Plain lines in a notebook, whose output calls itself a terminal: a live line would be a hundred lines there.
    in_notebook = type(sys.stdout).__module__.startswith("ipykernel")
    console = Console(highlight=False, force_jupyter=False, force_terminal=False if in_notebook else None)
    shows = ConsoleListener(run.config, console)
    return run._replace(
        listener=Listeners(run.listener, shows, ReportWriter()), shows=functools.partial(_without_bars, shows)
    )


@contextlib.contextmanager
def _without_bars(shows: contextlib.AbstractContextManager[object] | None = None) -> Iterator[None]:
    """Within the block, transformers draws no bar of its own for every file of weights."""
    before = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with shows or contextlib.nullcontext():
            yield
    finally:
        if before:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
