"""Training on rollouts from a server: what is pushed arrives or the run stops, with a checkpoint that continues it."""

from __future__ import annotations

import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from fake_vllm import FakeVllm
from paths import SUPPORT
from tiny_models import sums

from bandit_rft.audit import design_audit
from bandit_rft.checkpoint import list_checkpoints, read_state
from bandit_rft.config import Config, ConfigError, build_config
from bandit_rft.gates import CanaryError
from bandit_rft.listener import Listener
from bandit_rft.metrics import read_metrics
from bandit_rft.rollout import RolloutError
from bandit_rft.trainer import Trainer

RATIO = {"objective.kind": "importance_mask", "objective.dual_clip": None, "advantage": "batch_mean"}
AHEAD = {**RATIO, "rollout.ahead": 1}
DIFFERENT = ("seconds/", "rollout/retries", "rollout/redrawn", "rollout/garbled")


@pytest.fixture
def server(model_folder: Path) -> Iterator[FakeVllm]:
    server = FakeVllm(model_folder)
    yield server
    server.stop()


@pytest.fixture
def configure(model_folder: Path, server: FakeVllm, tmp_path: Path) -> Callable[..., Config]:
    def make(name: str = "run", **overrides: Any) -> Config:
        values = {
            "preset": "minimal", "model_name_or_path": str(model_folder), "task": "arithmetic", "batch_size": 8,
            "output_dir": str(tmp_path / name), "max_rounds": 5, "learning_rate": 1e-2, "max_prompt_length": 12,
            "max_completion_length": 4, "save_steps": 0, "eval_steps": 0, "evaluation.max_queries": 3, "device": "cpu",
            "evaluation.greedy": False, "rollout.engine": "vllm", "rollout.urls": [server.url], "rollout.retry_s": 2.0,
            "rollout.request_timeout_s": 20.0, "rollout.max_logprob_gap": 1e-3, "log_rollouts_steps": 0, **overrides,
        }  # fmt: skip
        return build_config(values)

    return make


class At(Listener):
    """Does something in a round: when it begins to be updated, or when it is done."""

    def __init__(self, number: int, do: Callable[[], None], phase: str | None = None):
        self.number, self.do, self.wanted = number, do, phase

    def started(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def phase(self, name: str) -> None:
        if name == self.wanted and self.trainer.round + 1 == self.number:
            self.do()

    def round_done(self, metrics: Any) -> None:
        if self.wanted is None and metrics["round"] == self.number:
            self.do()


def run(config: Config, listener: Listener | None = None) -> Trainer:
    trainer = Trainer(config, listener, task=sums())
    trainer.run()
    return trainer


def lines_of(config: Config) -> list[dict[str, Any]]:
    lines = read_metrics(Path(config.output_dir))
    return [{k: v for k, v in line.items() if not k.startswith(DIFFERENT)} for line in lines]


def assert_same(a: Trainer, b: Trainer) -> None:
    for x, y in zip(a.policy.parameters(), b.policy.parameters(), strict=True):
        assert torch.equal(x, y)
    assert lines_of(a.config) == lines_of(b.config)


def test_a_run_on_a_servers_rollouts(configure: Callable[..., Config], server: FakeVllm) -> None:
    trainer = run(configure(max_rounds=25))
    lines = read_metrics(trainer.folder)
    assert all(0 <= line["canary/logprob_gap"] < 1e-4 for line in lines)
    assert all(line["sampler_trainer_logprob_diff/rollout_max"] < 1e-4 for line in lines[1:] if line["tokens/trained"])
    assert sum(line["reward"] for line in lines[-5:]) > sum(line["reward"] for line in lines[1:6]) + 1, "it learns"
    assert server.version.endswith("-25") and not server.paused, "the last weights, for the last evaluation"
    assert lines[-1]["eval/test/pass@1"] is not None and server.calls["/collective_rpc"] == 26
    assert len(list((trainer.folder / "weights").iterdir())) == 2


@pytest.mark.parametrize("fault", ["stale", "wrong"])
def test_weights_that_did_not_arrive_stop_the_run(
    configure: Callable[..., Config], server: FakeVllm, fault: str
) -> None:
    """The gate's error; a checkpoint of the round before; continued, it ends as if nothing had happened."""
    whole = run(configure("whole"))
    config = configure()
    with pytest.raises(CanaryError, match=r"round 3: a completion that rollout server 1 drew right after a push"):
        run(config, At(3, lambda: setattr(server, fault, True)))
    (checkpoint,) = list_checkpoints(Path(config.output_dir) / "checkpoints")
    assert checkpoint.name == "checkpoint-3"
    with pytest.raises(CanaryError):  # nor is it continued while it lasts
        run(config)
    setattr(server, fault, False)
    assert_same(run(config), whole)


def test_one_stale_server_of_several_is_named(
    configure: Callable[..., Config], model_folder: Path, server: Any
) -> None:
    other = FakeVllm(model_folder)
    config = configure(**{"rollout.urls": [server.url, other.url]})
    with pytest.raises(CanaryError, match=r"rollout server 2 drew"):
        run(config, At(2, lambda: setattr(other, "stale", True)))
    other.stop()


def test_a_gap_may_be_left_to_the_ratios(
    configure: Callable[..., Config], server: FakeVllm, caplog: pytest.LogCaptureFixture
) -> None:
    config = configure(**RATIO, **{"rollout.on_logprob_gap": "correct"})
    with caplog.at_level(logging.WARNING):
        trainer = run(config, At(2, lambda: setattr(server, "wrong", True)))
    assert "Ratios to its log-probabilities correct for it" in caplog.text
    lines = read_metrics(trainer.folder)
    assert trainer.round == 5 and lines[1]["canary/logprob_gap"] < 1e-4 < 0.01 < lines[4]["canary/logprob_gap"]
    assert lines[1]["ratio/mean"] == pytest.approx(1, abs=1e-4) and abs(lines[4]["ratio/length_0/max"] - 1) > 1e-2


@pytest.mark.parametrize("keys", [{}, AHEAD], ids=["in step", "ahead"])
def test_a_server_that_is_gone_stops_the_run_and_it_continues(
    configure: Callable[..., Config], server: FakeVllm, keys: dict[str, Any]
) -> None:
    whole = run(configure("whole", **keys))
    config = configure(**keys)
    with pytest.raises(RolloutError, match=r"gave up after .*rollout.retry_s=2"):
        run(config, At(3, server.stop))
    (checkpoint,) = list_checkpoints(Path(config.output_dir) / "checkpoints")
    state = read_state(checkpoint)
    assert state["round"] == 3 and state["position"] == 3 * 8, "what was not trained on is drawn again"
    server.start()
    again = run(config)
    if not keys:
        assert_same(again, whole)
    else:  # the round that was being drawn was lost with the server, and is drawn by a policy one round younger
        ages = [line.get("rollout/staleness/max") for line in read_metrics(again.folder)]
        assert ages[1:] in ([0, 1, 1, 0, 1], [0, 1, 1, 1, 1]) and again.round == 5


def test_the_evaluation_may_fail_too(configure: Callable[..., Config], server: FakeVllm) -> None:
    """The round before it is done: its line and its checkpoint are written."""
    config = configure(eval_steps=3)
    with pytest.raises(RolloutError):
        run(config, At(3, server.stop, phase="update"))
    assert [line["round"] for line in read_metrics(Path(config.output_dir))] == [0, 1, 2, 3]
    assert [p.name for p in list_checkpoints(Path(config.output_dir) / "checkpoints")] == ["checkpoint-3"]
    server.start()
    assert run(config).round == 5


def test_a_server_restarted_in_mid_round_changes_nothing(configure: Callable[..., Config], server: FakeVllm) -> None:
    whole = run(configure("whole"))

    def restart() -> None:
        server.stop()
        server.start()

    again = run(configure(), At(3, restart, phase="rollout"))
    assert_same(again, whole)
    assert sum(line["rollout/redrawn_stale"] for line in read_metrics(again.folder)) > 0


# --- one round ahead --------------------------------------------------------------------------------------------------


def test_the_next_round_is_drawn_while_this_one_trains(configure: Callable[..., Config], server: FakeVllm) -> None:
    asked = dict[int, int]()
    config = configure(**AHEAD, max_rounds=4)

    class Watch(Listener):
        def started(self, trainer: Trainer) -> None:
            update = trainer.updater

            def watched(batch: Any, number: int, **options: Any) -> Any:
                deadline = time.monotonic() + 20
                while number < 4 and time.monotonic() < deadline and len(server.seeds) < asked.get(number - 1, 0) + 8:
                    time.sleep(0.01)
                asked[number] = len(server.seeds)
                assert options["off_policy"] and set(batch.weight_version.tolist()) == {max(number - 2, 0)}
                return update(batch, number, **options)

            trainer.updater = watched  # type: ignore[assignment]

    trainer = run(config, Watch())
    lines = read_metrics(trainer.folder)
    assert asked[3] >= asked[2] + 8 >= asked[1] + 16, "drawn before the update ended"
    assert [line["rollout/staleness/mean"] for line in lines[1:]] == [0, 1, 1, 1]
    assert all(line["canary/logprob_gap"] < 1e-4 for line in lines if "canary/logprob_gap" in line)
    assert lines[3]["ratio/mean"] != 1 and "ratio/length_0/max" in lines[3]
    assert trainer.position == 4 * 8


@pytest.mark.parametrize(("save_steps", "keys"), [(0, AHEAD), (1, AHEAD), (0, {**AHEAD, "queries.order": "learnable"})])
def test_ahead_continues_with_the_same_bits(
    configure: Callable[..., Config], save_steps: int, keys: dict[str, Any]
) -> None:
    """What was drawn ahead is in the checkpoint."""
    whole = run(configure("whole", **keys, save_steps=save_steps))
    config = configure(**keys, save_steps=save_steps)
    listener = At(3, lambda: None)
    listener.do = lambda: setattr(listener.trainer, "stop_requested", True)
    assert run(config, listener).round == 3
    assert_same(run(config), whole)


def test_late_ones_are_waited_for(configure: Callable[..., Config], server: FakeVllm) -> None:
    whole = run(configure("whole", **AHEAD))
    again = run(configure(**AHEAD), At(2, lambda: setattr(server, "delay", 0.2)))
    assert_same(again, whole)


# --- a server of the run's own ----------------------------------------------------------------------------------------

COMMAND = shlex.join([sys.executable, str(SUPPORT / "fake_vllm.py"), "--model", "{model}", "--port", "{port}"])
OWN = {"rollout.urls": [], "rollout.server_command": COMMAND, "rollout.retry_s": 120.0}


def servers() -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if any(part.endswith("fake_vllm.py") for part in command) and not any("keeper.py" in part for part in command):
            found.append(process)
    return found


@pytest.mark.slow
def test_a_server_of_its_own_is_brought_back_and_ended(configure: Callable[..., Config]) -> None:
    whole = run(configure("whole"))

    def kill() -> None:
        (process,) = servers()
        process.kill()

    config = configure(**OWN)
    again = run(config, At(3, kill, phase="rollout"))
    # That server has one thread and this process two: the same tokens and weights, log-probabilities but for rounding.
    assert all(map(torch.equal, again.policy.parameters(), whole.policy.parameters()))
    for line, expected in zip(lines_of(config), lines_of(whole.config), strict=True):
        assert line.keys() == expected.keys()
        for key, value in expected.items():
            assert line[key] is value or line[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key
    assert not servers()
    assert (again.folder / "server.log").read_text().count("$ ") == 2


@pytest.mark.slow
def test_a_server_that_cannot_be_started_is_said_to_be(configure: Callable[..., Config]) -> None:
    config = configure(**{**OWN, "rollout.server_command": f"{sys.executable} -c raise(SystemExit(3))"})
    with pytest.raises(RolloutError, match=r"died 5 times \(exit status 3; .*server.log has its output\)"):
        run(config)


@pytest.mark.slow
def test_a_killed_trainer_leaves_no_server(configure: Callable[..., Config], tmp_path: Path) -> None:
    config = configure(**OWN, max_rounds=1000)
    values = {key: getattr(config, key) for key in ("output_dir", "model_name_or_path")}
    line = [
        sys.executable, "-m", "bandit_rft", "train", "--preset", "minimal", "--task", "arithmetic", "--max_rounds",
        "1000", "--model_name_or_path", values["model_name_or_path"], "--output_dir", values["output_dir"],
        "--max_prompt_length", "40", "--max_completion_length", "4", "--device", "cpu", "--eval_steps", "0",
        "--evaluation.max_queries", "2", "--rollout.engine", "vllm", "--rollout.server_command", COMMAND,
    ]  # fmt: skip
    with (tmp_path / "output").open("w") as output:
        trainer = subprocess.Popen(line, stdout=output, stderr=output, start_new_session=True)
    deadline = time.monotonic() + 120
    while not (read_metrics(Path(values["output_dir"])) and servers()):
        assert time.monotonic() < deadline and trainer.poll() is None, (tmp_path / "output").read_text()[-2000:]
        time.sleep(0.2)
    os.kill(trainer.pid, signal.SIGKILL)
    trainer.wait()
    while servers():
        assert time.monotonic() < deadline
        time.sleep(0.1)


# --- keys -------------------------------------------------------------------------------------------------------------

VLLM = {"rollout.engine": "vllm", "rollout.urls": "http://localhost:8000"}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rollout.ahead": 1}, "rollout.ahead belongs to rollout.engine=vllm"),
        ({"rollout.urls": "http://a:1"}, "rollout.urls belongs to rollout.engine=vllm"),
        ({"rollout.on_logprob_gap": "correct"}, "rollout.on_logprob_gap belongs to rollout.engine=vllm"),
        ({"rollout.engine": "vllm"}, "needs one of rollout.urls"),
        ({**VLLM, "rollout.server_python": "/usr/bin/python3"}, "needs one of rollout.urls"),
        ({**VLLM, "rollout.urls": "localhost:8000"}, "must be addresses such as http://host:8000"),
        ({**VLLM, "rollout.top_k": 5}, "rollout.top_k does not go with rollout.engine=vllm"),
        ({**VLLM, "rollout.batch_size": 5}, "rollout.batch_size does not go with rollout.engine=vllm: a server makes"),
        ({**VLLM, "rollout.push": "lora"}, "rollout.push=lora with lora.rank=0"),
        ({**VLLM, "rollout.push": "folder", "lora.rank": 4}, "rollout.push=folder with lora.rank=4"),
        ({**VLLM, "dtype": "float64"}, "dtype=float64 does not go with rollout.engine=vllm"),
        ({**VLLM, "rollout.ahead": 2}, "rollout.ahead must be >= 0 and <= 1; got 2"),
        ({**VLLM, "rollout.ahead": 1, "replay.capacity": 9}, "replay.capacity does not go with rollout.ahead"),
        (
            {**VLLM, "rollout.ahead": 1, "num_generations": 2, "rollout.dynamic_sampling": 1},
            "rollout.dynamic_sampling does not go with rollout.ahead",
        ),
        (
            {**VLLM, "rollout.on_logprob_gap": "correct", "objective.kind": "reinforce", "objective.dual_clip": "null"},
            "needs an objective with a ratio",
        ),
        ({**VLLM, "rollout.enginee": "x"}, "did you mean rollout.engine?"),
    ],
)  # fmt: skip
def test_keys_that_do_not_go_together(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_config({"preset": "minimal", "task": "arithmetic", "model_name_or_path": "x", **keys})
    assert message in str(caught.value), str(caught.value)


def test_nccl_needs_a_gpu(configure: Callable[..., Config]) -> None:
    with pytest.raises(ConfigError, match=r"rollout.push=nccl sends from a GPU; the policy is on cpu"):
        run(configure(**{"rollout.push": "nccl"}))


def test_adapters(configure: Callable[..., Config], server: FakeVllm) -> None:
    pytest.importorskip("peft")
    trainer = run(configure(**{"lora.rank": 2, "max_rounds": 3}))
    lines = read_metrics(trainer.folder)
    assert all(line["canary/logprob_gap"] < 1e-4 for line in lines) and len(server.adapters) == 2
    assert json.loads((trainer.folder / "weights" / "step-3" / "adapter_config.json").read_text())["r"] == 2


def test_the_audit_says_who_draws() -> None:
    config = build_config({"preset": "single-rollout", "task": "arithmetic", "model_name_or_path": "arithmetic-base",
                           **VLLM, "rollout.ahead": 1})  # fmt: skip
    lines = list(design_audit(config))
    told = dict(lines)["drawn by"]
    assert "http://localhost:8000; weights pushed by folder" in told and "one version old" in told
    notes = [text for name, text in lines if name == "note"]
    assert not any("clipping never acts" in note for note in notes) and "0 B of KV cache" in dict(lines)["memory"]
    config.objective.kind, config.objective.dual_clip = "reinforce", None
    assert any("trained on uncorrected" in text for _, text in design_audit(config))
