"""A run that is killed, at any moment, ends where it would have ended: the same weights, the same lines."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from paths import SUPPORT
from tiny_models import save_tiny_llama

from bandit_rft.checkpoint import CheckpointError, latest_checkpoint, list_checkpoints, read_state
from bandit_rft.metrics import read_metrics

pytestmark = pytest.mark.slow  # trainers that are killed

#: Kills in each of the two tests below; an hour's worth on demand: BANDIT_RFT_KILLS=100.
KILLS = int(os.environ.get("BANDIT_RFT_KILLS", "20"))
#: Enough that a run which gets a little further between kills is not over before the last of them.
ROUNDS = 40 if KILLS <= 20 else 3 * KILLS
#: Everything that is remembered across rounds, at once: reward history, replay, several updates, a moving coefficient,
#: a learning rate that rises and falls.
REMEMBERING = {
    "preset": "minimal", "task": "arithmetic", "device": "cpu", "batch_size": 6, "max_rounds": ROUNDS,
    "learning_rate": 1e-3, "max_prompt_length": 12, "max_completion_length": 8, "save_steps": 1, "eval_steps": 10,
    "evaluation.max_queries": 3, "evaluation.greedy": False, "log_rollouts_steps": 0,
    "advantage": "history_norm", "replay.capacity": 30, "replay.max_staleness": 6, "update.epochs": 2,
    "objective.kl": "k3", "objective.kl_coef": 0.05, "kl.target": 0.002, "kl.horizon": 100,
    "lr_scheduler_type": "cosine", "warmup_rounds": 5, "lr_scheduler_rounds": ROUNDS, "num_train_epochs": ROUNDS,
}  # fmt: skip
Values = dict[str, Any]


class Trainers:
    """Trainers in processes of their own, forked from one that has imported everything."""

    def __init__(self, errors: Path) -> None:
        self.errors = errors
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(
            [sys.executable, str(SUPPORT / "trainer_process.py")], text=True, env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors.open("a"), start_new_session=True,
        )  # fmt: skip

    def run(self, values: Values, meanwhile: Callable[[int], None] = lambda pid: None) -> int:
        """Train; `meanwhile` is told the process id. Returns the exit status (negative: the signal that killed it).

        `errors` then holds what this run wrote and nothing older: its file, too, counts for `file_size_limit`.
        """
        os.truncate(self.errors, 0)
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(values) + "\n")
        self.process.stdin.flush()
        meanwhile(int(self.process.stdout.readline()))
        return os.waitstatus_to_exitcode(int(self.process.stdout.readline()))


@pytest.fixture(scope="module")
def trainers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainers]:
    trainers = Trainers(tmp_path_factory.mktemp("trainers") / "errors")
    yield trainers
    os.killpg(trainers.process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> Values:
    return {**REMEMBERING, "model_name_or_path": str(save_tiny_llama(tmp_path_factory.mktemp("tiny")))}


@pytest.fixture(scope="module")
def whole(trainers: Trainers, values: Values, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    assert trainers.run({**values, "output_dir": str(folder)}) == 0, trainers.errors.read_text()[-2000:]
    return folder


def ends_like(folder: Path, whole: Path, rounds: int = ROUNDS) -> None:
    def lines(of: Path) -> list[Values]:
        return [{k: v for k, v in line.items() if not k.startswith("seconds/")} for line in read_metrics(of)]

    assert [line["round"] for line in lines(folder)] == list(range(rounds + 1))  # none lost, none doubled
    assert lines(folder) == lines(whole)
    for name in ("model.safetensors", "optimizer.safetensors", "replay.safetensors"):
        a, b = (of / "checkpoints" / f"checkpoint-{rounds}" / name for of in (folder, whole))
        assert hashlib.sha256(a.read_bytes()).digest() == hashlib.sha256(b.read_bytes()).digest(), name


def test_killed_at_random_moments(trainers: Trainers, values: Values, whole: Path, tmp_path: Path) -> None:
    """Every other kill comes at a random moment, the others while a checkpoint is being written."""
    moments, while_saving, killed = random.Random(7), 0, 0
    seconds = [line["seconds/round"] for line in read_metrics(whole)]
    typical = sorted(seconds)[len(seconds) // 2]

    def kill(pid: int) -> None:
        nonlocal while_saving
        start, checkpoints = time.monotonic(), tmp_path / "checkpoints"
        known = len(read_metrics(tmp_path))
        if killed % 2 == 0:  # somewhere in the next rounds, once training has begun
            while len(read_metrics(tmp_path)) <= known and time.monotonic() - start < 20:
                time.sleep(0.002)
            time.sleep(moments.uniform(0, 2 * typical))
        else:
            time.sleep(moments.uniform(0, typical))
            old = set(checkpoints.glob(".partial-*"))
            while not set(checkpoints.glob(".partial-*")) - old and time.monotonic() - start < 20:
                time.sleep(0.0005)
            time.sleep(moments.uniform(0, 0.01))
        os.kill(pid, signal.SIGKILL)
        while_saving += bool(list(checkpoints.glob(".partial-*")))

    while killed < KILLS:
        status = trainers.run({**values, "output_dir": str(tmp_path)}, kill)
        assert status == -signal.SIGKILL, trainers.errors.read_text()[-2000:]
        killed += 1
    assert while_saving >= 3, "too few kills came while a checkpoint was being written"
    assert trainers.run({**values, "output_dir": str(tmp_path)}) == 0, trainers.errors.read_text()[-2000:]
    ends_like(tmp_path, whole)
    print(f"{killed} kills, {while_saving} of them while a checkpoint was being written: nothing lost, nothing doubled")


def intact(checkpoint: Path) -> bool:
    """Whether it is whole: one that was being removed when its run was killed is not."""
    try:
        read_state(checkpoint)
    except CheckpointError:
        return False
    return True


def test_killed_and_continued_from_any_checkpoint(
    trainers: Trainers, values: Values, whole: Path, tmp_path: Path
) -> None:
    """Continued from older checkpoints as well as from the newest: later branches are kept aside, the end is equal."""
    values = {**values, "output_dir": str(tmp_path), "save_total_limit": 4}
    random_source, older = random.Random(11), 0
    seconds = [line["seconds/round"] for line in read_metrics(whole)]
    typical = sorted(seconds)[len(seconds) // 2]
    for _ in range(KILLS):
        saved = [path for path in list_checkpoints(tmp_path / "checkpoints") if intact(path)]
        resume = str(random_source.choice(saved)) if saved and random_source.random() < 0.5 else "auto"
        older += resume not in ("auto", str(saved[-1]) if saved else "")

        def kill(pid: int) -> None:
            start, known = time.monotonic(), time.time_ns()
            while (
                time.monotonic() - start < 20
            ):  # until it has saved again: it may have started anew or from further back
                with contextlib.suppress(FileNotFoundError):  # one is being rotated away
                    if any(path.stat().st_mtime_ns > known for path in (tmp_path / "checkpoints").glob("checkpoint-*")):
                        break
                time.sleep(0.002)
            time.sleep(random_source.uniform(0, 2 * typical))
            with contextlib.suppress(ProcessLookupError):  # it was done already
                os.kill(pid, signal.SIGKILL)

        status = trainers.run({**values, "resume": resume}, kill)
        assert status in (-signal.SIGKILL, 0), trainers.errors.read_text()[-2000:]
        lines = [line["round"] for line in read_metrics(tmp_path)]
        assert lines == list(range(len(lines))), "a line was lost or doubled"
    assert trainers.run(values) == 0, trainers.errors.read_text()[-2000:]
    ends_like(tmp_path, whole)
    assert older >= KILLS // 8 and len(list((tmp_path / "set-aside").iterdir())) >= older
    print(
        f"{KILLS} kills, {older} of them followed by a continuation from an older checkpoint: weights and lines equal"
    )


@pytest.mark.parametrize(
    "choices",
    [
        {"advantage": "spo", "update.minibatches": 2, "update.epochs": 1},
        {
            "advantage": "group_norm",
            "num_generations": 2,
            "rollout.dynamic_sampling": 2,
            "replay.sampling": "prioritized",
        },
        {"advantage": "reward", "replay.capacity": 0, "lora.rank": 4},
        {"advantage": "batch_mean", "queries.order": "learnable"},
    ],
    ids=lambda choices: choices["advantage"],
)
def test_stopped_at_an_epoch_boundary(trainers: Trainers, values: Values, tmp_path: Path, choices: Values) -> None:
    """24 prompts in batches of 6: round 4 ends an epoch."""
    values = {**values, **choices, "eval_steps": 0}
    assert trainers.run({**values, "max_rounds": 9, "output_dir": str(tmp_path / "whole")}) == 0
    for rounds in (4, 8, 9):
        assert trainers.run({**values, "max_rounds": rounds, "output_dir": str(tmp_path / "parts")}) == 0
    lines = {
        name: [
            {k: v for k, v in line.items() if not k.startswith(("seconds/", "eval/"))}
            for line in read_metrics(tmp_path / name)
        ]
        for name in ("whole", "parts")
    }
    assert lines["parts"] == lines["whole"] and len(lines["whole"]) == 10
    whole, parts = (tmp_path / of / "checkpoints" / "checkpoint-9" for of in ("whole", "parts"))
    names = {path.name for path in whole.glob("*.safetensors")}
    assert names == {path.name for path in parts.glob("*.safetensors")} and len(names) >= 2
    for name in names:
        assert (whole / name).read_bytes() == (parts / name).read_bytes(), name


@pytest.mark.parametrize("damage", ["torn", "flipped", "no state", "missing"])
def test_damaged_checkpoint_falls_back_to_the_one_before(
    trainers: Trainers, values: Values, whole: Path, tmp_path: Path, damage: str
) -> None:
    values = {**values, "output_dir": str(tmp_path), "save_total_limit": 3}
    assert trainers.run({**values, "max_rounds": 10}) == 0
    newest = list_checkpoints(tmp_path / "checkpoints")[-1]
    file = newest / ("state.json" if damage == "no state" else "replay.safetensors")
    data = bytearray(file.read_bytes())
    if damage == "flipped":
        data[len(data) // 2] ^= 4
    file.write_bytes(data[: len(data) // 2] if damage in ("torn", "no state") else data)
    if damage == "missing":
        file.unlink()
    found = latest_checkpoint(tmp_path / "checkpoints")
    assert found is not None and found[1]["round"] == 9
    assert trainers.run(values) == 0
    ends_like(tmp_path, whole)
    assert "falling back to the checkpoint before it" in trainers.errors.read_text()


def test_full_disk_loses_nothing(trainers: Trainers, values: Values, whole: Path, tmp_path: Path) -> None:
    """A file that cannot be written to its end: a clear error, the earlier checkpoints intact, the run continues."""
    values = {**values, "output_dir": str(tmp_path)}
    assert trainers.run({**values, "max_rounds": 10}) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "checkpoints" / "checkpoint-10").iterdir()}
    size = (tmp_path / "checkpoints" / "checkpoint-10" / "optimizer.safetensors").stat().st_size
    assert trainers.run({**values, "file_size_limit": size // 2}) == 1
    text = trainers.errors.read_text()
    assert "OSError: " in text, text[-2000:]
    error = text[text.rindex("OSError: ") :].splitlines()[0]  # a progress bar may stand around it
    assert "checkpoint-11" in error and "earlier checkpoints are untouched" in error, error
    assert all(path.read_bytes() == data for path, data in before.items())
    assert not list((tmp_path / "checkpoints").glob(".partial-*"))
    assert trainers.run(values) == 0
    ends_like(tmp_path, whole)


def test_folder_that_cannot_be_written(trainers: Trainers, values: Values, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    for folder in ("/sys/bandit_rft", tmp_path / "file" / "run"):
        assert trainers.run({**values, "output_dir": str(folder)}) == 1
        error = trainers.errors.read_text().splitlines()[-1]
        assert error.startswith(f"ConfigError: output_dir={folder} cannot be written"), error


def test_second_trainer_on_a_running_folder(trainers: Trainers, values: Values, whole: Path, tmp_path: Path) -> None:
    """The second one is refused by name, and the first does not notice."""
    other = Trainers(tmp_path / "errors")
    assert other.run({"preset": "demo", "output_dir": "/sys/bandit_rft"}) == 1  # it has imported everything by now
    values = {**values, "output_dir": str(tmp_path / "run")}

    def meanwhile(pid: int) -> None:
        while not (tmp_path / "run" / "metrics.jsonl").exists():
            time.sleep(0.01)
        assert other.run(values) == 1
        assert "is in use by another trainer" in (tmp_path / "errors").read_text()

    try:
        assert trainers.run(values, meanwhile) == 0
    finally:
        os.killpg(other.process.pid, signal.SIGKILL)
    ends_like(tmp_path / "run", whole)
