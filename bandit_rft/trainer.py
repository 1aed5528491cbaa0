"""The training loop: draw, score, compare, update, log. `Trainer.train_round` is one round, top to bottom.

What is not here: the rollout engine (rollout/), the loss and its gradients (ops/), advantages (advantages.py).
"""

from __future__ import annotations

import fcntl
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from bandit_rft import ops
from bandit_rft.advantages import compute_advantages
from bandit_rft.checkpoint import CheckpointError, latest_checkpoint, load_optimizer, read_state, save_checkpoint
from bandit_rft.config import Config, ConfigError, check_config, to_yaml
from bandit_rft.data import PromptSet, batch_of_round, completion_texts, prompt_text, score
from bandit_rft.evaluate import answer_text, evaluate
from bandit_rft.metrics import Metrics, MetricsLog, Stopwatch, open_trackers, read_metrics, write_parquet
from bandit_rft.optimizer import PolicyOptimizer
from bandit_rft.policy import Policy
from bandit_rft.rewards import RewardResult, RewardRunner
from bandit_rft.rollout import RolloutEngine, Rollouts, Sampling, sequence_ids
from bandit_rft.tasks import Task, load_task

logger = logging.getLogger(__name__)

TRAINING_STREAM = 0
#: Keys that may change between a run and its continuation; any other would make it another run.
MAY_CHANGE = {
    "output_dir", "max_rounds", "save_steps", "save_total_limit", "eval_steps", "log_rollouts_steps", "resume",
    "report_to", "device", "preset", "data_path", "model_name_or_path", "rollout.batch_size", "reward.timeout_s",
    "reward.memory_mb", "reward.workers", "evaluation", "tokens_per_microbatch",
}  # fmt: skip


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


@dataclass(frozen=True)
class Update:
    """What one optimizer step did."""

    loss: float
    grad_norm: float
    kl: float | None  # k3 estimate against the initial model, None without a KL term
    tokens_trained: int
    tokens_skipped: int
    tokens_scored: int  # by the reference model
    logprob_differences: Tensor  # |sampler - trainer| of every token computed, float32 on the host


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
        self.objective = ops.PolicyObjective(**asdict(config.objective))
        self.folder = Path(config.output_dir)
        self.stop_requested = False
        self.round = 0
        self._saving: Metrics = {}
        self.report: Path | None = None
        options = dict(data_path=config.data_path, seed=config.seed, options=config.task_options)
        self.task = task or load_task(config.task, reward=config.reward.functions or None, **options)  # type: ignore[arg-type]
        if "train" not in self.task.splits:
            raise ConfigError(f"task {self.task.name} has no split 'train'; it has {', '.join(self.task.splits)}")
        self._given_policy = policy

    # --- the run ------------------------------------------------------------------------------------------------------

    def run(self) -> list[dict[str, Any]]:
        """Train to max_rounds (or until `stop_requested`); returns the lines of metrics.jsonl."""
        with ExitStack() as stack:
            stack.enter_context(self._lock_folder())
            self._start(stack)
            self.listener.started(self)
            if self.round == 0 and not read_metrics(self.folder):
                self._finish_round(Stopwatch(), {"round": 0})
            while self.round < self.config.max_rounds and not self.stop_requested:
                self.train_round()
            if self._saved_round != self.round:
                self._save()
        self.report = self._write_report()
        return read_metrics(self.folder)

    def train_round(self) -> None:
        """One round: rollouts, rewards, advantages, one update; then what is measured and saved."""
        config, clock = self.config, Stopwatch()
        number = self.round + 1
        batch = batch_of_round(len(self.train_prompts), config.batch_size, number, config.seed)
        prompts = [self.train_prompts.tokens[i] for i in batch]
        rows = [i for i in batch for _ in range(config.num_generations)]  # one a rollout, as everything below
        queries = np.array([self.train_prompts.indices[i] for i in rows])
        attempts = np.tile(np.arange(config.num_generations), len(batch))
        examples = [self.train_prompts.examples[i] for i in rows]

        with clock.phase("rollout"):
            self.listener.phase("rollout")
            ids = sequence_ids(TRAINING_STREAM, number, queries, attempts)
            rollouts = self.engine.generate(
                prompts, ids, seed=config.seed, sampling=self.sampling, n=config.num_generations
            )
            texts = completion_texts(rollouts.token_lists(), self.policy.tokenizer, self.policy.stop_tokens)  # type: ignore[arg-type]
        with clock.phase("reward"):
            self.listener.phase("reward")
            rewards = score(self.scorer, examples, texts)
            scored = np.array([total is not None for total in rewards.total])
            totals = np.array([np.nan if total is None else total for total in rewards.total])
        with clock.phase("update"):
            self.listener.phase("update")
            advantages = np.zeros(len(rollouts), dtype=np.float32)
            advantages[scored] = compute_advantages(config.advantage, totals[scored], queries[scored])
            update = self.update(rollouts, advantages, scored)
        self.round = number
        metrics = {
            "round": number, **_reward_metrics(rewards, totals[scored], queries[scored]), **_rollout_metrics(rollouts),
            **_update_metrics(update), "learning_rate": self.optimizer.learning_rate,
        }  # fmt: skip
        if config.log_rollouts_steps and number % config.log_rollouts_steps == 0:
            self._log_rollouts(rollouts, examples, queries, attempts, texts, rewards, advantages)
        self._finish_round(clock, metrics)

    def update(self, rollouts: Rollouts, advantages: np.ndarray, scored: np.ndarray) -> Update:
        """One optimizer step on B rollouts; advantages float32 [B], scored bool [B] (False: as if never drawn).

        A rollout of advantage zero has no gradient unless the KL or entropy term makes it count: it is dropped before
        the forward pass, but stays in the normalizer. So the step is the same, only cheaper.
        """
        lengths = np.asarray(rollouts.lengths)
        counts = scored & (self.objective.every_token_counts | (advantages != 0))
        normalizer = lengths[scored].sum() if self.objective.aggregation == "token-mean" else scored.sum()
        # Lengths side by side keep attention's layout tight; which micro-batch a rollout is in changes no gradient.
        order = sorted(np.flatnonzero(counts).tolist(), key=lambda i: -(len(rollouts.prompts[i]) + lengths[i]))
        losses, kls, differences = [], [], []
        for micro in micro_batches(order, rollouts, self.config.tokens_per_microbatch):
            result, behavior = self._forward_backward(micro, rollouts, advantages, float(max(normalizer, 1)))
            losses.append(result.loss.detach())
            kls.append(result.stats["kl_k3"] * result.stats["tokens_computed"])
            differences.append((result.logprobs - behavior).abs())
        loss = float(torch.stack(losses).sum()) if losses else 0.0
        if not np.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} in round {self.round + 1}: the update was not applied")
        difference = torch.cat(differences).float().cpu() if differences else torch.zeros(0)
        trained = int(lengths[counts].sum())
        kl = float(torch.stack(kls).sum()) / max(trained, 1) if self.reference is not None and kls else None
        return Update(
            loss=loss,
            grad_norm=float(self.optimizer.step()),
            kl=kl,
            tokens_trained=trained,
            tokens_skipped=int(lengths.sum()) - trained,
            tokens_scored=trained if self.reference is not None else 0,
            logprob_differences=difference[~difference.isnan()],
        )

    def _forward_backward(
        self, micro: Sequence[int], rollouts: Rollouts, advantages: np.ndarray, normalizer: float
    ) -> tuple[ops.PolicyLoss, Tensor]:
        """Add the gradient of some rollouts to the buffers; the loss, and the behavior log-probabilities [N]."""
        policy, device = self.policy, self.policy.device
        pack = pack_for_training(micro, rollouts, device)
        hidden = policy.hidden_states(pack.input_ids, pack.lengths).index_select(0, pack.predicting)
        reference_logprobs: Any = None
        if self.reference is not None:
            with torch.no_grad():
                states = self.reference.hidden_states(pack.input_ids, pack.lengths).index_select(0, pack.predicting)
                reference_logprobs = ops.linear_logprobs(
                    states, self.reference.weight, pack.targets,
                    temperature=self.config.temperature, **self.reference.head_options,
                )  # fmt: skip
        # With one update a round the sampler's policy is this policy: the ratio is 1 by definition, not by rounding.
        corrects = self.objective.kind == "importance"
        result = ops.linear_policy_loss(
            hidden, policy.weight, pack.targets, torch.from_numpy(advantages[list(micro)]).to(device), pack.cu_seqlens,
            objective=self.objective, behavior_logprobs=pack.behavior_logprobs if corrects else None,
            reference_logprobs=reference_logprobs, temperature=self.config.temperature, normalizer=normalizer,
            weight_grad=self.optimizer.grad_buffer(policy.weight), **policy.head_options,
        )  # fmt: skip
        result.loss.backward()
        return result, pack.behavior_logprobs

    # --- starting, measuring, saving ----------------------------------------------------------------------------------

    def _start(self, stack: ExitStack) -> None:
        """Load everything, from the beginning or from a checkpoint."""
        config = self.config
        found = self._find_checkpoint()
        source = config.model_name_or_path if found is None else str(found[0])
        self.policy = self._given_policy if found is None and self._given_policy else load_policy(source, config)
        self.optimizer = PolicyOptimizer(
            self.policy.named_parameters(), learning_rate=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2), epsilon=config.adam_epsilon,
            weight_decay=config.weight_decay, max_grad_norm=config.max_grad_norm,
        )  # fmt: skip
        self._saved_round = -1
        if found is not None:
            path, state = found
            load_optimizer(path, self.optimizer)
            self.round = self._saved_round = state["round"]
            logger.info("continuing from %s", path)
        self.reference: Policy | None = None
        if self.objective.kl_coef:
            self.reference = load_policy(config.model_name_or_path, config)
            self.reference.model.requires_grad_(False)
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
        batch_of_round(len(self.train_prompts), config.batch_size, 1, config.seed)  # refuses a batch too large, now
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

    def _prompts(self, split: str, limit: int | None = None) -> PromptSet:
        assert self.policy.tokenizer is not None
        return PromptSet(
            split, self.task.splits[split], self.policy.tokenizer, chat_template=self.config.chat_template,
            max_prompt_length=self.config.max_prompt_length, limit=limit,
        )  # fmt: skip

    def _lock_folder(self) -> IO[str]:
        """Keep a second trainer out of the folder for as long as this process lives."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = (self.folder / ".lock").open("a")
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
        last = number == config.max_rounds or self.stop_requested
        if number == 0 or number == config.max_rounds or (config.eval_steps and number % config.eval_steps == 0):
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
        state = {"config": asdict(self.config), "torch": torch.__version__}
        clock, checkpoints = Stopwatch(), self.folder / "checkpoints"
        with clock.phase("checkpoint"):
            save_checkpoint(checkpoints, self.round, self.policy, self.optimizer, state, self.config.save_total_limit)
        self._saving = {"seconds/checkpoint": clock.metrics()["seconds/checkpoint"]}
        self._saved_round = self.round

    def _log_rollouts(
        self, rollouts: Rollouts, examples: Sequence[Any], queries: np.ndarray, attempts: np.ndarray,
        texts: list[str], rewards: RewardResult, advantages: np.ndarray,
    ) -> None:  # fmt: skip
        spans = [rollouts.slice_of(i) for i in range(len(rollouts))]
        logprobs, entropy = rollouts.logprobs.cpu().numpy(), rollouts.entropy.cpu().numpy()
        write_parquet(
            self.folder / "rollouts" / f"round-{self.round:06d}.parquet",
            {
                "round": ("int32", [self.round] * len(rollouts)),
                "query": ("int64", queries.tolist()),
                "rollout": ("int32", attempts.tolist()),
                "prompt": ("string", [prompt_text(example.prompt) for example in examples]),
                "completion": ("string", texts),
                "answer": ("string", [answer_text(example) for example in examples]),
                "reward": ("float64", rewards.total),
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


# --- parts of a round -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pack:
    """Some rollouts laid out for the update: T input tokens, N completion tokens, B sequences."""

    input_ids: Tensor  # int64 [T]; the last completion token predicts nothing and is left out
    lengths: list[int]  # of the B sequences in input_ids
    predicting: Tensor  # int64 [N], the rows of input_ids whose hidden state predicts a completion token
    targets: Tensor  # int64 [N]
    cu_seqlens: Tensor  # int32 [B + 1], in N
    behavior_logprobs: Tensor  # float32 [N]


def pack_for_training(rows: Sequence[int], rollouts: Rollouts, device: torch.device) -> Pack:
    """Lay out rollouts `rows` one after another, without padding."""
    spans = [rollouts.slice_of(i) for i in rows]
    prompts = [rollouts.prompts[i] for i in rows]
    completions = [rollouts.lengths[i] for i in rows]
    lengths = [len(prompt) + n - 1 for prompt, n in zip(prompts, completions, strict=True)]
    host = torch.empty(sum(lengths), dtype=torch.int64)
    tokens = rollouts.tokens.cpu()
    predicting, start = [], 0
    for prompt, span, length in zip(prompts, spans, lengths, strict=True):
        host[start : start + len(prompt)] = torch.tensor(prompt)
        host[start + len(prompt) : start + length] = tokens[span][:-1]
        predicting.append(torch.arange(start + len(prompt) - 1, start + length))
        start += length
    cu_seqlens = torch.tensor([0, *np.cumsum(completions)], dtype=torch.int32)
    return Pack(
        host.to(device), lengths, torch.cat(predicting).to(device), torch.cat([rollouts.tokens[s] for s in spans]),
        cu_seqlens.to(device), torch.cat([rollouts.logprobs[s] for s in spans]),
    )  # fmt: skip


def micro_batches(rows: Sequence[int], rollouts: Rollouts, token_limit: int) -> list[list[int]]:
    """Split rows, in order, into runs of at most token_limit tokens (a longer rollout is alone)."""
    batches: list[list[int]] = []
    used = 0
    for row in rows:
        tokens = len(rollouts.prompts[row]) + rollouts.lengths[row]
        if not batches or used + tokens > token_limit:
            batches.append([])
            used = 0
        batches[-1].append(row)
        used += tokens
    return batches


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
        on_error=r.on_error,  # type: ignore[arg-type]
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


def _reward_metrics(rewards: RewardResult, totals: np.ndarray, queries: np.ndarray) -> Metrics:
    metrics: Metrics = {
        "reward": float(totals.mean()) if len(totals) else None,
        "reward_std": float(totals.std()) if len(totals) else None,
        "rewards/failures": sum(rewards.failures.values()),
    }
    for name, values in rewards.per_function.items():
        known = [value for value in values if value is not None]
        metrics[f"rewards/{name}"] = float(np.mean(known)) if known else None
    if len(queries) > len(np.unique(queries)):
        groups = [totals[queries == query] for query in np.unique(queries)]
        metrics["frac_reward_zero_std"] = float(np.mean([(group == group[0]).all() for group in groups]))
    return metrics


def _rollout_metrics(rollouts: Rollouts) -> Metrics:
    return {
        "entropy": float(rollouts.entropy.mean()),
        "completions/mean_length": float(np.mean(rollouts.lengths)),
        "completions/truncated_fraction": float(np.mean(rollouts.truncated)),
        "tokens/generated": sum(rollouts.lengths),
    }


def _update_metrics(update: Update) -> Metrics:
    d = update.logprob_differences
    return {
        "loss": update.loss,
        "kl": update.kl,
        "grad_norm": update.grad_norm,
        "sampler_trainer_logprob_diff/mean": float(d.mean()) if len(d) else None,
        "sampler_trainer_logprob_diff/max": float(d.max()) if len(d) else None,
        "tokens/trained": update.tokens_trained,
        "tokens/skipped": update.tokens_skipped,
        "tokens/scored": update.tokens_scored,
    }


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


__all__ = ["CheckpointError", "Listener", "Trainer", "Update", "load_policy", "make_scorer", "micro_batches"]
