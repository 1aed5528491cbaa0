"""torchrun over two machines: a slow line that loses packets changes nothing, and a cut one ends all ranks."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from paths import SUPPORT
from safetensors.torch import load_file
from tiny_models import save_tiny_llama
from two_hosts import TwoHosts, two_hosts_or_skip

from bandit_rft.checkpoint import list_checkpoints
from bandit_rft.study.status import last_line

pytestmark = pytest.mark.slow

ROUNDS = 20


hosts = pytest.fixture(two_hosts_or_skip, scope="module")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("model") / "start", vocab_size=49)


def start(hosts: TwoHosts, model: Path, folder: Path, port: int) -> list[subprocess.Popen[str]]:
    """A rank on each host."""
    keys = {
        "preset": "minimal", "model_name_or_path": model, "task": "arithmetic", "batch_size": 6, "max_rounds": ROUNDS,
        "output_dir": folder, "learning_rate": 1e-2, "max_prompt_length": 16, "max_completion_length": 4,
        "device": "cpu", "advantage": "batch_mean", "eval_steps": 0, "save_steps": 3, "log_rollouts_steps": 0,
        "evaluation.max_queries": 3, "evaluation.splits": "test", "evaluation.greedy": "false",
    }  # fmt: skip
    flags = [part for key, value in keys.items() for part in (f"--{key}", str(value))]
    ranks = []
    for host in (0, 1):
        where = ["--nnodes", "2", "--node_rank", str(host), "--nproc_per_node", "1"]
        where += ["--master_addr", hosts.addresses[0], "--master_port", str(port)]
        torchrun = [sys.executable, "-m", "torch.distributed.run", *where, str(SUPPORT / "impatient_rank.py")]
        network = ["env", f"GLOO_SOCKET_IFNAME={hosts.devices[host]}", "OMP_NUM_THREADS=1"]
        command = [*hosts.command(host), *network, *torchrun, "train", *flags]
        ranks.append(subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True))
    return ranks


def end(ranks: list[subprocess.Popen[str]]) -> tuple[list[int], str]:
    said = "".join(rank.communicate(timeout=90)[1] for rank in ranks)
    return [rank.returncode for rank in ranks], said


def same_weights(one: Path, other: Path) -> bool:
    a, b = (load_file(folder / "checkpoints" / f"checkpoint-{ROUNDS}" / "model.safetensors") for folder in (one, other))
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


@pytest.mark.timeout(300)
def test_a_cut_cable_ends_all_ranks_and_the_run_goes_on_over_a_bad_one(
    hosts: TwoHosts, model: Path, tmp_path: Path
) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "run"
    before = hosts.carried[0][1]
    statuses, said = end(start(hosts, model, whole, 29501))
    assert statuses == [0, 0], said
    assert (
        hosts.carried[0][1] - before
        > 2 * ROUNDS * sum(tensor.nbytes for tensor in load_file(model / "model.safetensors").values()) / 2
    ), "gradients and weights went over the cable"

    ranks = start(hosts, model, folder, 29502)
    while last_line(folder / "metrics.jsonl").get("round", 0) < 7:
        assert ranks[0].poll() is None
        time.sleep(0.02)
    hosts.cut(after=10)
    began = time.monotonic()
    statuses, said = end(ranks)
    assert time.monotonic() - began < 60 and all(statuses)
    assert "can be continued from its last checkpoint" in said
    saved = int(list_checkpoints(folder / "checkpoints")[-1].name.rpartition("-")[2])
    assert 6 <= saved < ROUNDS

    hosts.join()
    hosts.delay, hosts.loss = 0.002, 0.01
    statuses, said = end(start(hosts, model, folder, 29503))
    assert statuses == [0, 0], said
    assert same_weights(folder, whole)
