"""What a task is: prompts in splits, and the reward functions that score completions of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from bandit_rft.options import OptionError, OptionModel, option_problems
from bandit_rft.rewards.spec import RewardFunction, text_of, unknown_name
from bandit_rft.text import html_table, printable


@dataclass(frozen=True)
class Example:
    """One query.

    Attributes:
        prompt: a plain text, or chat messages with "role" and "content", and what else a chat template may read.
        columns: what rewards take besides prompt and completion; the right answer is "answer".
    """

    prompt: str | list[dict[str, Any]]
    columns: dict[str, Any]


@dataclass(repr=False)
class Task:
    """A named set of examples and how completions of them are rewarded.

    Attributes:
        splits: examples by split: "train", "test", maybe more ("validation", "longer"). A file or dataset may lack one.
        rewards: functions, or texts that RewardFunction.parse reads; RewardFunctions once the task is made.
        reward_weights: one a reward; 1 each if left empty.
        reference_rates: by "split/reward", the share of answers that earn the reward when written as it reads them;
            set by load_task.
    """

    name: str
    splits: dict[str, list[Example]]
    rewards: Sequence[RewardFunction | Callable[..., Any] | str]
    reward_weights: list[float] = field(default_factory=list)
    reference_rates: dict[str, float] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        self.rewards = [RewardFunction.of(reward) for reward in self.rewards]
        self.reward_weights = self.reward_weights or [1.0] * len(self.rewards)
        if len(self.reward_weights) != len(self.rewards):
            raise ValueError(
                f"reward_weights: expected {len(self.rewards)}, one a reward, got {len(self.reward_weights)}"
            )
        for name, examples in self.splits.items():
            for row, example in enumerate(examples if isinstance(examples, list | tuple) else examples[:1]):
                if not isinstance(example, Example):
                    given = printable(repr(example), 100, one_line=True)
                    raise TypeError(
                        f"task {self.name!r} {name} row {row}: expected an Example(prompt, columns), got {given}"
                    )
        if empty := [name for name, examples in self.splits.items() if not examples]:
            raise ValueError(f"task {self.name!r}: the splits {empty} hold no examples")

    def __repr__(self) -> str:
        sizes = ", ".join(f"{len(examples):,} {split}" for split, examples in self.splits.items())
        return f"Task({self.name!r}: {sizes}; rewards {', '.join(self._reward_names)})"

    def _repr_html_(self) -> str:
        rows = [
            (split, f"{len(examples):,}", printable(text_of(examples[0].prompt, whole=True), 200))
            for split, examples in self.splits.items()
        ]
        columns = ", ".join(self.columns) or "none"
        caption = f"{self.name}: rewards {', '.join(self._reward_names)}; columns {columns}"
        return html_table(("split", "examples", "the first prompt"), rows, caption)

    @property
    def _reward_names(self) -> list[str]:
        return [reward.name for reward in self.rewards if isinstance(reward, RewardFunction)] or ["none"]

    @property
    def columns(self) -> list[str]:
        """The names of the columns that rewards get, over all examples."""
        examples = [example for split in self.splits.values() for example in split]
        return list(dict.fromkeys(name for example in examples for name in example.columns))


def collate(examples: Sequence[Example]) -> dict[str, list[Any]]:
    """Return the columns of N examples as lists of N entries, as rewards take them; None where an example lacks one."""
    names = dict.fromkeys(name for example in examples for name in example.columns)
    return {name: [example.columns.get(name) for example in examples] for name in names}


Declared = TypeVar("Declared", bound=OptionModel)


def read_options(task: str, model: type[Declared], options: Mapping[str, Any] | None) -> Declared:
    """Return a task's options, as `model` declares and checks them.

    Raises:
        OptionError: a ValueError and TypeError that names the option: unknown, with the nearest name; or impossible.
    """
    for name in options or {}:
        if name not in model.model_fields:
            raise OptionError(unknown_name(f"option of task {task}:", name, list(model.model_fields)))
    if found := option_problems(model, options or {}):
        raise OptionError(f"{task} option {found[0].name}: {found[0].expectation()}")
    return model(**(options or {}))
