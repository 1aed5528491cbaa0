"""Procedurally generated reasoning problems by the reasoning-gym library (the extra of that name)."""

import functools
from typing import Any

from pydantic import Field

from bandit_rft.options import OptionModel
from bandit_rft.rewards.spec import RewardFunction, unknown_name
from bandit_rft.tasks.base import Example, Task, read_options

SUFFIX = "Give the final answer between <answer> and </answer>."
TEST_SEED_OFFSET = 2**30  # the library draws problem i with seed + i: far enough that no two splits share one


class Options(OptionModel):
    """Which problems, and how many; train is drawn with the seed, test with another made from it."""

    dataset: str = Field(description="one of the library's, such as leg_counting")
    config: dict[str, Any] | None = Field(None, description="that dataset's own settings")
    train_size: int = Field(1000, ge=1, description="number of problems")
    test_size: int = Field(200, ge=1, description="number of problems")


def load(seed: int, options: dict[str, Any]) -> Task:
    """Generate a task.

    Raises:
        ImportError: naming the extra.
        ValueError: an unknown option, dataset or setting.
    """
    chosen = read_options("reasoning_gym", Options, options)
    name, config = chosen.dataset, dict(chosen.config or {})
    library = _library()
    known = sorted(library.factory.DATASETS)
    if name not in known:
        raise ValueError(unknown_name("value of option dataset of task reasoning_gym:", name, known))
    splits = {}
    for split, first, size in (
        ("train", seed, chosen.train_size), ("test", seed + TEST_SEED_OFFSET, chosen.test_size)
    ):  # fmt: skip
        try:
            problems = library.create_dataset(name, seed=first, size=size, **config)
            entries = [problems[index] for index in range(size)]
        except (TypeError, ValueError, AssertionError) as error:
            raise ValueError(f"option config of task reasoning_gym: {name} refuses {config}: {error}") from error
        splits[split] = [
            Example(
                prompt=f"{str(entry['question']).strip()}\n{SUFFIX}",
                columns={"answer": entry["answer"], "first_seed": first, "size": size, "index": index},
            )
            for index, entry in enumerate(entries)
        ]
    reward = RewardFunction(f"{__name__}:reasoning_gym_score", "sample", {"dataset": name, "config": config})
    return Task("reasoning_gym", splits, [reward])


def reasoning_gym_score(
    completion: str, first_seed: int, size: int, index: int, dataset: str, config: dict[str, Any]
) -> float:
    """Return the library's own score in [0, 1] of what the last <answer>...</answer> holds; 0 where there is none.

    The problem is generated again: what the library scores with may not survive being sent between processes.
    """
    _, opened, rest = completion.rpartition("<answer>")
    answer, closed, _ = rest.partition("</answer>")
    if not opened or not closed:
        return 0.0
    problems = _problems(dataset, first_seed, size, tuple(config.items()))
    return float(problems.score_answer(answer.strip(), problems[index]))


@functools.lru_cache(maxsize=8)
def _problems(name: str, seed: int, size: int, config: tuple[tuple[str, Any], ...]) -> Any:
    return _library().create_dataset(name, seed=seed, size=size, **dict(config))


def _library() -> Any:
    """Import the library.

    Raises:
        ImportError: naming the extra.
    """
    try:
        import reasoning_gym
        import reasoning_gym.factory
    except ImportError as error:
        raise ImportError(
            "task reasoning_gym needs the reasoning-gym library: pip install 'bandit_rft[reasoning-gym]'"
        ) from error
    return reasoning_gym


PREPARE = {"reasoning_gym_score": _library}
