"""The training loop: draw, score, compare, update, log. `Trainer.train_round` is one round, top to bottom.

What is not here: the rollout engine (rollout/), rewards to advantages (advantages.py), the optimizer steps (update.py),
the loss and its gradients (ops/).
"""

from __future__ import annotations

import fcntl
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from bandit_rft import ops
from bandit_rft.advantages import ADVANTAGES, compute_advantages
from bandit_rft.checkpoint import (
    CheckpointError,
    latest_checkpoint,
    load_arrays,
    load_optimizer,
    read_state,
    save_checkpoint,
)
from bandit_rft.config import MAY_CHANGE, Config, ConfigError, advantage_options, check_config, to_yaml
from bandit_rft.data import PromptSet, completion_texts, prompt_text, query_order, score
from bandit_rft.draws import Draw, constant_groups, join, join_rollouts, most_varied, replayed_rollouts
from bandit_rft.evaluate import answer_text, evaluate
from bandit_rft.history import ValueTracker
from bandit_rft.metrics import Metrics, MetricsLog, Stopwatch, open_trackers, read_metrics, write_parquet
from bandit_rft.model import Policy
from bandit_rft.ops.objective import kl_estimate
from bandit_rft.optimizer import PolicyOptimizer
from bandit_rft.replay import LastAnswers, TrajectoryReplay, staleness_metrics
from bandit_rft.rewards import RewardRunner
from bandit_rft.rollout import RolloutEngine, Rollouts, Sampling, sequence_ids
from bandit_rft.tasks import Task, load_task
from bandit_rft.update import (
    PolicyUpdater,
    TrainingBatch,
    Update,
    effective_sample_size,
    importance_weights,
    score_rollouts,
)

logger = logging.getLogger(__name__)

TRAINING_STREAM = 0


class Listener(Protocol):
    """What a trainer tells the outside."""

    def started(self, trainer: Trainer) -> None:
        """Everything is loaded, the first round comes next."""

    def phase(self, name: str) -> None:
        """A phase ("rollout", "evaluate", ...) begins."""

    def round_done(self, metrics: Metrics) -> None:
        """A round's line was written (round 0: the evaluation before training)."""


class _Silent:
    def started(self, trainer: Trainer) -> None:
        pass

    def phase(self, name: str) -> None:
        pass

    def round_done(self, metrics: Metrics) -> None:
        pass


class Trainer:
    """One training run in one folder.

    Args:
        config: checked again here; raises ConfigError with the key's name.
        listener: told of rounds as they happen.
        policy, task: given instead of what the config names, by programs that made their own.
    """

    def __init__(
        self,
        config: Config,
        listener: Listener | None = None,
        *,
        policy: Policy | None = None,
        task: Task | None = None,
    ):
        check_config(config) if policy is None and task is None else None
        self.config: Config = config
        self.listener: Listener = listener or _Silent()
        self.folder = Path(config.output_dir)
        self.stop_requested = False
        self.round = 0
        self.position = 0  # in the order of queries
        self.generated_tokens = 0
        self.seconds = 0.0  # of rounds, evaluation not counted
        self.kl_coef = config.objective.kl_coef
        self.advantage = ADVANTAGES[config.advantage]
        self.memory = self.advantage.make_memory(advantage_options(config))
        self.replay = TrajectoryReplay(config.replay.capacity) if config.replay.capacity else None
        self.answers = LastAnswers() if isinstance(self.memory, ValueTracker) else None
        self._saving: Metrics = {}
        self.report: Path | None = None
        options = dict(data_path=config.data_path, seed=config.seed, options=config.task_options)
        self.task = task or load_task(config.task, reward=config.reward.functions or None, **options)  # type: ignore[arg-type]
        if "train" not in self.task.splits:
            raise ConfigError(f"task {self.task.name} has no split 'train'; it has {', '.join(self.task.splits)}")
        self._given_policy = policy

    # --- the run ------------------------------------------------------------------------------------------------------

    def run(self) -> list[dict[str, Any]]:
        """Train until the budget is used up or `stop_requested`; returns the lines of metrics.jsonl."""
        with ExitStack() as stack:
            stack.enter_context(self._lock_folder())
            self._start(stack)
            self.listener.started(self)
            if self.round == 0 and not read_metrics(self.folder):
                self._finish_round(Stopwatch(), {"round": 0})
            while not self.finished and not self.stop_requested:
                self.train_round()
            if self._saved_round != self.round:
                self._save()
        self.report = self._write_report()
        return read_metrics(self.folder)

    @property
    def finished(self) -> bool:
        """Whether the budget is used up: rounds, or generated tokens, or seconds, whichever comes first."""
        tokens, seconds = self.config.max_generated_tokens, self.config.max_seconds
        return (
            self.round >= self.config.max_rounds
            or (tokens is not None and self.generated_tokens >= tokens)
            or (seconds is not None and self.seconds >= seconds)
        )

    def train_round(self) -> None:
        """One round: rollouts, rewards, advantages, the update; then what is measured and saved."""
        clock, number = Stopwatch(), self.round + 1
        draw, usable = self.draw(number, clock)
        with clock.phase("update"):
            self.listener.phase("update")
            rewards, shaping = self.shape_rewards(draw)
            advantages, counted = self.compare(draw, rewards, usable)
            batch, replayed = self.with_replay(draw, advantages, counted, number)
            update = self.updater(batch, number)
            self._adapt_kl(shaping.get("kl", update.kl), len(draw))
        self.round = number
        self.generated_tokens += sum(draw.rollouts.lengths)
        metrics = {
            "round": number, **_reward_metrics(draw), **_rollout_metrics(draw.rollouts), **_update_metrics(update),
            **shaping, **replayed, "learning_rate": self.optimizer.learning_rate,
        }  # fmt: skip
        metrics["tokens/scored"] = update.tokens_scored + self._tokens_scored
        if self.config.rollout.dynamic_sampling:
            metrics |= {"rollout/queries": len(set(draw.queries)), "rollout/dropped": len(set(draw.queries[~usable]))}
        if self.config.log_rollouts_steps and number % self.config.log_rollouts_steps == 0:
            self._log_rollouts(draw, advantages)
        self._finish_round(clock, metrics)

    def draw(self, number: int, clock: Stopwatch) -> tuple[Draw, NDArray[np.bool_]]:
        """Rollouts of the next batch_size queries with their rewards, and which of them may be trained on, bool [B].

        With dynamic sampling, queries whose rollouts all earned the same are replaced by the ones that come next.
        """
        config, draws, taken, missing = self.config, [], set[int](), self.config.batch_size
        usable: list[NDArray[np.bool_]] = []
        for _ in range(1 + config.rollout.dynamic_sampling):
            queries = self._next_queries(missing, taken)
            if not queries:
                break
            draws.append(self._draw_queries(queries, number, clock))
            constant = constant_groups(draws[-1]) if config.rollout.dynamic_sampling else set()
            usable.append(np.array([query not in constant for query in draws[-1].queries.tolist()]))
            missing -= len(queries) - len(constant)
        return join(draws), np.concatenate(usable)

    def shape_rewards(self, draw: Draw) -> tuple[NDArray[np.float64], Metrics]:
        """Rewards [B], less the length penalty and the KL to the initial model where chosen; what these came to."""
        config, rollouts, rewards, metrics = self.config, draw.rollouts, draw.totals, Metrics()
        self._tokens_scored = 0
        if config.reward.length_penalty:
            first = config.reward.length_penalty_from
            excess = (np.array(rollouts.lengths) - first) / (config.max_completion_length - first)
            rewards = rewards - config.reward.length_penalty * excess.clip(0, 1)
        if self.kl_reference is not None:
            rows = range(len(draw))
            reference = self._score(self.kl_reference, rollouts, rows)
            logprobs = [rollouts.logprobs[rollouts.slice_of(i)] for i in rows]
            pairs = list(zip(logprobs, reference, strict=True))
            estimates = [float(kl_estimate(config.objective.kl, *pair).sum()) for pair in pairs]
            rewards = rewards - self.kl_coef * np.array(estimates)
            metrics["kl"] = float(torch.cat([kl_estimate("k3", *pair) for pair in pairs]).mean())
        if config.reward.length_penalty or self.kl_reference is not None:
            metrics["reward/shaped"] = float(rewards[draw.scored].mean()) if draw.scored.any() else None
        return rewards, metrics

    def compare(
        self, draw: Draw, rewards: NDArray[np.float64], usable: NDArray[np.bool_]
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Advantages [B], and which rollouts are trained on [B]; the others count in no sum and no normalizer."""
        config, counted = self.config, usable & draw.scored
        if config.rollout.keep:
            counted[counted] = most_varied(rewards[counted], draw.queries[counted], config.rollout.keep)
        if self.answers is not None:
            self._measure_movement(draw.queries[counted])
        advantages = np.zeros(len(draw), dtype=np.float32)
        advantages[counted] = compute_advantages(
            config.advantage, rewards[counted], draw.queries[counted], self.memory, advantage_options(config)
        )
        if self.answers is not None:
            first = np.flatnonzero(counted & (draw.attempts == 0))
            self.answers.add(draw.trajectories(advantages, first.tolist(), self.round + 1))
        if self.advantage.trains_on_first:
            counted &= draw.attempts == 0
        if config.rollout.mask_truncated:
            counted &= ~np.array(draw.rollouts.truncated)
        advantages[~counted] = 0
        return advantages, counted

    def with_replay(
        self, draw: Draw, advantages: NDArray[np.float32], counted: NDArray[np.bool_], number: int
    ) -> tuple[TrainingBatch, Metrics]:
        """The round's rollouts, and old ones with importance weights where replay is on; what was replayed."""
        batch, r = TrainingBatch(draw.rollouts, advantages, counted, fresh=len(draw)), self.config.replay
        if self.replay is None:
            return batch, {}
        old, young = self.replay.draw(
            round(r.ratio * int(counted.sum())), sampling=r.sampling, now=number, max_staleness=r.max_staleness,
            seed=self.config.seed,
        )  # fmt: skip
        self.replay.add(draw.trajectories(advantages, np.flatnonzero(counted).tolist(), number))
        metrics: Metrics = {
            "replay/rollouts": len(old),
            "replay/kept_fraction": young,
            **staleness_metrics(old, number),
        }
        if not old:
            return batch, metrics
        rollouts, of_old = replayed_rollouts(old, self.policy.device), np.array([t.advantage for t in old], np.float32)
        importance = None
        if r.correction != "none":
            rollouts, importance, weights = self._weigh(rollouts, of_old)
            importance = torch.cat([torch.ones_like(draw.rollouts.logprobs), importance])
            metrics |= weights
        joined = TrainingBatch(
            join_rollouts([draw.rollouts, rollouts]), np.concatenate([advantages, of_old]),
            np.concatenate([counted, np.ones(len(old), dtype=bool)]), fresh=len(draw), importance=importance,
            off_policy=r.correction == "none",
        )  # fmt: skip
        return joined, metrics

    # --- parts of a round ---------------------------------------------------------------------------------------------

    def _next_queries(self, count: int, taken: set[int]) -> list[int]:
        """The next positions in the training prompts that this round has not taken yet; fewer when none is left."""
        size, config, queries = len(self.train_prompts), self.config, list[int]()
        while len(queries) < count and len(taken) < size // config.batch_size * config.batch_size:
            (position,) = query_order(size, config.batch_size, config.seed, self.position, 1)
            self.position += 1
            if position not in taken:
                taken.add(position)
                queries.append(position)
        return queries

    def _draw_queries(self, positions: Sequence[int], number: int, clock: Stopwatch) -> Draw:
        prompts, n = self.train_prompts, self.config.num_generations
        rows = [i for i in positions for _ in range(n)]  # one a rollout, as everything below
        queries = np.array([prompts.indices[i] for i in rows])
        attempts = np.tile(np.arange(n), len(positions))
        examples = [prompts.examples[i] for i in rows]
        with clock.phase("rollout"):
            self.listener.phase("rollout")
            rollouts = self.engine.generate(
                [prompts.tokens[i] for i in positions], sequence_ids(TRAINING_STREAM, number, queries, attempts),
                seed=self.config.seed, sampling=self.sampling, n=n,
            )  # fmt: skip
            texts = completion_texts(rollouts.token_lists(), self.policy.tokenizer, self.policy.stop_tokens)  # type: ignore[arg-type]
        with clock.phase("reward"):
            self.listener.phase("reward")
            rewards = score(self.scorer, examples, texts)
        return Draw(queries, attempts, examples, rollouts, texts, rewards)

    def _weigh(self, rollouts: Rollouts, advantages: NDArray[np.float32]) -> tuple[Rollouts, torch.Tensor, Metrics]:
        """Replayed rollouts with today's log-probabilities, their truncated importance weights [N], and how these look.

        An objective's ratio then starts from today's policy, whatever policy drew the rollout (decoupled PPO,
        arXiv 2110.00641). Rollouts without a gradient are not scored and weigh 1.
        """
        every, r = self.updater.objective.every_token_counts, self.config.replay
        rows = [i for i in range(len(rollouts)) if every or advantages[i] != 0]
        today, logprobs = self._score(self.policy, rollouts, rows), rollouts.logprobs.clone()
        spans = [rollouts.slice_of(i) for i in rows]
        ratios = [now - logprobs[span] for span, now in zip(spans, today, strict=True)]
        weights, truncated = importance_weights(ratios, r.correction, r.importance_cap)
        importance = torch.ones_like(logprobs)
        for span, now, weight in zip(spans, today, weights, strict=True):
            logprobs[span], importance[span] = now, weight
        metrics: Metrics = {
            "replay/truncated_fraction": truncated,
            "replay/effective_sample_size": effective_sample_size(torch.cat(weights)) if weights else None,
        }
        return replace(rollouts, logprobs=logprobs), importance, metrics

    def _score(self, policy: Policy, rollouts: Rollouts, rows: Sequence[int]) -> list[torch.Tensor]:
        self._tokens_scored += sum(rollouts.lengths[i] for i in rows)
        return score_rollouts(
            policy, rollouts, rows,
            temperature=self.config.temperature, tokens_per_microbatch=self.config.tokens_per_microbatch,
        )  # fmt: skip

    def _measure_movement(self, queries: NDArray[np.int64]) -> None:
        """Tell the value tracker how far the policy moved since it last answered each query (k3 on that answer)."""
        assert self.answers is not None and isinstance(self.memory, ValueTracker)
        if last := self.answers.of(queries.tolist()):
            rollouts = replayed_rollouts(last, self.policy.device)
            today = self._score(self.policy, rollouts, range(len(last)))
            for i, (trajectory, now) in enumerate(zip(last, today, strict=True)):
                kl = kl_estimate("k3", rollouts.logprobs[rollouts.slice_of(i)], now).mean()
                self.memory.movement[trajectory.query] = float(kl)

    def _adapt_kl(self, kl: float | int | None, rollouts: int) -> None:
        """Move the KL coefficient towards its target (Ziegler et al. 2019, arXiv 1909.08593, section 2.2)."""
        target, horizon = self.config.kl.target, self.config.kl.horizon
        if target is not None and kl is not None:
            error = float(np.clip(kl / target - 1, -0.2, 0.2))
            self.kl_coef *= 1 + error * rollouts / horizon
            if self.config.kl.where == "loss":
                self.updater.objective = replace(self.updater.objective, kl_coef=self.kl_coef)

    # --- starting, measuring, saving ----------------------------------------------------------------------------------

    def _start(self, stack: ExitStack) -> None:
        """Load everything, from the beginning or from a checkpoint."""
        config = self.config
        found = self._find_checkpoint()
        source = config.model_name_or_path if found is None else str(found[0])
        self.policy = self._given_policy if found is None and self._given_policy else load_policy(source, config)
        if config.lora.rank and found is None:
            from bandit_rft.lora import add_adapter

            c = config.lora
            self.policy = add_adapter(self.policy, rank=c.rank, alpha=c.alpha, targets=c.targets, seed=config.seed)
        self.optimizer = PolicyOptimizer(
            self.policy.named_parameters(), learning_rate=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2), epsilon=config.adam_epsilon,
            weight_decay=config.weight_decay, max_grad_norm=config.max_grad_norm,
        )  # fmt: skip
        self._saved_round = -1
        if found is not None:
            path, state = found
            load_optimizer(path, self.optimizer)
            self._restore(path, state)
            logger.info("continuing from %s", path)
        self.kl_reference: Policy | None = None  # scored for a KL in the reward
        self.updater = self._make_updater()
        check_lengths(self.policy, config)
        self.sampling = Sampling(config.temperature, config.rollout.top_k, config.rollout.top_p, config.rollout.min_p)
        self.engine = RolloutEngine(
            self.policy, max_completion_length=config.max_completion_length, batch_size=config.rollout.batch_size
        )
        if self.policy.tokenizer is None:
            raise ValueError("policy.tokenizer is None: training needs one to turn prompts into tokens")
        chat = self.policy.tokenizer.chat_template is not None
        if config.chat_template == "never" and chat:
            logger.warning(
                "chat_template=never: a chat model gets bare prompts. Such a model rarely ends its turn and then earns "
                "nothing; use chat_template=auto unless you know better."
            )
        self.train_prompts = self._prompts("train")
        query_order(len(self.train_prompts), config.batch_size, config.seed, 0, 1)  # refuses a batch too large, now
        self._explain_history()
        limit = config.evaluation.max_queries
        names = config.evaluation.splits or list(self.task.splits)
        if missing := [name for name in names if name not in self.task.splits]:
            raise ConfigError(f"evaluation.splits: {missing[0]!r} is none of {', '.join(self.task.splits)}")
        self.evaluation_prompts = [self._prompts(name, limit) for name in names]
        self.scorer = stack.enter_context(make_scorer(self.task, config))
        if config.resume != "never" and found is None and read_metrics(self.folder):
            logger.warning("%s has metrics but no checkpoint: starting again from round 0", self.folder)
        (self.folder / "config.yaml").write_text(to_yaml(config))
        self.log = MetricsLog(
            self.folder, from_round=None if found is None else self.round,
            trackers=open_trackers(config.report_to, self.folder, asdict(config)),
        )  # fmt: skip
        stack.callback(self.log.close)

    def _make_updater(self) -> PolicyUpdater:
        config = self.config
        objective, reference = ops.PolicyObjective(**asdict(config.objective)), None
        if config.objective.kl_coef:
            if config.lora.rank:
                from bandit_rft.lora import base_policy

                reference = base_policy(self.policy)
            else:
                reference = load_policy(config.model_name_or_path, config)
                reference.model.requires_grad_(False)
            if config.kl.where == "reward":
                self.kl_reference, reference = reference, None
                objective = replace(objective, kl="none", kl_coef=0.0)
            else:
                objective = replace(objective, kl_coef=self.kl_coef)
        return PolicyUpdater(
            self.policy, self.optimizer, objective, reference=reference, temperature=config.temperature,
            tokens_per_microbatch=config.tokens_per_microbatch, epochs=config.update.epochs,
            minibatches=config.update.minibatches, seed=config.seed,
        )  # fmt: skip

    def _restore(self, path: Path, state: dict[str, Any]) -> None:
        """Take up the counters and what is remembered of earlier rounds."""
        self.round = self._saved_round = state["round"]
        self.position, self.kl_coef = state["position"], state["kl_coef"]
        self.generated_tokens, self.seconds = state["generated_tokens"], state["seconds"]
        arrays = load_arrays(path)
        for name, part in self._remembering().items():
            prefix = f"{name}|"
            part.restore({key.removeprefix(prefix): x for key, x in arrays.items() if key.startswith(prefix)})

    def _remembering(self) -> dict[str, Any]:
        """What is remembered across rounds besides weights and optimizer, by its name in replay.safetensors."""
        parts = {"history": self.memory, "replay": self.replay, "answers": self.answers}
        return {name: part for name, part in parts.items() if part is not None}

    def _explain_history(self) -> None:
        """Say so, before anything runs, when a query's past can never be compared with."""
        if self.memory is None:
            return
        prompts = [prompt_text(example.prompt) for example in self.train_prompts.examples]
        if repeated := len(prompts) - len(set(prompts)):
            logger.warning(
                "advantage=%s: %d training prompts are repeated; each repetition keeps a past of its own",
                self.config.advantage, repeated,
            )  # fmt: skip
        epochs = self.config.max_rounds * self.config.batch_size / max(len(prompts), 1)
        if epochs <= 1:
            logger.warning(
                "advantage=%s compares with earlier rewards of a query, but none of %d comes twice in %d rounds of %d",
                self.config.advantage, len(prompts), self.config.max_rounds, self.config.batch_size,
            )  # fmt: skip

    def _prompts(self, split: str, limit: int | None = None) -> PromptSet:
        assert self.policy.tokenizer is not None
        return PromptSet(
            split, self.task.splits[split], self.policy.tokenizer, chat_template=self.config.chat_template,
            max_prompt_length=self.config.max_prompt_length, limit=limit,
        )  # fmt: skip

    def _lock_folder(self) -> IO[str]:
        """Keep a second trainer out of the folder for as long as this process lives."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = (self.folder / ".lock").open("a")
        except OSError as error:
            raise ConfigError(f"output_dir={self.folder} cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise ConfigError(f"output_dir={self.folder} is in use by another trainer; choose another folder") from None
        return lock

    def _find_checkpoint(self) -> tuple[Path, dict[str, Any]] | None:
        resume = self.config.resume
        if resume == "never":
            if read_metrics(self.folder):
                raise ConfigError(
                    f"output_dir={self.folder} holds a run already and resume=never: choose another folder, "
                    "remove it, or continue it with --resume auto"
                )
            return None
        if resume != "auto":
            found: tuple[Path, dict[str, Any]] | None = (Path(resume), read_state(Path(resume)))
        else:
            found = latest_checkpoint(self.folder / "checkpoints")
        if found is not None:
            _refuse_other_run(found[1].get("config", {}), asdict(self.config), found[0])
        return found

    def _finish_round(self, clock: Stopwatch, metrics: Metrics) -> None:
        """Evaluate and save when it is time; the round's line is written before the checkpoint that claims it."""
        config, number = self.config, self.round
        self.seconds += float(clock.metrics()["seconds/round"] or 0.0) if number else 0.0
        last = self.finished or self.stop_requested
        if number == 0 or self.finished or (config.eval_steps and number % config.eval_steps == 0):
            with clock.phase("evaluate"):
                self.listener.phase("evaluate")
                metrics |= self.evaluate()
        metrics |= clock.metrics() | self._saving  # a checkpoint claims its round's line, so its time is in the next
        self._saving = {}
        self.log.write(metrics)
        if number and (last or (config.save_steps and number % config.save_steps == 0)):
            self._save()
        self.listener.round_done(metrics)

    def evaluate(self) -> Metrics:
        """Measure every evaluation split with the current weights and keep the completions."""
        metrics: Metrics = {}
        for prompts in self.evaluation_prompts:
            e = self.config.evaluation
            result = evaluate(
                self.engine, self.scorer, prompts,
                seed=self.config.seed, num_samples=e.num_samples, temperature=e.temperature, greedy=e.greedy,
            )  # fmt: skip
            metrics |= result.metrics
            write_parquet(
                self.folder / "evaluations" / f"round-{self.round:06d}-{prompts.name}.parquet", result.columns
            )
        return metrics

    def _save(self) -> None:
        self.log.sync()
        state = {
            "config": asdict(self.config), "torch": torch.__version__, "position": self.position,
            "kl_coef": self.kl_coef, "generated_tokens": self.generated_tokens, "seconds": self.seconds,
        }  # fmt: skip
        arrays = {f"{name}|{k}": x for name, part in self._remembering().items() for k, x in part.arrays().items()}
        clock, checkpoints = Stopwatch(), self.folder / "checkpoints"
        with clock.phase("checkpoint"):
            save_checkpoint(
                checkpoints, self.round, self.policy, self.optimizer, state, arrays, self.config.save_total_limit
            )
        self._saving = {"seconds/checkpoint": clock.metrics()["seconds/checkpoint"]}
        self._saved_round = self.round

    def _log_rollouts(self, draw: Draw, advantages: NDArray[np.float32]) -> None:
        rollouts = draw.rollouts
        spans = [rollouts.slice_of(i) for i in range(len(rollouts))]
        logprobs, entropy = rollouts.logprobs.cpu().numpy(), rollouts.entropy.cpu().numpy()
        write_parquet(
            self.folder / "rollouts" / f"round-{self.round:06d}.parquet",
            {
                "round": ("int32", [self.round] * len(rollouts)),
                "query": ("int64", draw.queries.tolist()),
                "rollout": ("int32", draw.attempts.tolist()),
                "prompt": ("string", [prompt_text(example.prompt) for example in draw.examples]),
                "completion": ("string", draw.texts),
                "answer": ("string", [answer_text(example) for example in draw.examples]),
                "reward": ("float64", draw.rewards.total),
                "advantage": ("float32", advantages.tolist()),
                "token_ids": ("list<int32>", rollouts.token_lists()),
                "logprobs": ("list<float32>", [logprobs[span] for span in spans]),
                "entropy": ("list<float32>", [entropy[span] for span in spans]),
                "truncated": ("bool", rollouts.truncated),
            },
        )

    def _write_report(self) -> Path | None:
        try:
            from bandit_rft.report import write_report

            return write_report(self.folder)
        except (ImportError, OSError, ValueError) as error:  # training is done and saved: nothing may be lost here
            logger.warning("no report was written: %s; `bandit-rft report %s` tries again", error, self.folder)
            return None


# ----------------------------------------------------------------------------------------------------------------------


def load_policy(name_or_path: str, config: Config) -> Policy:
    """The policy a config names; arithmetic-base is the model that comes with the package."""
    if name_or_path == "arithmetic-base":
        name_or_path = str(Path(__file__).parent / "assets" / "arithmetic-base")
    return Policy.load(name_or_path, dtype=config.dtype, device=config.device)


def make_scorer(task: Task, config: Config) -> RewardRunner:
    """The worker processes that score a task's completions."""
    r = config.reward
    return RewardRunner(
        task.rewards, r.weights or task.reward_weights, timeout_s=r.timeout_s, memory_mb=r.memory_mb, workers=r.workers,
        on_error=r.on_error,
    )  # fmt: skip


def check_lengths(policy: Policy, config: Config) -> None:
    """Refuse prompts and completions that together are longer than the model has positions for (ConfigError)."""
    limit = getattr(policy.model.config.get_text_config(), "max_position_embeddings", None)
    total = config.max_prompt_length + config.max_completion_length
    if limit is not None and total > limit:
        raise ConfigError(
            f"max_prompt_length={config.max_prompt_length} + max_completion_length={config.max_completion_length} is "
            f"more than the model's {limit} positions; lower one of them"
        )


def _reward_metrics(draw: Draw) -> Metrics:
    totals, queries, rewards = draw.totals[draw.scored], draw.queries[draw.scored], draw.rewards
    metrics: Metrics = {
        "reward": float(totals.mean()) if len(totals) else None,
        "reward_std": float(totals.std()) if len(totals) else None,
        "rewards/failures": sum(rewards.failures.values()),
    }
    for name, values in rewards.per_function.items():
        known = [value for value in values if value is not None]
        metrics[f"rewards/{name}"] = float(np.mean(known)) if known else None
    if len(queries) > len(np.unique(queries)):
        metrics["frac_reward_zero_std"] = len(constant_groups(draw)) / len(np.unique(draw.queries))
    return metrics


def _rollout_metrics(rollouts: Rollouts) -> Metrics:
    return {
        "entropy": float(rollouts.entropy.mean()),
        "completions/mean_length": float(np.mean(rollouts.lengths)),
        "completions/truncated_fraction": float(np.mean(rollouts.truncated)),
        "tokens/generated": sum(rollouts.lengths),
    }


def _update_metrics(update: Update) -> Metrics:
    d, metrics = update.logprob_differences, Metrics()
    metrics |= {
        "loss": update.loss,
        "kl": update.kl,
        "grad_norm": update.grad_norm,
        "sampler_trainer_logprob_diff/mean": float(d.mean()) if len(d) else None,
        "sampler_trainer_logprob_diff/max": float(d.max()) if len(d) else None,
        "tokens/trained": update.tokens_trained,
        "tokens/skipped": update.tokens_skipped,
    }
    if update.off_policy:
        names = {"ratio/mean": "ratio_mean"} | {
            f"clip_ratio/{k}": f"clip_fraction_{k}" for k in ("low", "high", "dual")
        }
        metrics |= {name: update.statistics.get(key) for name, key in names.items()}
    return metrics


def _refuse_other_run(before: dict[str, Any], now: dict[str, Any], path: Path) -> None:
    """Raise ConfigError when the checkpoint was made under settings that make this another run."""

    def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key, value in tree.items():
            name = f"{prefix}{key}"
            if name in MAY_CHANGE:
                continue
            out |= flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
        return out

    old, new = flat(before), flat(now)
    changed = [f"{key}: {old[key]!r} -> {new.get(key)!r}" for key in old if old[key] != new.get(key)]
    if changed:
        raise ConfigError(
            f"{path} was made with other settings ({'; '.join(changed)}): this would be neither run. Choose another "
            "output_dir, or put the settings back"
        )


__all__ = ["CheckpointError", "Listener", "Trainer", "load_policy", "make_scorer"]
