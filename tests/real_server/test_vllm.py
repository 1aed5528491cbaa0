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
from bandit_rft.rollout import RolloutEngine, Sampling, ServerEngine, sequence_ids
from bandit_rft.rollout.client import VllmClient
from bandit_rft.rollout.process import ServerProcess, vllm_command, vllm_environment
from bandit_rft.rollout.push import FolderPush
from bandit_rft.trainer import Trainer
from bandit_rft.update import score_rollouts

ROOT = Path(__file__).resolve().parents[2]
PYTHON = Path(os.environ.get("BANDIT_RFT_VLLM_PYTHON", ROOT / ".venv-vllm" / "bin" / "python"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3000),
    pytest.mark.skipif(not PYTHON.exists(), reason=f"no vLLM at {PYTHON}: `make test-vllm` makes one and runs these"),
]
#: vLLM's attention on a CPU takes heads of 32 and more.
MODEL = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
    "max_position_embeddings": 512,
}  # fmt: skip
#: Of the server. Its start takes a minute on an idle machine, several on a busy one.
START_SECONDS = 1500.0
#: A prefix is cached in blocks of 128 tokens: the last two prompts share two of them.
LONG = [5 + 7 * i % 11 for i in range(300)]
PROMPTS = [[5, 6, 7], LONG, [*LONG[:270], 6, 7]]


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
        vllm_command(str(PYTHON), dtype="float32", max_length=512), vllm_environment(False), folder / "server.log"
    )
    process.start(save_tiny_llama(folder / "start", seed=9, **MODEL))
    yield process
    process.stop()


def gap(policy: Policy, batch: Any, temperature: float) -> float:
    scored = score_rollouts(policy, batch, temperature=temperature, tokens_per_microbatch=10**6)
    return float((scored - batch.logprobs).abs().max())


def engine_of(policy: Policy, client: VllmClient, folder: Path) -> ServerEngine:
    return ServerEngine(
        policy, [client], FolderPush(policy.save, folder / "weights"), max_completion_length=12,
        retry_seconds=START_SECONDS, temperature=0.7,
    )  # fmt: skip


def test_three_pushes_to_and_fro(process: ServerProcess, tmp_path: Path) -> None:
    """The same prompts each time: prefixes that were cached with other weights must be forgotten."""
    policies = [Policy(tiny_llama(seed=seed, **MODEL), character_tokenizer()) for seed in (0, 1)]
    drawn = list[list[list[int]]]()
    for number, which in enumerate((0, 1, 0)):
        policy = policies[which]
        policy.mask_padding_tokens([0, 1])
        engine = engine_of(policy, VllmClient(process.url, 300.0), tmp_path)
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


class Forgetful(VllmClient):
    """Leaves out calls of a push."""

    def __init__(self, url: str, *routes: str):
        super().__init__(url, 300.0)
        self.routes = routes

    def _call(self, method: str, route: str, *args: Any, **options: Any) -> Any:
        return None if route in self.routes else super()._call(method, route, *args, **options)


@pytest.mark.parametrize(
    "left_out", [["/collective_rpc"], ["/pause", "/reset_prefix_cache"]], ids=["weights", "prefixes"]
)
def test_canaries_see_what_was_left_out(process: ServerProcess, tmp_path: Path, left_out: list[str]) -> None:
    """Weights that were not loaded, and prefixes of the old ones (which /pause forgets as well)."""
    old, new = (Policy(tiny_llama(seed=seed, **MODEL), character_tokenizer()) for seed in (0, 1))
    engine_of(old, VllmClient(process.url, 300.0), tmp_path).push(0, PROMPTS)
    canaries = engine_of(new, Forgetful(process.url, *left_out), tmp_path).push(1, PROMPTS)
    assert canaries is not None and gap(new, canaries, 0.7) > 0.05
    canaries = engine_of(new, VllmClient(process.url, 300.0), tmp_path).push(2, PROMPTS)
    assert canaries is not None and gap(new, canaries, 0.7) < 1e-3


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


class Kill(Listener):
    """Kills one process of the run's server while it draws round 3."""

    def __init__(self, victim: str):
        self.victim, self.killed, self.seen = victim, False, set[psutil.Process]()

    def started(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def phase(self, name: str) -> None:
        engine: Any = self.trainer.engine
        if not engine._process.running:
            return
        processes = psutil.Process(engine._process._process.pid).children(recursive=True)
        self.seen.update(processes)
        if name == "rollout" and self.trainer.round == 2 and not self.killed:
            self.killed = True
            (victim,) = [p for p in processes if self.victim in " ".join(p.cmdline())]
            victim.kill()

    def left(self) -> list[psutil.Process]:
        """What still runs of all that was started, a moment after the end."""
        return psutil.wait_procs(self.seen, timeout=10)[1]


@pytest.mark.parametrize("victim", ["api_server", "VLLM::Worker"])
def test_a_server_killed_in_mid_run_is_brought_back(tmp_path: Path, victim: str) -> None:
    """With its engine dead the server ends by itself, after it has answered 500."""
    config = build_config(keys(tmp_path, **{"rollout.server_python": str(PYTHON), "max_rounds": 4}))
    listener = Kill(victim)
    trainer = Trainer(config, listener, task=sums())
    trainer.run()
    lines = read_metrics(trainer.folder)
    assert listener.killed and trainer.round == 4 and all(line["canary/logprob_gap"] < 1e-3 for line in lines)
    assert lines[3]["rollout/retries"] > 0 and lines[3]["rollout/redrawn_stale"] > 0
    assert len(listener.seen) >= 6 and not listener.left()


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
    """Each version under a name of its own, a round ahead, on a server that knows none of them after it was killed."""
    pytest.importorskip("peft")
    from bandit_rft.model.lora import base_policy

    class Begin(Kill):
        def started(self, trainer: Trainer) -> None:
            super().started(trainer)
            with torch.no_grad():  # a new adapter changes nothing: without it the gap would be as small
                for parameter in trainer.policy.parameters():
                    if parameter.requires_grad:
                        parameter.add_(0.1 * torch.randn(parameter.shape))

    config = build_config(
        keys(
            tmp_path, **{
                "rollout.server_python": str(PYTHON), "rollout.ahead": 1, "max_rounds": 6, "lora.rank": 4,
                "objective.kind": "importance_mask", "objective.dual_clip": None,
            },
        )
    )  # fmt: skip
    listener = Begin("api_server")
    trainer = Trainer(config, listener, task=sums())
    trainer.run()
    lines = read_metrics(trainer.folder)
    assert listener.killed and trainer.round == 6 and all(line["canary/logprob_gap"] < 1e-3 for line in lines)
    assert sum(line["rollout/redrawn_stale"] for line in lines) > 0 and not listener.left()
    drawn = RolloutEngine(trainer.policy, max_completion_length=8).generate(PROMPTS, sequence_ids(0, [0, 1, 2]), seed=1)
    assert gap(base_policy(trainer.policy), drawn, 1.0) > 0.05, "or the model below would not be noticed"
