"""A run's folder: what lies where, who may write in it, how it is continued, and what is set aside and never deleted.

config.yaml          the resolved configuration
metrics.jsonl        one line a round
rollouts/            Parquet: round-N, and rounds-A-B for every ROUNDS_A_FILE rounds
evaluations/         Parquet: round-N-SPLIT
checkpoints/         checkpoint-N
set-aside/           what a continued run took back: later checkpoints, lines and rollouts
report.html
"""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock

from bandit_rft.advantages import ADVANTAGES
from bandit_rft.checkpoint import CheckpointError, LayoutError, latest_checkpoint, list_checkpoints, read_state
from bandit_rft.config import MAY_CHANGE, ConfigError, keys
from bandit_rft.inputs import reward_difference, same_functions
from bandit_rft.metrics import parse_metrics, read_metrics, write_parquet
from bandit_rft.options import fields_of
from bandit_rft.paths import same_place
from bandit_rft.rollout_batch import RolloutBatch
from bandit_rft.tasks import task_option_model
from bandit_rft.text import printable

logger = logging.getLogger(__name__)

#: Rollouts of so many rounds go into one Parquet file, once they are there.
ROUNDS_A_FILE = 50


class RunFolder:
    """The folder of one run. Nothing is written before `lock`."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.checkpoints, self.rollouts = self.path / "checkpoints", self.path / "rollouts"
        self.evaluations = self.path / "evaluations"
        self._singles: int | None = None  # files of one round's rollouts; None: to be counted

    @contextmanager
    def lock(self, wait_s: float = 0.0) -> Iterator[None]:
        """Keep other trainers out, for as long as the block runs or this process lives.

        Args:
            wait_s: seconds to wait for another one to leave.

        Raises:
            ConfigError: when the folder cannot be written or another trainer is in it.
        """
        lock = filelock.FileLock(self.path / ".lock")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=wait_s)
        except filelock.Timeout:
            raise ConfigError(f"output_dir={self.path} is in use by another trainer; choose another folder") from None
        except OSError as error:
            raise ConfigError(f"output_dir={self.path} cannot be written: {error.strerror}") from None
        try:
            yield
        finally:
            lock.release()

    def find_checkpoint(
        self, resume: str, config: Mapping[str, Any], rewards: Sequence[Mapping[str, Any]] = (),
        same_model: Callable[[Mapping[str, Any]], bool] = lambda state: True,
    ) -> tuple[Path, dict[str, Any]] | None:  # fmt: skip
        """The checkpoint to continue from and its state, or None for a new run.

        Args:
            resume: auto | never | a checkpoint folder.
            config: of the run that is about to start.
            rewards: its `inputs.reward_records`, as far as they are known.
            same_model: whether a run of this state began with the weights that the configuration names otherwise;
                asked last. By default that is left open.

        Raises:
            ConfigError: when the folder holds a run and resume is never or a checkpoint of another folder, or the
                checkpoint was made under other settings.
            CheckpointError: when the folder named is not there, or is no intact checkpoint.
        """
        used = bool(read_metrics(self.path) or list_checkpoints(self.checkpoints))  # by a run that began
        if resume == "never":
            if used:
                raise ConfigError(
                    f"output_dir={self.path} holds a run already and resume=never: choose another folder, "
                    "remove it, or continue it with --resume auto"
                )
            return None
        found = latest_checkpoint(self.checkpoints) if resume == "auto" else (Path(resume), _state_of(resume))
        if found is not None:
            _refuse_other_run(found[1], config, found[0], self.path, rewards, same_model)
        if resume != "auto" and used and Path(resume).resolve().parent != self.checkpoints.resolve():
            raise ConfigError(
                f"resume={resume} lies outside of {self.checkpoints}, and output_dir={self.path} holds a run already: "
                "rounds of both would stand in one metrics.jsonl. Choose another output_dir"
            )
        return found

    def set_aside(self, after: int | None) -> None:
        """Move what lies beyond round `after` (None: everything) out of the way of the rounds that will be run again.

        Nothing is deleted: later checkpoints, rollouts and evaluations, and metrics.jsonl as it was, with torn and
        doubled lines, go to a folder of their own, whose name a warning says.
        """
        self._singles = None
        last = -1 if after is None else after
        self._finish_merge()
        logged = [*self.rollouts.glob("round*.parquet"), *self.evaluations.glob("round-*.parquet")]
        beyond = [path for path in [*list_checkpoints(self.checkpoints), *sorted(logged)] if _round_of(path) > last]
        lines, torn = parse_metrics(self.path)
        later = [line for line in lines if line["round"] > last]
        doubled = len(lines) - len({line["round"] for line in lines})
        if not (beyond or later or torn or doubled):
            return
        taken = [int(m[1]) for path in (self.path / "set-aside").glob("*") if (m := re.match(r"(\d+)-", path.name))]
        number = 1 + max(taken, default=0)
        aside = self.path / "set-aside" / f"{number:03d}-after-round-{max(last, 0)}"
        aside.mkdir(parents=True)
        if lines or torn:
            shutil.copy2(self.path / "metrics.jsonl", aside)
        for path in beyond:
            target = aside / path.relative_to(self.path)
            target.parent.mkdir(exist_ok=True)
            if path.name.startswith("rounds-"):
                shutil.copy2(path, target)
                self._cut(path, last)
            else:
                path.rename(target)
        checkpoints = sum(path.name.startswith("checkpoint-") for path in beyond)
        logger.warning(
            "beyond round %d there were %d checkpoint(s), %d line(s) of metrics and %d torn one(s)%s: kept in %s",
            max(last, 0), checkpoints, len(later), torn, f", {doubled} doubled one(s)" if doubled else "", aside,
        )  # fmt: skip

    # --- rollouts -----------------------------------------------------------------------------------------------------

    def write_rollouts(
        self, batch: RolloutBatch, prompts: Sequence[str], texts: Sequence[str], answers: Sequence[str | None]
    ) -> None:
        """Log one round's rollouts: the columns of the batch, and the text of prompts, completions and answers [B]."""
        rewards = batch.reward.tolist()
        number = int(batch.round[0])
        write_parquet(
            self.rollouts / f"round-{number:06d}.parquet",
            {
                "round": ("int32", batch.round.tolist()),
                "query": ("int64", batch.query.tolist()),
                "rollout": ("int32", batch.attempt.tolist()),
                "prompt": ("string", prompts),
                "completion": ("string", texts),
                "answer": ("string", answers),
                "reward": ("float64", [None if reward != reward else reward for reward in rewards]),
                "advantage": ("float32", batch.advantage.tolist()),
                "token_ids": ("list<int32>", batch.token_lists()),
                "logprobs": ("list<float32>", [part.numpy() for part in batch.split(batch.logprobs)]),
                "entropy": ("list<float32>", [part.numpy() for part in batch.split(batch.entropy)]),
                "truncated": ("bool", batch.truncated.tolist()),
            },
        )
        # A look at the folder in every round would cost more than the file.
        counted = self._singles
        self._singles = len(list(self.rollouts.glob("round-*.parquet"))) if counted is None else counted + 1
        if self._singles >= ROUNDS_A_FILE:
            self._merge(sorted(self.rollouts.glob("round-*.parquet")))
            self._singles = None

    def _merge(self, singles: Sequence[Path]) -> None:
        """Many rounds' files as one, a row group a round; the many go only after the one is whole."""
        tables = {path: table for path in singles if (table := _read_row_groups(path)) is not None}
        if not tables:
            return
        whole = list(tables)
        name = f"rounds-{_round_of(whole[0]):06d}-{_round_of(whole[-1]):06d}.parquet"
        _write_row_groups(self.rollouts / name, [group for groups in tables.values() for group in groups])
        for path in whole:
            path.unlink()

    def _finish_merge(self) -> None:
        """Remove the single rounds that a file of many holds too: a kill came between the two."""
        for merged in sorted(self.rollouts.glob("rounds-*.parquet")):
            match = re.fullmatch(r"rounds-(\d+)-(\d+)", merged.stem)
            first, last = map(int, match.groups()) if match else (0, -1)
            singles = [path for path in self.rollouts.glob("round-*.parquet") if first <= _round_of(path) <= last]
            groups = _read_row_groups(merged) if singles else None
            held = {group["round"][0].as_py() for group in groups or ()}
            for path in singles:
                if _round_of(path) in held:
                    path.unlink()

    def _cut(self, path: Path, last: int) -> None:
        """Leave only rounds up to `last` in a file of many rounds."""
        if (groups := _read_row_groups(path)) is None:
            return
        tables = {group["round"][0].as_py(): group for group in groups}
        if kept := [number for number in tables if number <= last]:
            name = f"rounds-{kept[0]:06d}-{last:06d}.parquet"
            _write_row_groups(self.rollouts / name, [tables[number] for number in kept])
        path.unlink()


def checkpoint_of(path: Path, *, best: bool = False) -> tuple[Path, str]:
    """The checkpoint that is meant by a run's folder or by a checkpoint's own, and what it is called.

    Args:
        path: a run's folder, or any folder with a model.
        best: of a run, the kept checkpoint whose evaluation had the highest Pass@1 (on "test" where there is one, else
            on the first split that is not "train"), not the one that was written last.

    Raises:
        ConfigError: the run has no intact checkpoint, or none that was evaluated.
    """
    if (path / "config.json").is_file() or (path / "adapter_config.json").is_file():
        if best:
            raise ConfigError(f"{path} is a model, not a run: there is no best checkpoint to choose")
        return path, str(path)
    kept = list[Path]()
    for checkpoint in list_checkpoints(path / "checkpoints"):
        try:
            read_state(checkpoint)
        except LayoutError:  # of use for continuing a run alone
            pass
        except CheckpointError as error:
            logger.warning("%s", error)
            continue
        kept.append(checkpoint)
    if not kept:
        raise ConfigError(f"{path / 'checkpoints'} holds no intact checkpoint")
    if not best:
        return kept[-1], f"{kept[-1]}, the newest of {len(kept)}"
    lines = {f"checkpoint-{line['round']}": line for line in read_metrics(path)}
    measured = [(checkpoint, passes) for checkpoint in kept if (passes := _pass_at_1(lines.get(checkpoint.name, {})))]
    if not measured:
        raise ConfigError(f"no checkpoint in {path / 'checkpoints'} is of a round that was evaluated: see eval_steps")
    splits = [split for _, passes in measured for split in passes if split != "train"] or ["train"]
    split = "test" if "test" in splits else splits[0]
    chosen, passes = max(measured, key=lambda found: found[1].get(split, -math.inf))
    return chosen, (
        f"{chosen}, the best of {len(measured)} on {split} ({passes[split]:.3f} while training; chosen by that number, "
        "which flatters it)"
    )


def _pass_at_1(line: Mapping[str, Any]) -> dict[str, float]:
    return {
        key.split("/")[1]: value
        for key, value in line.items()
        if key.startswith("eval/") and key.endswith("/pass@1") and value is not None
    }


def _read_row_groups(path: Path) -> list[Any] | None:
    """A file's Arrow tables, one a round; None for a damaged file, which gets another name and is out of the way."""
    import pyarrow
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            groups = [file.read_row_group(number) for number in range(file.num_row_groups)]
        if all(len(group) and "round" in group.column_names for group in groups):
            return groups
        error: Exception | str = "it holds no rollouts"
    except (OSError, ValueError, pyarrow.ArrowException) as raised:
        error = raised
    damaged = path.with_name(path.name + ".damaged")
    path.rename(damaged)
    logger.warning("%s cannot be read (%s): kept as %s", path, printable(str(error), 200, one_line=True), damaged.name)
    return None


def _write_row_groups(path: Path, tables: Sequence[Any]) -> None:
    """Write Arrow tables as the row groups of one file; complete or absent."""
    import pyarrow.parquet as pq

    partial = path.with_suffix(".partial")
    with pq.ParquetWriter(partial, tables[0].schema) as writer:
        for table in tables:
            writer.write_table(table)
    partial.replace(path)


def _round_of(path: Path) -> int:
    """The last round of checkpoint-N, round-N.parquet, round-N-SPLIT.parquet or rounds-A-B.parquet."""
    match = re.match(r"(?:checkpoint-|round-|rounds-\d+-)(\d+)", path.name)
    return int(match[1]) if match else -1


def _state_of(resume: str) -> dict[str, Any]:
    """state.json of the checkpoint that the key `resume` names."""
    if not Path(resume).is_dir():
        raise CheckpointError(
            f"resume must be auto, never or the folder of a checkpoint; there is no folder {resume!r}"
        )
    try:
        return read_state(Path(resume))
    except CheckpointError as error:
        raise type(error)(f"resume={resume}: {error}") from None


def _refuse_other_run(
    state: Mapping[str, Any], now: Mapping[str, Any], path: Path, folder: Path, rewards: Sequence[Mapping[str, Any]],
    same_model: Callable[[Mapping[str, Any]], bool],
) -> None:  # fmt: skip
    """Raise ConfigError when the checkpoint was made under settings that make this another run."""
    old, new = _identity(state.get("config", {})), _identity(now)
    if "rewards" not in state and not old.get("reward.functions") and any(r["given"] != "name" for r in rewards):
        new.pop("reward.functions", None)  # an earlier version did not keep what a program gave
    saved_in = state.get("folder")
    before = Path(saved_in) if isinstance(saved_in, str) else None
    pairs = {key: (old.get(key, _DEFAULTS.get(key)), new.get(key, _DEFAULTS.get(key))) for key in {**old, **new}}
    changed = {
        key: f"{key}: {one!r} -> {other!r}"
        for key, (one, other) in pairs.items()
        if one != other
        and not same_place(key, one, before, other, folder)
        and not (key == "reward.functions" and same_functions(one, other))
    }
    model = changed.pop("model_name_or_path", None)  # a name says less than weights, which take long to read
    if not changed and rewards and state.get("rewards") and (other := reward_difference(state["rewards"], rewards)):
        changed["rewards"] = other
    if model is not None and (changed or not same_model(state)):
        changed["model_name_or_path"] = model
    if changed:
        raise ConfigError(
            f"{path} was made with other settings ({'; '.join(changed.values())}): this would be neither run. Choose "
            "another output_dir, or put the settings back"
        )


#: What a key is where a checkpoint of an earlier version does not say it.
_DEFAULTS = {key.name: key.default for key in keys().values()}


def _identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """What makes a configuration the run that it is, by dotted key: options that are not given have their default."""
    task, advantage = str(config.get("task", "")), ADVANTAGES.get(str(config.get("advantage")))
    models = {"task_options": task_option_model(task), "advantage_options": advantage and advantage.option_model}
    defaults = {
        key: {name: field.get_default(call_default_factory=True) for name, field in fields_of(model).items()}
        for key, model in models.items()
    }
    whole = {**config, **{key: {**options, **(config.get(key) or {})} for key, options in defaults.items()}}

    def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key, value in tree.items():
            if (name := f"{prefix}{key}") not in MAY_CHANGE:
                out |= flat(value, f"{name}.") if isinstance(value, dict) and value else {name: value}
        return out

    return flat(json.loads(json.dumps(whole, default=repr)))  # as a checkpoint has it
