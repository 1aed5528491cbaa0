"""Trackers named in report_to: what they were told can be read back, by their own readers, without a network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_models import character_tokenizer, sums, tiny_llama

from bandit_rft.config import Config
from bandit_rft.metrics import MetricsLog, open_trackers, read_metrics
from bandit_rft.model import Policy
from bandit_rft.trainer import Trainer

LINES: list[dict[str, Any]] = [
    {"round": i, "reward": 0.25 * i, "loss": float("nan") if i == 1 else -0.5, "eval/test/pass@1": i / 8}
    for i in range(4)
]
WRITE = """
import json, sys
from pathlib import Path
from bandit_rft.metrics import MetricsLog, open_trackers
name, folder, lines = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
log = MetricsLog(folder, trackers=open_trackers([name], folder, {"seed": 3, "objective": {"kind": "ppo"}}))
for line in lines:
    log.write(line)
log.close()
"""


def write_elsewhere(name: str, folder: Path, **environment: str) -> None:
    """Write LINES to a tracker in a process of its own: wandb and trackio leave threads and hooks behind."""
    pytest.importorskip(name, reason="needs the extra tracking")
    folder.mkdir()
    command = [sys.executable, "-c", WRITE, name, str(folder), json.dumps(LINES)]
    result = subprocess.run(
        command, env={**os.environ, **environment}, cwd=folder, capture_output=True, text=True, timeout=280
    )
    assert result.returncode == 0, result.stderr
    assert [line["round"] for line in read_metrics(folder)] == [0, 1, 2, 3]


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="extra tracking")
    events = accumulator.EventAccumulator(str(folder / "tensorboard"), size_guidance={accumulator.SCALARS: 0})
    events.Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


# --- tensorboard ------------------------------------------------------------------------------------------------------


def test_a_training_run_in_tensorboard_is_its_metrics_jsonl(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs the extra tracking")
    config = Config(
        output_dir=str(tmp_path / "run"), max_rounds=2, batch_size=4, max_prompt_length=16, max_completion_length=4,
        eval_steps=0, report_to=["tensorboard"], device="cpu",
    )  # fmt: skip
    config.reward.workers = 1
    policy = Policy(tiny_llama(), character_tokenizer())
    lines = Trainer(config, model=policy, task=sums()).run()
    written = scalars(tmp_path / "run")
    expected = {(key, line["round"]): value for line in lines for key, value in line.items() if value is not None}
    assert len(lines) == 3 and {("reward", 1), ("reward", 2), ("eval/test/pass@1", 0)} <= set(expected)
    assert {(tag, step) for tag, values in written.items() for step in values} == set(expected)
    for (key, step), value in expected.items():
        assert written[key][step] == pytest.approx(value, rel=1e-6, abs=1e-12), key


def test_a_continued_run_replaces_the_rounds_it_runs_again(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs the extra tracking")
    first = MetricsLog(tmp_path, trackers=open_trackers(["tensorboard"], tmp_path, {}))
    for line in LINES:
        first.write(line)
    first.close()
    second = MetricsLog(tmp_path, from_round=1, trackers=open_trackers(["tensorboard"], tmp_path, {}))
    for number in (2, 3, 4):
        second.write({"round": number, "reward": 7.0 + number})
    second.close()
    written = scalars(tmp_path)
    assert written["reward"] == {0: 0.0, 1: 0.25, 2: 9.0, 3: 10.0, 4: 11.0}
    assert written["loss"] == {0: -0.5}  # NaN is left out, and rounds 2 and 3 have no loss any more
    assert [line["reward"] for line in read_metrics(tmp_path)] == list(written["reward"].values())


def test_rounds_are_there_while_the_run_is_still_open(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs the extra tracking")
    (tracker,) = open_trackers(["tensorboard"], tmp_path, {})
    tracker.log({"reward": 0.5}, 1)
    assert scalars(tmp_path)["reward"] == {1: 0.5}
    tracker.close()


def test_a_tracker_that_was_told_nothing_closes(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs the extra tracking")
    (tracker,) = open_trackers(["tensorboard"], tmp_path, {})
    tracker.close()
    assert not (tmp_path / "tensorboard").exists()


# --- wandb, trackio ---------------------------------------------------------------------------------------------------


def wandb_records(file: Path) -> Iterator[Any]:
    """The records of a .wandb file: LevelDB's log format, in blocks of 32 KiB, around protocol buffers."""
    from wandb.proto import wandb_internal_pb2

    data, place, parts = file.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # no room for a header: the rest of the block is padding
            place += 32768 - place % 32768
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def test_wandb_offline_holds_every_round(tmp_path: Path) -> None:
    folder = tmp_path / "my-run"
    write_elsewhere("wandb", folder, WANDB_MODE="offline", WANDB_SILENT="true", WANDB_DIR="/nowhere")
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    history, runs, config = [], [], {}
    for record in wandb_records(file):
        if record.WhichOneof("record_type") == "history":
            items = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
            history.append({key: value for key, value in items.items() if not key.startswith("_")})
            assert items["_step"] == items["round"]
        elif record.WhichOneof("record_type") == "run":
            runs.append((record.run.project, record.run.display_name, record.run.run_group))
            config |= {u.key: json.loads(u.value_json) for u in record.run.config.update}
    assert history == [{k: v for k, v in line.items() if v == v} for line in LINES]
    assert runs[0] == ("bandit_rft", "my-run", "my-run")
    assert config["seed"] == 3 and config["objective"] == {"kind": "ppo"}


def test_trackio_holds_every_round(tmp_path: Path) -> None:
    folder = tmp_path / "my-run"
    write_elsewhere("trackio", folder, TRACKIO_DIR=str(tmp_path / "trackio"), HF_HUB_OFFLINE="1")
    read = """
import json, trackio
from trackio.sqlite_storage import SQLiteStorage
(run,) = trackio.Api().runs("bandit_rft")
print(json.dumps([run.name, run.config, SQLiteStorage.get_logs("bandit_rft", run.name)]))
"""
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio")}
    result = subprocess.run([sys.executable, "-c", read], env=environment, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr
    name, config, logs = json.loads(result.stdout)
    assert name == "my-run" and config["seed"] == 3 and config["_Group"] == "my-run"
    rounds = [{key: log[key] for key in LINES[0] if key in log} for log in logs]
    assert rounds == [{k: v for k, v in line.items() if v == v} for line in LINES]
    assert [log["step"] for log in logs] == [0, 1, 2, 3]


# --- without the extra ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "module"), [("tensorboard", "tensorboard"), ("wandb", "wandb"), ("trackio", "trackio")]
)
def test_a_missing_tracker_names_the_extra(
    name: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for loaded in [m for m in sys.modules if m.partition(".")[0] == module or m.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"report_to: {name} is not installed; pip install 'bandit_rft\[tracking\]'"):
        open_trackers([name], tmp_path, {})
