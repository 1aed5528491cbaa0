"""The prompts of a run: those trained on, those evaluated on, and what they are known by when the run is continued."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from bandit_rft.budget import last_position, planned_rounds
from bandit_rft.config import Config, ConfigError
from bandit_rft.data import Fingerprint, PromptSet, data_difference, fingerprint, prompt_text
from bandit_rft.inputs import check_use, reward_difference, reward_records
from bandit_rft.metrics import Metrics
from bandit_rft.queries import query_order
from bandit_rft.rewards.spec import SESSION, given_in_python
from bandit_rft.tasks import Task
from bandit_rft.tasks.files import named_files

logger = logging.getLogger(__name__)

#: Flags of `eval` by which other data than the run's are asked for.
DATA_FLAGS = ("task", "data_path", "seed", "task_options")


class RunData:
    """A task's prompts as a configuration uses them.

    Attributes:
        train: the prompts trained on.
        evaluation: the prompts of each split evaluated on.
        rounds: how many the run takes, at most.
        last_position: in the order of queries, at which num_train_epochs are over; None without that limit.
        fingerprints: of every split in use, by name, as a checkpoint keeps them.

    Raises:
        ConfigError: for a split that the task does not have, or a batch larger than the prompts.
        ValueError: for prompts of which most are too long, or so many that a batch is larger than the rest.
    """

    def __init__(self, task: Task, tokenizer: PreTrainedTokenizerBase, config: Config):
        self.config, self._task, self._tokenizer = config, task, tokenizer
        if config.chat_template == "never" and tokenizer.chat_template is not None:
            logger.warning(
                "chat_template=never: a chat model gets bare prompts. Such a model rarely ends its turn and then earns "
                "nothing; use chat_template=auto unless you know better."
            )
        names = config.evaluation.splits or list(task.splits)
        check_use(task, names, config.batch_size)
        self.train = self._prompts("train")
        query_order(len(self.train), config.batch_size, config.seed, 0, 1)  # refuses a batch too large, now
        self.rounds = planned_rounds(config, len(self.train))
        self.last_position = last_position(config, len(self.train))
        self.evaluation = [self._prompts(name, config.evaluation.max_queries) for name in names]
        self.fingerprints = {name: asdict(fingerprint(task.splits[name])) for name in {"train", *names}}

    def _prompts(self, split: str, limit: int | None = None) -> PromptSet:
        return PromptSet(
            split, self._task.splits[split], self._tokenizer, chat_template=self.config.chat_template,
            chat_template_kwargs=self.config.chat_template_kwargs,
            max_prompt_length=self.config.max_prompt_length, limit=limit,
        )  # fmt: skip

    def metrics(self) -> Metrics:
        """How many prompts there are, and how many were left out as too long, by split."""
        metrics: Metrics = {"prompts/train": len(self.train), "prompts/filtered": self.train.filtered}
        metrics |= {f"eval/{prompts.name}/filtered": prompts.filtered for prompts in self.evaluation}
        return metrics

    def compare_with(self, checkpoint: Path, saved: dict[str, Any]) -> None:
        """Compare with the fingerprints that a checkpoint keeps.

        Raises:
            ConfigError: when the training data are others; other data of an evaluation are a warning.
        """
        for split in sorted(saved.keys() & self.fingerprints.keys()):
            difference = data_difference(split, saved[split], Fingerprint(**self.fingerprints[split]))
            if difference and split == "train":
                raise ConfigError(
                    f"the data are not those that {checkpoint} was trained on ({difference}): this would be neither "
                    "run. Choose another output_dir, or put the data back"
                )
            if difference:
                logger.warning("evaluation before and after %s is on different data (%s)", checkpoint, difference)

    def explain_overlap(self) -> None:
        """Say so where an evaluation other than of "train" asks questions that are trained on."""
        trained = {prompt_text(example.prompt) for example in self.train.examples}
        for prompts in self.evaluation:
            shared = sum(prompt_text(example.prompt) in trained for example in prompts.examples)
            if shared and prompts.name != "train":
                logger.warning(
                    "%d of %d prompts of %s are training prompts, too: it says little of new questions",
                    shared, len(prompts), prompts.name,
                )  # fmt: skip

    def explain_budget(self) -> None:
        """Say so where max_rounds ends the run before the passes that were asked for."""
        if self.last_position is not None and self.config.max_rounds * self.config.batch_size < self.last_position:
            logger.warning(
                "max_rounds=%d ends the run before num_train_epochs=%g, which take %d rounds",
                self.config.max_rounds, self.config.num_train_epochs, -(-self.last_position // self.config.batch_size),
            )  # fmt: skip

    def explain_queries(self) -> None:
        """Say what a pass is where queries are chosen, and where there is nothing to choose among or by."""
        config, size = self.config, len(self.train)
        if config.queries.order == "epochs":
            return
        if size == config.batch_size:
            logger.warning("queries.order=learnable: every round asks all %d prompts, so that none is chosen", size)
        elif self.rounds * config.batch_size <= size:
            logger.warning(
                "queries.order=learnable chooses by a query's earlier rewards, but %d rounds of %d ask each of %d "
                "prompts at most once on average: there is little to choose by",
                self.rounds, config.batch_size, size,
            )  # fmt: skip
        if config.num_train_epochs is not None:
            logger.warning(
                "queries.order=learnable: num_train_epochs=%g counts %d queries as a pass, whichever they are",
                config.num_train_epochs, size // config.batch_size * config.batch_size,
            )  # fmt: skip

    def explain_history(self) -> None:
        """Say so, before anything runs, when a query's past can never be compared with."""
        prompts = [prompt_text(example.prompt) for example in self.train.examples]
        if repeated := len(prompts) - len(set(prompts)):
            logger.warning(
                "advantage=%s: %d training prompts are repeated; each repetition keeps a past of its own",
                self.config.advantage, repeated,
            )  # fmt: skip
        if self.rounds * self.config.batch_size <= len(prompts) and self.config.queries.order == "epochs":
            logger.warning(
                "advantage=%s compares with earlier rewards of a query, but none of %d comes twice in %d rounds of %d",
                self.config.advantage, len(prompts), self.rounds, self.config.batch_size,
            )  # fmt: skip


def check_evaluated(task: Task, config: Config, state: Mapping[str, Any], asked: Collection[str]) -> None:
    """Refuse to measure a checkpoint on other data or by other rewards than its run's, unless others are asked for.

    Args:
        task: that the run's configuration names now.
        config: of the evaluation.
        state: of the checkpoint; what an earlier version did not keep is not compared.
        asked: dotted keys that were given beside the run's configuration.

    Raises:
        ConfigError: saying what differs, and the flags that ask for it.
    """
    if not any(key == flag or key.startswith(f"{flag}.") for key in asked for flag in DATA_FLAGS):
        files = named_files(config.evaluation.files) if "evaluation.files" in asked else {}
        saved = {name: kept for name, kept in (state.get("data") or {}).items() if name not in files}
        names = [name for name in config.evaluation.splits or task.splits if name in saved] or ["train"]
        for name in names:
            if name not in saved or name not in task.splits:
                continue
            if difference := data_difference(name, saved[name], fingerprint(task.splits[name])):
                raise ConfigError(
                    f"the data of task {config.task!r} are not those of the run ({difference}): they have changed, or "
                    "a task of that name was given in Python. To measure on other data say so: "
                    "--task and --data_path, or --evaluation.files"
                )
    before, given = state.get("rewards"), {"reward.functions", "reward.weights"} & set(asked)
    if before is None or "reward.functions" in given:
        return
    if session := [reward["name"] for reward in before if reward["given"] == "session"]:
        raise ConfigError(given_in_python(f"{SESSION}{name}" for name in session))
    now = reward_records(task, config, in_python=False)
    if given:
        now = [{**new, "weight": old["weight"]} for old, new in zip(before, now, strict=False)]
    if "task" not in asked and (difference := reward_difference(before, now)):
        raise ConfigError(
            f"the rewards of task {config.task!r} are not those of the run ({difference}). To measure by others say "
            "so: --reward.functions, --reward.weights"
        )
