"""What a run writes down: metrics.jsonl (always), rollouts and evaluations as Parquet, and trackers by choice."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np

from bandit_rft.selection import constant_groups

if TYPE_CHECKING:
    from bandit_rft.rewards import RewardResult
    from bandit_rft.rollout_batch import RolloutBatch
    from bandit_rft.update import Update

Metrics = dict[str, float | int | None]


class Tracker(Protocol):
    """Where metrics go besides metrics.jsonl."""

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Record one round."""

    def close(self) -> None:
        """Flush and end."""


class MetricsLog:
    """metrics.jsonl of a run folder: one flat JSON object a round, each line written whole and flushed."""

    def __init__(self, folder: Path, *, from_round: int | None = None, trackers: Sequence[Tracker] = ()):
        """Open the log, with one line for each round up to `from_round` (None: none); the run writes the others again.

        What is left out must have been set aside before (run_folder.py).
        """
        self.path = folder / "metrics.jsonl"
        lines = {line["round"]: line for line in read_metrics(folder)}  # the last one, where a round has several
        kept = [lines[number] for number in sorted(lines) if from_round is not None and number <= from_round]
        temporary = self.path.with_suffix(".partial")
        with temporary.open("w") as file:
            file.writelines(json.dumps(line) + "\n" for line in kept)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)
        self._file = self.path.open("a")
        self._trackers = list(trackers)

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Append one round's metrics, `round` among them. NaN and infinity become null: JSON has neither."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
        self._file.write(json.dumps(clean) + "\n")
        self._file.flush()
        for tracker in self._trackers:
            tracker.log({k: v for k, v in clean.items() if v is not None}, int(metrics["round"]))

    def sync(self) -> None:
        """Make sure that what was written survives a power failure; called before a checkpoint claims the round."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file and the trackers."""
        self._file.close()
        for tracker in self._trackers:
            tracker.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, in order; lines torn by a kill or a bad disk are left out."""
    return parse_metrics(folder)[0]


def parse_metrics(folder: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines of a run's metrics.jsonl that are whole, in order, and how many are not."""
    path = folder / "metrics.jsonl"
    lines: list[dict[str, Any]] = []
    torn = 0
    for text in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        number = line.get("round") if isinstance(line, dict) else None
        if isinstance(number, int) and not isinstance(number, bool) and number >= 0:
            lines.append(line)
        else:
            torn += 1
    return lines, torn


class Stopwatch:
    """Seconds by phase of one round: `with clock.phase("rollout")`; `clock.metrics()` names them seconds/<phase>."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the seconds that the block takes to the phase `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def metrics(self) -> Metrics:
        """{"seconds/<phase>": ..., "seconds/round": since the stopwatch was made}."""
        return {
            **{f"seconds/{k}": v for k, v in self._seconds.items()},
            "seconds/round": time.perf_counter() - self._start,
        }


def write_parquet(path: Path, columns: Mapping[str, tuple[str, Sequence[Any]]]) -> None:
    """Write a table as Parquet: complete or absent, never half a file.

    Args:
        path: the file; its folder is made where it is missing.
        columns: (Arrow type as text, values) by name. Types: int32, int64, float32, float64, string, bool, and
            list<...> of them.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    def arrow(name: str) -> Any:
        return pa.list_(arrow(name[5:-1])) if name.startswith("list<") else pa.type_for_alias(name)

    table = pa.table({name: pa.array(values, type=arrow(kind)) for name, (kind, values) in columns.items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    pq.write_table(table, temporary)
    temporary.replace(path)


def open_trackers(names: Sequence[str], folder: Path, config: Mapping[str, Any]) -> list[Tracker]:
    """The trackers named in report_to.

    Args:
        names: of tensorboard, wandb, trackio.
        folder: the run folder; its name is the run's.
        config: the resolved configuration, which a tracker keeps.

    Raises:
        ImportError: a library is missing; says which extra to install.
    """
    return [_OPEN[name](folder, config) for name in names]


class _TensorBoard:
    """Event files in <folder>/tensorboard; a continued run replaces the rounds that it runs again."""

    def __init__(self, folder: Path, config: Mapping[str, Any]):
        with _tracking("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter
        self._folder, self._kind, self._writer = str(folder / "tensorboard"), SummaryWriter, cast(Any, None)

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        self._writer = self._writer or self._kind(self._folder, purge_step=step)
        for key, value in metrics.items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class _Run:
    """A run of W&B (in <folder>/wandb) or trackio (in TRACKIO_DIR); what continues it is another of the same group."""

    def __init__(self, module: str, folder: Path, config: Mapping[str, Any]):
        with _tracking(module):
            library = import_module(module)
        place = {"dir": str(folder)} if module == "wandb" else {}
        name = folder.resolve().name
        self._run: Any = library.init(project="bandit_rft", name=name, group=name, config=dict(config), **place)

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


@contextmanager
def _tracking(name: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        message = f"report_to: {name} is not installed; pip install 'bandit_rft[tracking]' ({error})"
        raise ImportError(message) from error


_OPEN: dict[str, Callable[[Path, Mapping[str, Any]], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": partial(_Run, "wandb"),
    "trackio": partial(_Run, "trackio"),
}


# --- the tables of a round's line ------------------------------------------------------------------------------------


def reward_metrics(batch: RolloutBatch, rewards: RewardResult) -> Metrics:
    """What a round's rollouts earned; where queries have several, also the share of constant groups."""
    reward, queries = batch.reward.numpy(), batch.query.numpy()
    scored = ~np.isnan(reward)
    totals = reward[scored]
    metrics: Metrics = {
        "reward": float(totals.mean()) if len(totals) else None,
        "reward_std": float(totals.std()) if len(totals) else None,
        "rewards/failures": sum(rewards.failures.values()),
    }
    for name, values in rewards.per_function.items():
        known = [value for value in values if value is not None]
        metrics[f"rewards/{name}"] = float(np.mean(known)) if known else None
    if scored.sum() > len(np.unique(queries[scored])):
        metrics["frac_reward_zero_std"] = len(constant_groups(reward, queries)) / len(np.unique(queries))
    return metrics


def rollout_metrics(batch: RolloutBatch) -> Metrics:
    """How a round's rollouts look."""
    return {
        "entropy": float(batch.entropy.mean()),
        "completions/mean_length": float(batch.lengths.numpy().mean()),
        "completions/truncated_fraction": float(batch.truncated.numpy().mean()),
        "tokens/generated": len(batch.tokens),
    }


def update_metrics(update: Update) -> Metrics:
    """What a round's update did."""
    d, metrics = update.logprob_differences, Metrics()
    metrics |= {
        "loss": update.loss,
        "kl": update.kl,
        "grad_norm": update.grad_norm,
        "sampler_trainer_logprob_diff/mean": float(d.mean()) if len(d) else None,
        "sampler_trainer_logprob_diff/max": float(d.max()) if len(d) else None,
        "sampler_trainer_logprob_diff/rollout_max": update.logprob_gap,
        "tokens/trained": update.tokens_trained,
        "tokens/skipped": update.tokens_skipped,
    }
    if update.off_policy:
        names = {"ratio/mean": "ratio_mean"} | {
            f"clip_ratio/{k}": f"clip_fraction_{k}" for k in ("low", "high", "dual")
        }
        metrics |= {name: update.statistics.get(key) for name, key in names.items()} | update.ratio_by_length
    return metrics
