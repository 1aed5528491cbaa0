"""A run folder under bad luck: torn lines, older checkpoints, lost checkpoints, a policy that diverged."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from tiny_models import save_tiny_llama, sums
from tiny_rewards import everything

from bandit_rft.checkpoint import (
    CheckpointError,
    LayoutError,
    latest_checkpoint,
    list_checkpoints,
    read_state,
    state_checksum,
)
from bandit_rft.config import Config, ConfigError, build_config
from bandit_rft.listener import Listener
from bandit_rft.metrics import MetricsLog, parse_metrics, read_metrics
from bandit_rft.rollout_batch import RolloutBatch
from bandit_rft.run_folder import ROUNDS_A_FILE, RunFolder
from bandit_rft.tasks import Task
from bandit_rft.trainer import Trainer

pq = pytest.importorskip("pyarrow.parquet")


@pytest.fixture
def configure(tmp_path: Path) -> Callable[..., Config]:
    model = save_tiny_llama(tmp_path / "model")

    def make(**overrides: Any) -> Config:
        values = {
            "preset": "minimal", "model_name_or_path": str(model), "task": "arithmetic", "batch_size": 6,
            "output_dir": str(tmp_path / "run"), "learning_rate": 1e-3, "max_prompt_length": 12,
            "max_completion_length": 4, "eval_steps": 0, "evaluation.max_queries": 2, "device": "cpu", **overrides,
        }  # fmt: skip
        return build_config(values)

    return make


def run(config: Config) -> Trainer:
    task = sums()
    trainer = Trainer(config, task=Task(task.name, task.splits, [everything]))
    trainer.run()
    return trainer


def rounds(folder: Path) -> list[int]:
    return [line["round"] for line in read_metrics(folder)]


def test_continuing_from_an_older_checkpoint_keeps_the_other_branch(
    configure: Callable[..., Config], caplog: pytest.LogCaptureFixture
) -> None:
    """The branch that `auto` continues is the one written last, whatever its numbers."""
    folder = run(configure(max_rounds=8, save_steps=1, save_total_limit=3)).folder
    older = folder / "checkpoints" / "checkpoint-6"
    weights = (older / "model.safetensors").read_bytes()
    with caplog.at_level(logging.WARNING):
        run(configure(max_rounds=7, save_steps=1, save_total_limit=3, resume=str(older)))
    (aside,) = (folder / "set-aside").iterdir()
    assert aside.name == "001-after-round-6" and "2 checkpoint(s), 2 line(s) of metrics" in caplog.text
    assert sorted(path.name for path in (aside / "checkpoints").iterdir()) == ["checkpoint-7", "checkpoint-8"]
    assert rounds(aside) == list(range(9)) and rounds(folder) == list(range(8))
    assert [path.name for path in list_checkpoints(folder / "checkpoints")] == ["checkpoint-6", "checkpoint-7"]
    assert (older / "model.safetensors").read_bytes() == weights
    run(configure(max_rounds=10, save_steps=1, save_total_limit=3))
    assert rounds(folder) == list(range(11))
    assert list_checkpoints(folder / "checkpoints")[-1].name == "checkpoint-10"


def test_checkpoints_are_rotated_by_when_they_were_written(configure: Callable[..., Config], tmp_path: Path) -> None:
    folder = run(configure(max_rounds=4, save_steps=1, save_total_limit=0)).folder / "checkpoints"
    assert [path.name[-1] for path in list_checkpoints(folder)] == ["1", "2", "3", "4"]
    newest = json.loads((folder / "checkpoint-4" / "state.json").read_text())["written_ns"]
    edit_state(folder / "checkpoint-2", written_ns=newest + 1)
    assert [path.name[-1] for path in list_checkpoints(folder)] == ["1", "3", "4", "2"]
    found = latest_checkpoint(folder)
    assert found is not None and found[0].name == "checkpoint-2"


def test_a_torn_line_costs_itself_alone(tmp_path: Path) -> None:
    lines = [json.dumps({"round": i, "reward": i / 10}) for i in range(6)]
    lines[2] = lines[2][:9]
    lines[4] = "[1, 2]"  # JSON, but no line of ours
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"round": 6, "rew')
    assert rounds(tmp_path) == [0, 1, 3, 5] and parse_metrics(tmp_path)[1] == 3
    before = (tmp_path / "metrics.jsonl").read_bytes()
    RunFolder(tmp_path).set_aside(5)
    MetricsLog(tmp_path, from_round=5).close()
    assert rounds(tmp_path) == [0, 1, 3, 5] and parse_metrics(tmp_path)[1] == 0
    (aside,) = (tmp_path / "set-aside").iterdir()
    assert (aside / "metrics.jsonl").read_bytes() == before


def test_a_finished_run_without_checkpoints_keeps_its_metrics(
    configure: Callable[..., Config], caplog: pytest.LogCaptureFixture
) -> None:
    folder = run(configure(max_rounds=3, save_steps=0)).folder
    first = read_metrics(folder)
    for path in list_checkpoints(folder / "checkpoints"):
        path.rename(folder / path.name)
    run(configure(max_rounds=2, save_steps=0))
    (aside,) = (folder / "set-aside").iterdir()
    assert read_metrics(aside) == first and rounds(folder) == [0, 1, 2]
    assert "has metrics but no checkpoint" in caplog.text and "001-after-round-0" in caplog.text
    with pytest.raises(ConfigError, match="holds a run already and resume=never"):
        run(configure(max_rounds=2, resume="never"))


def test_nothing_is_set_aside_where_nothing_lies_beyond(configure: Callable[..., Config]) -> None:
    folder = run(configure(max_rounds=2)).folder
    run(configure(max_rounds=4))
    assert not (folder / "set-aside").exists() and rounds(folder) == list(range(5))


def write_round(folder: RunFolder, number: int) -> None:
    tokens = torch.tensor([number, 2])
    batch = RolloutBatch.of([[1]], tokens, [2], torch.zeros(2), torch.zeros(2), [False], round=number, reward=np.nan)
    folder.write_rollouts(batch, ["p"], ["c"], [None])


def test_rollouts_of_many_rounds_go_into_few_files(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for number in range(1, 2 * ROUNDS_A_FILE + 4):
        write_round(folder, number)
    names = sorted(path.name for path in folder.rollouts.iterdir())
    n = ROUNDS_A_FILE
    assert (
        names[3:] == [f"rounds-000001-{n:06d}.parquet", f"rounds-{n + 1:06d}-{2 * n:06d}.parquet"] and len(names) == 5
    )
    stored = [i for name in names for i in pq.read_table(folder.rollouts / name)["round"].to_pylist()]
    assert sorted(stored) == list(range(1, 2 * n + 4))
    assert pq.read_table(folder.rollouts / names[0])["reward"].to_pylist() == [None]  # not scored: null, never NaN

    folder.set_aside(n + 7)  # continued from within a file
    names = sorted(path.name for path in folder.rollouts.iterdir())
    assert names == [f"rounds-000001-{n:06d}.parquet", f"rounds-{n + 1:06d}-{n + 7:06d}.parquet"]
    stored = [i for name in names for i in pq.read_table(folder.rollouts / name)["round"].to_pylist()]
    assert stored == list(range(1, n + 8))
    (aside,) = (tmp_path / "set-aside").iterdir()
    kept = [i for path in (aside / "rollouts").iterdir() for i in pq.read_table(path)["round"].to_pylist()]
    assert sorted(kept) == list(range(n + 1, 2 * n + 4))


def spoil(trainer: Trainer) -> None:
    next(iter(trainer.policy.parameters())).data.fill_(float("nan"))


@pytest.mark.parametrize("when", ["before the round", "in the update"])
def test_a_policy_that_diverged_stops_the_run_and_is_not_saved(
    configure: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    task = sums()
    trainer = Trainer(
        configure(max_rounds=9, save_steps=1, save_total_limit=1, eval_steps=0),
        task=Task(task.name, task.splits, [everything]),
    )
    whole = Trainer.train_round

    def train_round(self: Trainer) -> None:
        if self.round == 3:
            if when == "before the round":
                spoil(self)
            else:
                step = self.optimizer.step

                def spoiled() -> Any:
                    norm = step()
                    spoil(self)
                    return norm

                self.optimizer.step = spoiled  # type: ignore[method-assign]
        whole(self)

    monkeypatch.setattr(Trainer, "train_round", train_round)
    expected = "rollouts have log-probabilities" if when == "before the round" else "left weights"
    with pytest.raises(FloatingPointError, match=f"{expected} that are not finite"):
        trainer.run()
    (checkpoint,) = list_checkpoints(trainer.folder / "checkpoints")
    assert checkpoint.name == "checkpoint-3"
    tensors = safetensors.numpy.load_file(checkpoint / "model.safetensors")
    assert all(np.isfinite(x).all() for x in tensors.values())


@pytest.mark.parametrize("change", ["shuffled", "shorter", "one answer"])
def test_changed_data_are_noticed(configure: Callable[..., Config], change: str) -> None:
    run(configure(max_rounds=2))
    task = sums()
    train = list(task.splits["train"])
    if change == "shuffled":
        train = train[::-1]
    elif change == "shorter":
        train = train[:-1]
    else:
        train[3] = replace(train[3], columns={"answer": "0"})
    other = Task(task.name, {**task.splits, "train": train}, [everything])
    reason = {"shuffled": "another order", "shorter": "23 rows, where there were 24", "one answer": "first in row 3"}
    with pytest.raises(ConfigError, match=f"train: .*{reason[change]}"):
        Trainer(configure(max_rounds=4), task=other).run()


def test_other_evaluation_data_are_said(configure: Callable[..., Config], caplog: pytest.LogCaptureFixture) -> None:
    run(configure(max_rounds=2))
    task = sums()
    splits = {**task.splits, "test": list(task.splits["test"])[:-1]}
    Trainer(configure(max_rounds=3), task=Task(task.name, splits, [everything])).run()
    assert "is on different data (test: 6 rows, where there were 7)" in caplog.text


def test_a_checkpoint_of_another_layout_is_refused_by_name(configure: Callable[..., Config]) -> None:
    folder = run(configure(max_rounds=2, **{"replay.capacity": 9})).folder
    checkpoint = list_checkpoints(folder / "checkpoints")[-1]
    state = json.loads((checkpoint / "state.json").read_text())
    edit_state(checkpoint, layout=99)
    for found in (lambda: read_state(checkpoint), lambda: latest_checkpoint(folder / "checkpoints")):
        with pytest.raises(LayoutError, match="layout 99, of a later bandit_rft"):
            found()
    del state["layout"], state["state_sha256"]
    arrays = {"replay|prompt_lengths": np.array([2])}  # as the first version stored it
    safetensors.numpy.save_file(arrays, checkpoint / "replay.safetensors")
    del state["sha256"]["replay.safetensors"]
    (checkpoint / "state.json").write_text(json.dumps(state))
    with pytest.raises(LayoutError, match="keeps rollouts in layout 1"):
        latest_checkpoint(folder / "checkpoints")


def test_what_to_do_about_a_policy_that_diverged_can_be_done(configure: Callable[..., Config], tmp_path: Path) -> None:
    """A lower learning rate makes another run, which the same folder refuses: the advice must be another one."""
    run(configure(max_rounds=1, save_steps=1))
    task = sums()
    trainer = Trainer(configure(max_rounds=2), task=Task(task.name, task.splits, [everything]))
    trainer.listener = SpoilsTheUpdate(trainer)
    with pytest.raises(FloatingPointError) as error:
        trainer.run()
    advice = "give a checkpoint there as model_name_or_path, a new output_dir and a lower learning_rate"
    assert advice in str(error.value)
    saved = str(tmp_path / "run" / "checkpoints" / "checkpoint-1")
    again = run(configure(max_rounds=1, model_name_or_path=saved, output_dir=str(tmp_path / "b"), learning_rate=1e-4))
    assert again.round == 1


class SpoilsTheUpdate(Listener):
    """Weights become NaN when a round is about to draw."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def phase(self, name: str) -> None:
        if name == "rollout":
            spoil(self.trainer)


# --- a folder that was damaged, or is not the checkpoint's ------------------------------------------------------------


def stored_rounds(folder: RunFolder) -> list[int]:
    return sorted(i for p in folder.rollouts.glob("*.parquet") for i in pq.read_table(p)["round"].to_pylist())


def edit_state(checkpoint: Path, **changes: Any) -> None:
    """Change entries on purpose: the file's checksum is made anew."""
    state = json.loads((checkpoint / "state.json").read_text()) | changes
    del state["state_sha256"]
    state["state_sha256"] = state_checksum(state)
    (checkpoint / "state.json").write_text(json.dumps(state))


def test_a_clock_that_was_set_back_costs_no_checkpoint(configure: Callable[..., Config]) -> None:
    """The checkpoint just written is the newest, whatever the clock says: never rotated out, and continued from."""
    folder = run(configure(max_rounds=2, save_steps=1)).folder
    for checkpoint in list_checkpoints(folder / "checkpoints"):
        edit_state(checkpoint, written_ns=4 * 10**18 + int(checkpoint.name[-1]))
    run(configure(max_rounds=4, save_steps=1))
    assert [path.name for path in list_checkpoints(folder / "checkpoints")] == ["checkpoint-3", "checkpoint-4"]


@pytest.mark.parametrize("entry", ["round", "position", "generated_tokens", "seconds", "kl_coef", "written_ns", "seed"])
def test_one_changed_digit_in_a_state_is_a_broken_checkpoint(configure: Callable[..., Config], entry: str) -> None:
    """It would be valid JSON, and another counter, coefficient or configuration."""
    folder = run(configure(max_rounds=2, save_steps=1, **{"objective.kl": "k3", "objective.kl_coef": 0.25})).folder
    newest = folder / "checkpoints" / "checkpoint-2"
    text = (newest / "state.json").read_text()
    before, number, after = re.split(rf'(?<="{entry}": )([0-9])', text, maxsplit=1)
    (newest / "state.json").write_text(f"{before}{(int(number) + 1) % 10}{after}")
    with pytest.raises(CheckpointError, match=r"state\.json does not have the checksum it was saved with"):
        read_state(newest)
    found = latest_checkpoint(folder / "checkpoints")
    assert found is not None and found[0].name == "checkpoint-1"


def test_every_flipped_bit_of_a_state_is_noticed(configure: Callable[..., Config]) -> None:
    """But what says the same, such as white space, and the name under which the checksum stands."""
    checkpoint = run(configure(max_rounds=1)).folder / "checkpoints" / "checkpoint-1"
    data, expected = (checkpoint / "state.json").read_bytes(), read_state(checkpoint)
    del expected["state_sha256"]
    for place in range(0, len(data), 3):
        flipped = bytearray(data)
        flipped[place] ^= 1 << (place // 3 % 8)
        (checkpoint / "state.json").write_bytes(flipped)
        with contextlib.suppress(CheckpointError):
            found = read_state(checkpoint)
            assert {name: found[name] for name in expected} == expected, bytes(flipped[max(0, place - 20) : place + 20])


def test_a_state_of_before_there_was_a_checksum_is_read(configure: Callable[..., Config]) -> None:
    folder = run(configure(max_rounds=1)).folder
    file = folder / "checkpoints" / "checkpoint-1" / "state.json"
    state = json.loads(file.read_text())
    del state["state_sha256"]
    file.write_text(json.dumps(state, indent=1))
    assert rounds(run(configure(max_rounds=2)).folder) == [0, 1, 2]


@pytest.mark.parametrize(
    "changes",
    [
        {"position": "x"}, {"position": -1}, {"seconds": None}, {"kl_coef": "a"}, {"layout": "2"}, {"config": []},
        {"data": [1]}, {"data": {"train": {"rows": 3}}}, {"round": True}, {"round": -1}, {"generated_tokens": 1.5},
    ],
    ids=str,
)  # fmt: skip
def test_a_state_that_says_nonsense_is_a_broken_checkpoint(
    configure: Callable[..., Config], changes: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    folder = run(configure(max_rounds=2, save_steps=1)).folder
    newest = folder / "checkpoints" / "checkpoint-2"
    edit_state(newest, **changes)
    with pytest.raises(CheckpointError, match=f"no readable state.json .{next(iter(changes))} is"):
        read_state(newest)
    with caplog.at_level(logging.WARNING):
        run(configure(max_rounds=3, save_steps=1))
    assert "falling back to the checkpoint before it" in caplog.text and rounds(folder) == [0, 1, 2, 3]


def test_a_file_named_like_a_checkpoint_stops_no_rotation(configure: Callable[..., Config]) -> None:
    folder = run(configure(max_rounds=2, save_steps=1)).folder
    stray = folder / "checkpoints" / "checkpoint-0"
    stray.write_text("no folder")
    os.utime(stray, (1, 1))
    run(configure(max_rounds=3, save_steps=1))
    assert [path.name for path in list_checkpoints(folder / "checkpoints")] == ["checkpoint-2", "checkpoint-3"]


def test_a_checkpoint_of_another_folder_is_not_mixed_into_a_run(
    configure: Callable[..., Config], tmp_path: Path
) -> None:
    other = run(configure(max_rounds=2, save_steps=1, output_dir=str(tmp_path / "other"))).folder
    folder = run(configure(max_rounds=2, save_steps=1)).folder
    before = (folder / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match="holds a run already"):
        run(configure(max_rounds=3, resume=str(other / "checkpoints" / "checkpoint-1")))
    assert (folder / "metrics.jsonl").read_bytes() == before and len(list_checkpoints(folder / "checkpoints")) == 2
    run(configure(max_rounds=3, output_dir=str(tmp_path / "new"), resume=str(other / "checkpoints" / "checkpoint-1")))
    assert rounds(tmp_path / "new") == [2, 3]


def test_never_refuses_a_folder_that_has_only_checkpoints(configure: Callable[..., Config]) -> None:
    folder = run(configure(max_rounds=1)).folder
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(ConfigError, match="resume=never"):
        run(configure(max_rounds=2, resume="never"))
    assert list_checkpoints(folder / "checkpoints")


def test_a_set_aside_folder_that_was_removed_frees_no_number(tmp_path: Path) -> None:
    (tmp_path / "set-aside" / "002-after-round-0").mkdir(parents=True)
    (tmp_path / "metrics.jsonl").write_text('{"round": 0}\n{"round": 1}\n')
    RunFolder(tmp_path).set_aside(0)
    assert rounds(tmp_path / "set-aside" / "003-after-round-0") == [0, 1]


def test_doubled_lines_and_rounds_that_are_none(tmp_path: Path) -> None:
    """One line a round remains, the last; the file as it was is kept."""
    lines = [*({"round": i, "loss": 0.0} for i in (0, 2, 1)), {"round": 1, "loss": 1.0}, {"round": True}, {"round": -3}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert parse_metrics(tmp_path)[1] == 2
    RunFolder(tmp_path).set_aside(2)
    MetricsLog(tmp_path, from_round=2).close()
    assert rounds(tmp_path) == [0, 1, 2] and read_metrics(tmp_path)[1]["loss"] == 1.0
    (aside,) = (tmp_path / "set-aside").iterdir()
    assert len((aside / "metrics.jsonl").read_text().splitlines()) == 6


def test_a_kill_while_rollouts_are_merged_doubles_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, unlink, removed = RunFolder(tmp_path), Path.unlink, 0

    def killed(path: Path, missing_ok: bool = False) -> None:
        nonlocal removed
        if removed == 3:
            raise KeyboardInterrupt
        removed += 1
        unlink(path, missing_ok)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", killed)
        for number in range(1, ROUNDS_A_FILE + 1):
            write_round(folder, number)
    folder.set_aside(ROUNDS_A_FILE)
    for number in range(ROUNDS_A_FILE + 1, 2 * ROUNDS_A_FILE + 1):
        write_round(folder, number)
    assert stored_rounds(folder) == list(range(1, 2 * ROUNDS_A_FILE + 1))


def test_a_damaged_file_of_rollouts_stops_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, n = RunFolder(tmp_path), ROUNDS_A_FILE
    for number in range(1, n):
        write_round(folder, number)
    damaged = folder.rollouts / "round-000007.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-20])
    for number in range(n, 2 * n + 1):
        write_round(folder, number)
    assert stored_rounds(folder) == [i for i in range(1, 2 * n + 1) if i != 7]
    assert damaged.with_name("round-000007.parquet.damaged").exists() and "cannot be read" in caplog.text
    many = sorted(folder.rollouts.glob("rounds-*.parquet"))[-1]
    many.write_bytes(many.read_bytes()[:-20])
    folder.set_aside(n + 2)
    assert list((tmp_path / "set-aside").rglob(many.name)) and not many.exists()


def test_a_checkpoint_that_lost_its_optimizer_is_named(configure: Callable[..., Config]) -> None:
    checkpoint = run(configure(max_rounds=1)).folder / "checkpoints" / "checkpoint-1"
    (checkpoint.parent / ".partial-3-1").write_text("a file")  # no folder, as a kill leaves
    sums = json.loads((checkpoint / "state.json").read_text())["sha256"]
    edit_state(checkpoint, sha256={name: sum_ for name, sum_ in sums.items() if name != "optimizer.safetensors"})
    kept = (checkpoint / "optimizer.safetensors").read_bytes()
    (checkpoint / "optimizer.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="checkpoint-1"):
        run(configure(max_rounds=2))
    (checkpoint / "optimizer.safetensors").write_bytes(kept)
    assert rounds(run(configure(max_rounds=2)).folder) == [0, 1, 2]
