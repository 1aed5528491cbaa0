"""A real vLLM server on a CPU (`make test-vllm` makes the environment): pushes, training, a kill in mid-run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from tiny_models import character_tokenizer, save_tiny_llama, sums, tiny_llama

from bandit_rft.config import build_config
from bandit_rft.listener import Listener
from bandit_rft.metrics import read_metrics
from bandit_rft.model import Policy
from bandit_rft.rollout import Sampling, ServerEngine, sequence_ids
from bandit_rft.rollout.client import VllmClient
from bandit_rft.rollout.process import ServerProcess, vllm_command, vllm_environment
from bandit_rft.rollout.push import FolderPush, LoraPush
from bandit_rft.trainer import Trainer
from bandit_rft.update import score_rollouts

ROOT = Path(__file__).resolve().parents[2]
PYTHON = Path(os.environ.get("BANDIT_RFT_VLLM_PYTHON", ROOT / ".venv-vllm" / "bin" / "python"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3000),
    pytest.mark.skipif(not PYTHON.exists(), reason=f"no vLLM at {PYTHON}; make test-vllm makes one"),
]
#: vLLM's attention on a CPU takes heads of 32 and more.
MODEL = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
}  # fmt: skip
#: Of the server. Its start takes a minute on an idle machine, several on a busy one.
START_SECONDS = 1500.0
PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]


@pytest.fixture(scope="module", autouse=True)
def _small_server() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        yield


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """One server for several tests, started with a model of its own."""
    folder = tmp_path_factory.mktemp("vllm")
    process = ServerProcess(
        vllm_command(str(PYTHON), dtype="float32", max_length=64), vllm_environment(False), folder / "server.log"
    )
    process.start(save_tiny_llama(folder / "start", seed=9, **MODEL))
    yield process
    process.stop()


def gap(policy: Policy, batch: Any, temperature: float) -> float:
    scored = score_rollouts(policy, batch, temperature=temperature, tokens_per_microbatch=10**6)
    return float((scored - batch.logprobs).abs().max())


def test_three_pushes_to_and_fro(process: ServerProcess, tmp_path: Path) -> None:
    """The same prompts each time: prefixes that were cached with other weights must be forgotten."""
    policies = [Policy(tiny_llama(seed=seed, **MODEL), character_tokenizer()) for seed in (0, 1)]
    drawn = list[list[list[int]]]()
    for number, which in enumerate((0, 1, 0)):
        policy = policies[which]
        policy.mask_padding_tokens([0, 1])
        engine = ServerEngine(
            policy, [VllmClient(process.url, 300.0)], FolderPush(policy.save, tmp_path / "weights"),
            max_completion_length=12, retry_seconds=START_SECONDS, temperature=0.7,
        )  # fmt: skip
        canaries = engine.push(number, PROMPTS)
        assert canaries is not None and gap(policy, canaries, 0.7) < 1e-3
        ids = sequence_ids(0, list(range(12)))
        batch = engine.generate(PROMPTS, ids, seed=1, sampling=Sampling(temperature=0.7), n=4)
        assert gap(policy, batch, 0.7) < 1e-3 and set(batch.weight_version.tolist()) == {number}
        greedy = engine.generate(PROMPTS, ids[:3], seed=1, sampling=Sampling.greedy())
        assert gap(policy, greedy, 1.0) < 1e-3
        assert gap(policies[1 - which], batch, 0.7) > 0.05, "or the other model's would not be noticed"
        drawn.append(batch.token_lists())
        assert {t for tokens in drawn[-1] for t in tokens}.isdisjoint({0, 1})
    assert drawn[0] == drawn[2] != drawn[1], "a draw depends on the weights, its seed and its id"


def keys(tmp_path: Path, **overrides: Any) -> dict[str, Any]:
    model = save_tiny_llama(tmp_path / "model", **MODEL)
    return {
        "preset": "minimal", "model_name_or_path": str(model), "task": "arithmetic",
        "output_dir": str(tmp_path / "run"), "batch_size": 16, "max_rounds": 20, "learning_rate": 1e-2,
        "max_prompt_length": 12, "max_completion_length": 4,
        "save_steps": 0, "eval_steps": 0, "evaluation.max_queries": 7, "evaluation.greedy": False, "device": "cpu",
        "log_rollouts_steps": 0, "rollout.engine": "vllm", "rollout.retry_s": START_SECONDS,
        "rollout.max_logprob_gap": 1e-3, **overrides,
    }  # fmt: skip


@pytest.mark.parametrize("ahead", [0, 1])
def test_twenty_rounds_learn(process: ServerProcess, tmp_path: Path, ahead: int) -> None:
    off_policy = {"objective.kind": "importance_mask", "objective.dual_clip": None} if ahead else {}
    config = build_config(
        keys(
            tmp_path, **off_policy, **{"rollout.urls": [process.url], "rollout.ahead": ahead, "advantage": "batch_mean"}
        )
    )
    trainer = Trainer(config, task=sums())
    lines = trainer.run()
    assert all(0 <= line["canary/logprob_gap"] < 1e-3 for line in lines)
    first, last = (sum(line["reward"] for line in part) / 5 for part in (lines[1:6], lines[-5:]))
    assert last > first + 0.3, f"reward went from {first:.2f} to {last:.2f}"
    if ahead:
        assert [line["rollout/staleness/max"] for line in lines[1:]] == [0] + [1] * 19


def test_a_server_killed_in_mid_run_is_brought_back(tmp_path: Path) -> None:
    class Kill(Listener):
        def started(self, trainer: Trainer) -> None:
            self.trainer, self.killed = trainer, False

        def phase(self, name: str) -> None:
            if name == "rollout" and self.trainer.round == 2 and not self.killed:
                self.killed = True
                engine: Any = self.trainer.engine
                for process in psutil.Process(engine._process._process.pid).children():
                    process.kill()

    config = build_config(keys(tmp_path, **{"rollout.server_python": str(PYTHON), "max_rounds": 4}))
    listener = Kill()
    trainer = Trainer(config, listener, task=sums())
    trainer.run()
    lines = read_metrics(trainer.folder)
    assert listener.killed and trainer.round == 4 and all(line["canary/logprob_gap"] < 1e-3 for line in lines)
    assert lines[3]["rollout/retries"] > 0 and lines[3]["rollout/redrawn_stale"] > 0
    assert not [
        p for p in psutil.process_iter(["cmdline"]) if str(config.output_dir) in " ".join(p.info["cmdline"] or [])
    ]


def test_two_ranks_train_on_its_rollouts(tmp_path: Path) -> None:
    """The first starts it, pushes and asks; torchrun's variables say nothing to it."""
    values = keys(tmp_path, **{"rollout.server_python": str(PYTHON), "max_rounds": 3, "max_prompt_length": 40})
    options = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "bandit_rft"]
    done = subprocess.run([*command, "train", *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = read_metrics(tmp_path / "run")
    assert len(lines) == 4 and all(line["canary/logprob_gap"] < 1e-3 for line in lines)


def test_adapters(tmp_path: Path) -> None:
    """Each version under a name of its own, on a server that keeps the model below."""
    pytest.importorskip("peft")
    from bandit_rft.model.lora import add_adapter

    base = save_tiny_llama(tmp_path / "base", **MODEL)
    policy = add_adapter(Policy.load(str(base), device="cpu"), rank=4, alpha=8.0, targets=["all-linear"], seed=0)
    command = vllm_command(str(PYTHON), dtype="float32", max_length=64, lora_rank=4)
    process = ServerProcess(command, vllm_environment(True), tmp_path / "server.log")
    engine = ServerEngine(
        policy, [VllmClient(process.url, 300.0)], LoraPush(policy.save, tmp_path / "weights", base),
        max_completion_length=12, retry_seconds=START_SECONDS, process=process,
    )  # fmt: skip
    try:
        for version in range(3):
            with torch.no_grad():
                for parameter in policy.parameters():
                    parameter.add_(0.1 * torch.randn(parameter.shape))
            canaries = engine.push(version, PROMPTS)
            assert canaries is not None and gap(policy, canaries, 1.0) < 1e-3
    finally:
        engine.close()
