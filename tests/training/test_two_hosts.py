"""A rollout server on one machine and its trainer on another: what the network does changes nothing that is learned."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import SUPPORT
from tiny_models import save_tiny_llama, sums
from two_hosts import TwoHosts, two_hosts_or_skip

from bandit_rft.checkpoint import list_checkpoints
from bandit_rft.config import build_config
from bandit_rft.listener import Listener
from bandit_rft.metrics import read_metrics
from bandit_rft.rollout import RolloutError
from bandit_rft.rollout.client import VllmClient
from bandit_rft.trainer import Trainer

pytestmark = pytest.mark.slow

ROUNDS, CUT = 4, 3
SERVER, TRAINER = 0, 1
#: Packets of a round that arrive before the cable is cut; a whole round is some hundred.
FEW = 60


hosts = pytest.fixture(two_hosts_or_skip, scope="module")


@pytest.fixture(autouse=True)
def whole_cable(hosts: TwoHosts) -> None:
    hosts.join()
    hosts.delay = hosts.loss = 0.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("model") / "start")


@pytest.fixture(scope="module")
def url(hosts: TwoHosts, model: Path) -> Iterator[str]:
    """A server on its own host, in a process of its own."""
    address = hosts.addresses[SERVER]
    command = [sys.executable, str(SUPPORT / "fake_vllm.py"), "--model", str(model), "--port", "8000"]
    server = subprocess.Popen([*hosts.command(SERVER), *command, "--host", address])
    try:
        client = VllmClient(f"http://{address}:8000", 5.0)
        hosts.run_on(TRAINER, lambda: client.wait_ready(60.0))
        yield client.url
    finally:
        server.kill()
        server.wait()


class InTheMiddle(Listener):
    """Does something as the rollouts of round CUT begin to be drawn."""

    def __init__(self, do: Callable[[], None]):
        self.do = do

    def started(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def phase(self, name: str) -> None:
        if name == "rollout" and self.trainer.round + 1 == CUT:
            self.do()


Train = Callable[..., Trainer]


@pytest.fixture(scope="module")
def train(hosts: TwoHosts, model: Path, url: str) -> Train:
    """A run on the trainer's host."""

    def run(folder: Path, listener: Listener | None = None, **overrides: Any) -> Trainer:
        config = build_config({
            "preset": "minimal", "model_name_or_path": str(model), "task": "arithmetic", "batch_size": 8,
            "output_dir": str(folder), "max_rounds": ROUNDS, "learning_rate": 1e-2, "max_prompt_length": 12,
            "max_completion_length": 4, "save_steps": 0, "eval_steps": 0, "device": "cpu", "log_rollouts_steps": 0,
            "evaluation.max_queries": 3, "evaluation.splits": ["test"], "evaluation.greedy": False,
            "rollout.engine": "vllm", "rollout.urls": [url], "rollout.retry_s": 30.0,
            "rollout.request_timeout_s": 1.5, "rollout.max_logprob_gap": 1e-3, **overrides,
        })  # fmt: skip

        def work() -> Trainer:
            trainer = Trainer(config, listener, task=sums())
            trainer.run()
            return trainer

        trainer: Trainer = hosts.run_on(TRAINER, work)
        return trainer

    return run


@pytest.fixture(scope="module")
def undisturbed(train: Train, hosts: TwoHosts, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    before = hosts.carried[SERVER][0]
    trainer = train(tmp_path_factory.mktemp("undisturbed"))
    assert hosts.carried[SERVER][0] - before > ROUNDS * FEW, "what is drawn came over the cable"
    return trainer


def assert_same_weights(a: Trainer, b: Trainer) -> None:
    assert a.round == b.round == ROUNDS
    for x, y in zip(a.policy.parameters(), b.policy.parameters(), strict=True):
        assert torch.equal(x, y)


def test_the_hosts_reach_each_other_alone(hosts: TwoHosts, url: str) -> None:
    from urllib.error import URLError
    from urllib.request import urlopen

    with pytest.raises(URLError):
        urlopen(f"{url}/health", timeout=2)
    assert hosts.run_on(TRAINER, lambda: urlopen(f"{url}/health", timeout=5).status) == 200


def test_a_slow_line_that_loses_packets_changes_nothing(
    train: Train, hosts: TwoHosts, undisturbed: Trainer, tmp_path: Path
) -> None:
    hosts.delay, hosts.loss = 0.02, 0.05
    assert_same_weights(train(tmp_path / "run"), undisturbed)


def test_a_cable_cut_in_mid_round_and_joined_again_changes_nothing(
    train: Train, hosts: TwoHosts, undisturbed: Trainer, tmp_path: Path
) -> None:
    """Longer than the limit of one call, so that the requests under way are sent again."""
    was_cut = threading.Event()

    def join_later() -> None:
        while not hosts.is_cut:
            time.sleep(0.01)
        was_cut.set()
        time.sleep(3.0)
        hosts.join()

    def cut() -> None:
        hosts.cut(after=FEW)
        threading.Thread(target=join_later, daemon=True).start()

    trainer = train(tmp_path / "run", InTheMiddle(cut))
    assert was_cut.is_set()
    assert_same_weights(trainer, undisturbed)
    lines = read_metrics(trainer.folder)
    assert lines[CUT]["rollout/retries"] > 0 and not any(lines[i]["rollout/retries"] for i in range(CUT))


def test_a_cable_that_stays_cut_stops_the_run_and_it_continues(
    train: Train, hosts: TwoHosts, undisturbed: Trainer, url: str, tmp_path: Path
) -> None:
    start = time.monotonic()
    with pytest.raises(RolloutError, match=rf"gave up after \d+ s \(rollout.retry_s=4\): {url}"):
        train(tmp_path / "run", InTheMiddle(lambda: hosts.cut(after=FEW)), **{"rollout.retry_s": 4.0})
    assert time.monotonic() - start < 30 and hosts.is_cut
    (checkpoint,) = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert checkpoint.name == f"checkpoint-{CUT - 1}", "of the last whole round"
    hosts.join()
    assert_same_weights(train(tmp_path / "run"), undisturbed)
