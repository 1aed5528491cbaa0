"""What a run leaves in its folder while it goes: lines, rollouts, evaluations, checkpoints; and how it is taken up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor

from bandit_rft.budget import evaluation_rollouts
from bandit_rft.checkpoint import load_arrays, save_checkpoint
from bandit_rft.config import to_yaml
from bandit_rft.data import prompt_text
from bandit_rft.evaluate import Evaluation, answer_text, evaluate
from bandit_rft.metrics import Metrics, MetricsLog, Stopwatch, open_trackers, read_metrics, write_parquet
from bandit_rft.model_card import model_card
from bandit_rft.paths import absolute, saved_tree
from bandit_rft.rollout_batch import RolloutBatch

if TYPE_CHECKING:
    from bandit_rft.trainer import Trainer


class Records:
    """The files of a trainer's run folder, which the caller has locked. With several ranks, the first one's alone.

    Args:
        trainer: whose parts are loaded, and whose counters are those of the round that was finished last.
        resumed: whether it continues from a checkpoint: what came after that is set aside.
    """

    def __init__(self, trainer: Trainer, *, resumed: bool):
        self.trainer, self.run_folder = trainer, trainer.run_folder
        self.folder = self.run_folder.path
        self.saved_round = trainer.round if resumed else -1
        self._saving: Metrics = {}
        config, start = trainer.config, trainer.round if resumed else None
        self.run_folder.set_aside(start)
        (self.folder / "config.yaml").write_text(to_yaml(config, self.folder))
        trackers = open_trackers(config.report_to, self.folder, asdict(config))
        self.log = MetricsLog(self.folder, from_round=start, trackers=trackers)

    def close(self) -> None:
        """Close the trackers."""
        self.log.close()

    @property
    def before_divergence(self) -> str:
        """What to do about a policy that has diverged."""
        return (
            f"What is in {self.run_folder.checkpoints} is from before: give a checkpoint there as model_name_or_path, "
            "a new output_dir and a lower learning_rate"
        )

    def line(self, metrics: Metrics) -> Metrics:
        """Write a round's line; returns it, with the seconds of the checkpoint before, whose own line was written."""
        metrics, self._saving = metrics | self._saving, {}
        self.log.write(metrics)
        return metrics

    def rollouts(self, batch: RolloutBatch, texts: Sequence[str]) -> None:
        """Write a round's rollouts, with their completions as texts."""
        examples = [self.trainer.task.splits["train"][query] for query in batch.query.tolist()]
        prompts = [prompt_text(example.prompt) for example in examples]
        self.run_folder.write_rollouts(batch, prompts, texts, [answer_text(example) for example in examples])

    def evaluation(self) -> Metrics:
        """Measure every evaluation split with the current weights and keep the completions."""
        trainer, config = self.trainer, self.trainer.config
        metrics: Metrics = {}
        e, total = config.evaluation, evaluation_rollouts(config, map(len, trainer.data.evaluation))
        for prompts in trainer.data.evaluation:
            result = evaluate(
                trainer.engine, trainer.scorer, prompts,
                seed=config.seed, num_samples=e.num_samples, temperature=e.temperature, greedy=e.greedy,
                drawn=partial(trainer.listener.evaluated, total=total),
            )  # fmt: skip
            metrics |= result.metrics
            self._write_evaluation(f"round-{trainer.round:06d}-{prompts.name}.parquet", result)
        return metrics

    def _write_evaluation(self, name: str, result: Evaluation) -> None:
        write_parquet(self.run_folder.evaluations / name, result.columns)

    def checkpoint(self) -> None:
        """Save what continues the run.

        Raises:
            FloatingPointError: a weight is not finite; nothing is saved.
            OSError: the disk is full or read-only; every earlier checkpoint is untouched.
        """
        trainer = self.trainer
        if trainer.ahead is not None:
            trainer.ahead.settle()
        trainer.ranks.gather()
        if not all(bool(parameter.isfinite().all()) for parameter in trainer.policy.parameters()):
            raise FloatingPointError(
                f"round {trainer.round} left weights that are not finite: the policy has diverged, nothing was saved. "
                f"{self.before_divergence}"
            )
        clock = Stopwatch()
        with clock.phase("checkpoint"):
            self._write_checkpoint(trainer.optimizer.state_tensors())
            trainer.ranks.from_first(trainer.round)  # no rank goes on, or ends with an error, before it is written
        self._saving = {"seconds/checkpoint": clock.metrics()["seconds/checkpoint"]}
        self.saved_round = trainer.round

    def _write_checkpoint(self, optimizer: Mapping[str, Tensor]) -> None:
        trainer, config = self.trainer, self.trainer.config
        self.log.sync()
        state = {
            "config": saved_tree(asdict(config), absolute), "folder": str(self.folder.resolve()),
            "data": trainer.data.fingerprints, "torch": torch.__version__, "position": trainer.position,
            "kl_coef": trainer.kl.coef, "generated_tokens": trainer.generated_tokens, "seconds": trainer.seconds,
            "course": trainer.learning_rate.course, "rewards": trainer.rewards,
            "model": trainer.initial.digest, "stop_tokens": trainer.policy.stop_tokens,
            "padding_token_ids": trainer.policy.padding_token_ids,
        }  # fmt: skip
        arrays = {f"{name}|{k}": x for name, part in _remembering(trainer).items() for k, x in part.arrays().items()}
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        card = model_card(config, trainer.task, read_metrics(self.folder), self.run_folder.evaluations, versions)
        save_checkpoint(
            self.run_folder.checkpoints, trainer.round, trainer.policy, optimizer, state, arrays,
            config.save_total_limit, card,
        )  # fmt: skip


class OtherRecords(Records):
    """Of a rank that is not the first: it takes part in what is measured and gathered, and writes nothing."""

    def __init__(self, trainer: Trainer, *, resumed: bool):
        self.trainer, self.run_folder = trainer, trainer.run_folder
        self.saved_round = trainer.round if resumed else -1

    def close(self) -> None:
        """Nothing is open."""

    def line(self, metrics: Metrics) -> Metrics:
        """The line, which the first rank writes."""
        return metrics

    def rollouts(self, batch: RolloutBatch, texts: Sequence[str]) -> None:
        """Nothing: the first rank has all of them."""

    def _write_evaluation(self, name: str, result: Evaluation) -> None:
        pass

    def _write_checkpoint(self, optimizer: Mapping[str, Tensor]) -> None:
        pass


def restore(trainer: Trainer, path: Path, state: dict[str, Any]) -> None:
    """Give a trainer the counters of a checkpoint and what is remembered of earlier rounds."""
    trainer.round, trainer.position, trainer.kl.coef = state["round"], state["position"], state["kl_coef"]
    trainer.generated_tokens, trainer.seconds = state["generated_tokens"], state["seconds"]
    arrays = load_arrays(path)
    for name, part in _remembering(trainer).items():
        prefix = f"{name}|"
        part.restore({key.removeprefix(prefix): x for key, x in arrays.items() if key.startswith(prefix)})


def _remembering(trainer: Trainer) -> dict[str, Any]:
    """What is remembered across rounds besides weights and optimizer, by its name in replay.safetensors."""
    parts = {"history": trainer.memory, "replay": trainer.replay, "ahead": trainer.ahead, "queries": trainer.queries}
    return {name: part for name, part in parts.items() if part is not None}
