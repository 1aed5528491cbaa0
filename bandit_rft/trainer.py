"""The training loop: draw, score, compare, update, log. `Trainer.train_round` is one round, top to bottom.

What is not here: the rollout engine (rollout/), rewards to advantages (advantages.py), the optimizer steps (update.py),
the loss and its gradients (ops/), what is written (records.py).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from bandit_rft.advantages import ADVANTAGES, compute_advantages
from bandit_rft.assemble import (
    check_course,
    configured_ranks,
    load_policy,
    make_engine,
    make_hopeless,
    make_learning_rate,
    make_optimizer,
    make_queries,
    make_scorer,
    make_updater,
    resolve_dtype,
    takes_ratios,
)
from bandit_rft.checkpoint import CheckpointError, load_optimizer
from bandit_rft.config import Config, advantage_options
from bandit_rft.data import completion_texts, score
from bandit_rft.distributed import Ranks
from bandit_rft.gates import CanaryError, GateError, SpotCheck
from bandit_rft.heap import keep_freed_memory
from bandit_rft.hopeless import hopeless_count
from bandit_rft.initial import InitialModel
from bandit_rft.keywords import Model, Reward, Rows, make_run
from bandit_rft.kl_controller import KLController
from bandit_rft.listener import Listener
from bandit_rft.metrics import (
    Metrics,
    Stopwatch,
    read_metrics,
    reward_metrics,
    rollout_metrics,
    update_metrics,
)
from bandit_rft.model import Policy
from bandit_rft.model.surroundings import plain_surroundings
from bandit_rft.ops.objective import kl_estimate
from bandit_rft.records import OtherRecords, Records, restore
from bandit_rft.replay import Replay, reweigh, staleness_metrics
from bandit_rft.rewards import RewardResult
from bandit_rft.rollout import Ahead, RolloutError, staleness
from bandit_rft.rollout_batch import RolloutBatch
from bandit_rft.run_data import RunData
from bandit_rft.run_folder import RunFolder
from bandit_rft.run_result import RunResult
from bandit_rft.sampler import Sampler
from bandit_rft.selection import constant_groups, most_varied
from bandit_rft.tasks import Task
from bandit_rft.update import score_rollouts

logger = logging.getLogger(__name__)


class Trainer:
    """One training run in one folder, from a configuration or from keywords.

        Trainer(model="Qwen/Qwen2.5-0.5B-Instruct", train_dataset=rows, reward_funcs=[my_reward], max_rounds=100).run()

    Args:
        config: of the run; checked, with a ConfigError that names the key, unless a model or task is given. None: the
            configuration is made of `keys`, the run shows its progress, and it writes its report.
        listener: told of rounds as they happen.
        model: a folder, a hub name, a Policy, or a transformers model, which is put in eval mode and trained in place.
        tokenizer: of a transformers model.
        task: a Task, or its name.
        train_dataset: in place of a task, rows with a prompt and the columns that the rewards take: a list of dicts, a
            datasets.Dataset or a DataFrame. `task_options` says where things are in them.
        eval_dataset: rows of the split "test", or rows by the name of their split.
        reward_funcs: functions, or texts for RewardFunction.parse, in place of the task's own. A function that cannot
            be imported, as one of a notebook's cell, runs in a fork of this process.
        reward_weights: one number a reward; 1 each by default.
        progress: whether a run made of keywords shows how it goes.
        keys: of the configuration, as `bandit-rft train --help` lists them: preset="minimal", kl={"where": "reward"}.

    Raises:
        ConfigError, ValueError, TypeError: naming the argument and what was expected.
    """

    make_records = Records

    def __init__(
        self,
        config: Config | None = None,
        listener: Listener | None = None,
        *,
        model: Model | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        task: Task | str | None = None,
        train_dataset: Rows | None = None,
        eval_dataset: Rows | Mapping[str, Rows] | None = None,
        reward_funcs: Reward | Sequence[Reward] | None = None,
        reward_weights: Sequence[float] | None = None,
        progress: bool = True,
        **keys: Any,
    ):
        run = make_run(
            config, listener, model=model, tokenizer=tokenizer, task=task, train_dataset=train_dataset,
            eval_dataset=eval_dataset, reward_funcs=reward_funcs, reward_weights=reward_weights, progress=progress,
            keys=keys,
        )  # fmt: skip
        config = self.config = replace(run.config, dtype=resolve_dtype(run.config))
        self.task, self.rewards, self.listener, self._shows = run.task, run.rewards, run.listener, run.shows
        self.run_folder = RunFolder(config.output_dir)
        self.ranks = Ranks()  # those of a run, while it runs
        self.stop_requested = False
        self.initial = InitialModel(run.policy, config)
        self._begin()

    def _begin(self) -> None:
        """What is counted and remembered, as before the first round."""
        config = self.config
        self.round = 0
        self.position = 0  # in the order of queries
        self.queries = make_queries(config)
        self.hopeless = make_hopeless(self.task, config)
        self.generated_tokens = 0
        self.seconds = 0.0  # of rounds, evaluation not counted
        self.kl = KLController(config.objective.kl_coef, config.kl.target, config.kl.horizon)
        self.advantage = ADVANTAGES[config.advantage]
        self.memory = self.advantage.make_memory(advantage_options(config))
        self.replay = Replay(config.replay.capacity) if config.replay.capacity else None
        self.ahead = Ahead() if config.rollout.ahead else None

    @property
    def folder(self) -> Path:
        """The run folder's path."""
        return self.run_folder.path

    # --- the run ------------------------------------------------------------------------------------------------------

    def run(self) -> RunResult:
        """Train until the budget is used up or `stop_requested`; returns what came of it."""
        with ExitStack() as stack:
            stack.enter_context(plain_surroundings())
            stack.callback(setattr, self, "stop_requested", False)  # it is of this call, and of what came before it
            self.ranks = stack.enter_context(configured_ranks(self.config))
            if self.ranks.first:
                stack.enter_context(self.run_folder.lock())
                stack.enter_context(self._shows())
            else:
                self.listener = Listener()
            self._start(stack)
            self.listener.started(self)
            if self.round == 0 and not self.ranks.any(self.ranks.first and bool(read_metrics(self.folder))):
                self._finish_round(Stopwatch(), {"round": 0, **self.data.metrics()})
            while not self.finished and not self.ranks.any(self.stop_requested):
                start = self.position
                try:
                    self.train_round()
                except (RolloutError, CanaryError):  # the policy is as it was: nothing that was drawn is trained on
                    if self.round and self.records.saved_round != self.round:
                        self.position = start
                        self.records.checkpoint()
                    raise
            if self.records.saved_round != self.round:
                self.records.checkpoint()
        self.listener.finished(self)
        return RunResult(self.folder, read_metrics(self.folder), self.policy, self.finished)

    def __repr__(self) -> str:
        return f"Trainer({self.task!r}, round {self.round} of {self.config.max_rounds}, {str(self.folder)!r})"

    @property
    def finished(self) -> bool:
        """Whether the budget is used up: rounds, passes, generated tokens or seconds, whichever comes first."""
        tokens, seconds, last = self.config.max_generated_tokens, self.config.max_seconds, self.data.last_position
        return (
            self.round >= self.config.max_rounds
            or (last is not None and self.position >= last)
            or (tokens is not None and self.generated_tokens >= tokens)
            or (seconds is not None and self.seconds >= seconds)
        )

    def train_round(self) -> None:
        """One round: rollouts, rewards, advantages, the update; then what is measured and saved."""
        clock, number = Stopwatch(), self.round + 1
        self._tokens_scored = 0
        batch, texts, rewards = self.draw(number, clock)
        prompts = self.data.train.indices
        asked = self.queries.record(prompts, batch.query.numpy(), batch.reward.numpy(), number)
        self.draw_ahead(number + 1)
        with clock.phase("update"):
            self.listener.phase("update")
            shaped, shaping = self.shape_rewards(batch)
            batch = self.compare(batch, shaped)
            training, replayed = self.with_replay(batch, number)
            self.optimizer.learning_rate = self.learning_rate(number)
            self.ranks.release()
            uncorrected = self.config.replay.correction == "none" and len(training) > len(batch)
            update = self.updater(training, number, off_policy=uncorrected or takes_ratios(self.config))
            self.kl.update(shaping.get("kl", update.kl), len(batch))
            if self.kl.target is not None and self.config.kl.where == "loss":
                self.updater.objective = replace(self.updater.objective, kl_coef=self.kl.coef)
        with clock.phase("verify"):
            checked = self.verify(batch, number, off_policy=update.off_policy)
        self.round = number
        self.generated_tokens += len(batch.tokens)
        metrics = {
            "round": number, **reward_metrics(batch, rewards), **rollout_metrics(batch), **update_metrics(update),
            **asked, **shaping, **replayed, **checked, "learning_rate": self.optimizer.learning_rate,
            "tokens/scored": update.tokens_scored + self._tokens_scored,
        }  # fmt: skip
        if self.ahead is not None:
            metrics |= staleness(batch, number - 1)
        if self.config.rollout.dynamic_sampling:
            dropped = constant_groups(batch.reward.numpy(), batch.query.numpy())
            metrics |= {"rollout/queries": len(batch.query.unique()), "rollout/dropped": len(dropped)}
        if self.hopeless is not None:
            metrics["rollout/hopeless"] = hopeless_count(batch, self.policy.stop_tokens)
        if self.config.log_rollouts_steps and number % self.config.log_rollouts_steps == 0:
            self.records.rollouts(batch, texts)
        self._finish_round(clock, metrics)

    def draw(self, number: int, clock: Stopwatch) -> tuple[RolloutBatch, list[str], RewardResult]:
        """Rollouts of the next batch_size queries, their texts and rewards; `trained` says which may be trained on.

        With dynamic sampling, queries whose rollouts all earned the same are replaced by the ones that come next.
        """
        with clock.phase("rollout"):
            self.sampler.refresh(self.round)
        config, taken, missing = self.config, set[int](), self.config.batch_size
        batches, texts, rewards = list[RolloutBatch](), list[str](), list[RewardResult]()
        for _ in range(1 + config.rollout.dynamic_sampling):
            with clock.phase("rollout"):
                self.listener.phase("rollout")
                drawn = self._draw_queries(missing, taken, number)
            if drawn is None:
                break
            queries, batch = drawn
            batch, completions, result = self._score_rewards(batch, queries, clock)
            constant = set[int]()
            if config.rollout.dynamic_sampling:
                constant = constant_groups(batch.reward.numpy(), batch.query.numpy())
            usable = [query not in constant for query in batch.query.tolist()]
            batches.append(batch.with_columns(trained=torch.tensor(usable) & ~batch.reward.isnan()))
            texts += completions
            rewards.append(result)
            missing -= len(queries) - len(constant)
        batch = RolloutBatch.cat(batches)
        if not batch.logprobs.isfinite().all():
            broken = sum(not bool(part.isfinite().all()) for part in batch.split(batch.logprobs))
            raise FloatingPointError(
                f"round {number}: {broken} of {len(batch)} rollouts have log-probabilities that are not finite: the "
                f"policy has diverged. {self.records.before_divergence}"
            )
        return batch, texts, RewardResult.join(rewards)

    def draw_ahead(self, number: int) -> None:
        """Begin to draw the next round, where that is chosen, with the policy as it is before this one's update."""
        if self.ahead is None or number > self.config.max_rounds:
            return
        self.sampler.begin(*self._next_queries(self.config.batch_size, set(), number), number)

    def shape_rewards(self, batch: RolloutBatch) -> tuple[NDArray[np.float64], Metrics]:
        """Rewards [B], less the length penalty and the KL to the initial model where chosen; what these came to."""
        config, rewards, metrics = self.config, batch.reward.numpy(), Metrics()
        if config.reward.length_penalty:
            first = config.reward.length_penalty_from
            excess = (batch.lengths.numpy() - first) / (config.max_completion_length - first)
            rewards = rewards - config.reward.length_penalty * excess.clip(0, 1)
        if self.kl_reference is not None:
            reference = self._score(self.kl_reference, batch)
            estimate = kl_estimate(config.objective.kl, batch.logprobs, reference)
            rewards = rewards - self.kl.coef * np.array([float(part.sum()) for part in batch.split(estimate)])
            metrics["kl"] = float(kl_estimate("k3", batch.logprobs, reference).mean())
        if config.reward.length_penalty or self.kl_reference is not None:
            scored = ~np.isnan(rewards)
            metrics["reward/shaped"] = float(rewards[scored].mean()) if scored.any() else None
        return rewards, metrics

    def compare(self, batch: RolloutBatch, rewards: NDArray[np.float64]) -> RolloutBatch:
        """The batch with advantages, from rewards [B], and with `trained` where a rollout is trained on."""
        config, queries = self.config, batch.query.numpy()
        compared, first = batch.trained.numpy().copy(), batch.attempt.numpy() == 0
        if config.rollout.keep:
            compared[compared] = most_varied(rewards[compared], queries[compared], config.rollout.keep)
        rows = torch.from_numpy(compared)
        if self.memory is not None:
            self.memory.observe(batch.select(rows), lambda past: self._score(self.trained, past))
        advantages = np.zeros(len(batch), dtype=np.float32)
        advantages[compared] = compute_advantages(
            config.advantage, rewards[compared], queries[compared], self.memory, advantage_options(config)
        )
        if self.memory is not None:
            self.memory.remember(batch.with_columns(advantage=advantages).select(rows))
        trained = compared & first if self.advantage.trains_on_first else compared
        if config.rollout.mask_truncated:
            trained = trained & ~batch.truncated.numpy()
        return batch.with_columns(advantage=np.where(trained, advantages, np.float32(0)), trained=trained)

    def with_replay(self, batch: RolloutBatch, number: int) -> tuple[RolloutBatch, Metrics]:
        """The round's rollouts, and old ones with importance weights where replay is on; what was replayed."""
        r = self.config.replay
        if self.replay is None:
            return batch, {}
        old, young = self.replay.draw(
            round(r.ratio * int(batch.trained.numpy().sum())), sampling=r.sampling, now=number,
            max_staleness=r.max_staleness, seed=self.config.seed,
        )  # fmt: skip
        self.replay.add(batch.select(batch.trained))
        metrics: Metrics = {
            "replay/rollouts": 0 if old is None else len(old),
            "replay/kept_fraction": young,
            **staleness_metrics(old, number),
        }
        if old is None:
            return batch, metrics
        if r.correction != "none":
            old, weights = reweigh(
                old, lambda part: self._score(self.trained, part), correction=r.correction, cap=r.importance_cap,
                every=self.updater.objective.every_token_counts,
            )  # fmt: skip
            metrics |= weights
        return RolloutBatch.cat([batch, old]), metrics

    def verify(self, batch: RolloutBatch, number: int, *, off_policy: bool) -> Metrics:
        """When it is time, one rollout's loss and gradient once more by plain PyTorch, by the first rank."""
        if not self.spot_check.due(number):
            return {}
        self.ranks.gather()
        if not self.ranks.first:
            return {}
        return self.spot_check(self.policy, batch, self.config.temperature, number, off_policy=off_policy)

    # --- parts of a round ---------------------------------------------------------------------------------------------

    def _next_queries(self, count: int, taken: set[int], number: int) -> tuple[list[int], int]:
        """The next places in the training prompts that this round has not taken yet; the position behind them."""
        return self.queries.next(self.data.train.indices, self.position, count, taken, number)

    def _draw_queries(self, count: int, taken: set[int], number: int) -> tuple[list[int], RolloutBatch] | None:
        """The next queries and their rollouts, or the round that was drawn ahead; None when no query is left."""
        if self.ahead is not None and (drawn := self.ahead.take()) is not None:
            queries, self.position, batch = drawn
            return queries, batch
        queries, self.position = self._next_queries(count, taken, number)
        return (queries, self.sampler.draw(queries, number)) if queries else None

    def _score_rewards(
        self, batch: RolloutBatch, positions: Sequence[int], clock: Stopwatch
    ) -> tuple[RolloutBatch, list[str], RewardResult]:
        """The rollouts with their rewards, their texts, and what the reward functions said."""
        prompts, rows = self.data.train, [i for i in positions for _ in range(self.config.num_generations)]
        with clock.phase("rollout"):
            texts = completion_texts(batch.token_lists(), self.policy.tokenizer, self.policy.stop_tokens)  # type: ignore[arg-type]
        with clock.phase("reward"):
            self.listener.phase("reward")
            rewards = score(self.scorer, [prompts.examples[i] for i in rows], texts)
        totals = [np.nan if total is None else total for total in rewards.total]
        return batch.with_columns(reward=totals), texts, rewards

    def _score(self, policy: Policy, batch: RolloutBatch) -> torch.Tensor:
        """Log-probabilities [N] of a batch's tokens under a policy, counted in tokens/scored."""
        self._tokens_scored += len(batch.tokens)
        config = self.config
        return score_rollouts(
            policy, batch, temperature=config.temperature, tokens_per_microbatch=config.tokens_per_microbatch,
            ranks=self.ranks,
        )  # fmt: skip

    # --- starting, finishing a round ----------------------------------------------------------------------------------

    def _start(self, stack: ExitStack) -> None:
        """Load everything, from the beginning or from a checkpoint."""
        config, ranks = self.config, self.ranks
        self._begin()  # run() may be called again
        found = self.run_folder.find_checkpoint(config.resume, asdict(config), self.rewards, self.initial.is_model_of)
        ranks.check_same("checkpoint", [str(found and found[1]).encode()])
        self.policy = self.initial.policy(self.folder, found, first=ranks.first)
        if self.policy.device.type == "cpu":
            keep_freed_memory()
        self.trained = ranks.shard(self.policy)  # with several ranks, this one's share
        self.optimizer = make_optimizer(self.trained, config, ranks)
        stack.callback(self.optimizer.close)
        if found is not None:
            load_optimizer(found[0], self.optimizer)
            restore(self, *found)
            logger.info("continuing from %s", found[0])
        if (reference := self.initial.reference(self.trained, found and found[0])) is not None:
            reference = ranks.shard(reference)
        in_loss = config.kl.where == "loss"
        self.kl_reference = None if in_loss else reference  # scored for a KL in the reward
        self.updater = make_updater(
            self.trained, self.optimizer, reference if in_loss else None, config, self.kl.coef, ranks
        )
        self.engine = ranks.engine(make_engine(self.policy, config))
        stack.callback(self.engine.close)
        self.spot_check = SpotCheck(config.verify_steps, config.max_verify_error, config.seed, self.updater.objective)
        if self.policy.tokenizer is None:
            raise ValueError("policy.tokenizer is None: training needs one to turn prompts into tokens")
        self.data = RunData(self.task, self.policy.tokenizer, config)
        self.sampler = Sampler(self.engine, self.trained, self.data.train, config, self.ahead, ranks, self.hopeless)
        if self.memory is not None:
            self.data.explain_history()
        self.data.explain_budget()
        self.data.explain_queries()
        self.data.explain_overlap()
        self.learning_rate = make_learning_rate(config, self.data.rounds)
        if found is not None:
            self.data.compare_with(found[0], found[1].get("data", {}))
            check_course(found[0], found[1].get("course"), self.learning_rate)
        scorer = make_scorer(self.task, config)
        self.scorer = ranks.scorer(stack.enter_context(scorer) if ranks.first else scorer)
        if config.resume != "never" and found is None and ranks.first and read_metrics(self.folder):
            logger.warning("%s has metrics but no checkpoint: starting again from round 0", self.folder)
        self.records = (self.make_records if ranks.first else OtherRecords)(self, resumed=found is not None)
        stack.callback(self.records.close)

    def _finish_round(self, clock: Stopwatch, metrics: Metrics) -> None:
        """Evaluate and save when it is time; the round's line is written before the checkpoint that claims it."""
        config, number = self.config, self.round
        seconds = float(clock.metrics()["seconds/round"] or 0.0) if number else 0.0
        self.seconds = self.ranks.from_first(self.seconds + seconds)
        last, failed = self.finished or self.ranks.any(self.stop_requested), None
        if number == 0 or self.finished or (config.eval_steps and number % config.eval_steps == 0):
            with clock.phase("evaluate"):
                self.listener.phase("evaluate")
                try:
                    self.sampler.refresh(number)
                    metrics |= self.records.evaluation()
                except (RolloutError, CanaryError) as error:  # the round is done: its line and checkpoint come first
                    failed = error
        metrics = self.records.line(metrics | clock.metrics() | self.sampler.metrics())
        if number and (last or failed or (config.save_steps and number % config.save_steps == 0)):
            self.records.checkpoint()
        if failed is not None:
            raise failed
        self.listener.round_done(metrics)


__all__ = ["CheckpointError", "GateError", "Listener", "Trainer", "load_policy", "make_scorer"]
