"""A run stops when it no longer trains what it samples, or no longer computes the loss it claims."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_tiny_llama, sums
from tiny_rewards import everything

from bandit_rft import ops
from bandit_rft.assemble import load_policy
from bandit_rft.checkpoint import list_checkpoints
from bandit_rft.config import Config, build_config
from bandit_rft.gates import GateError, SpotCheck, logprob_gaps
from bandit_rft.metrics import read_metrics
from bandit_rft.rollout import RolloutEngine
from bandit_rft.rollout.native import NativeDecoder
from bandit_rft.rollout_batch import RolloutBatch
from bandit_rft.tasks import Task
from bandit_rft.trainer import Trainer


@pytest.fixture
def configure(tmp_path: Path) -> Callable[..., Config]:
    model = save_tiny_llama(tmp_path / "model")

    def make(**overrides: Any) -> Config:
        values = {
            "preset": "minimal", "model_name_or_path": str(model), "task": "arithmetic", "batch_size": 6,
            "output_dir": str(tmp_path / "run"), "learning_rate": 1e-3, "max_prompt_length": 12, "max_rounds": 4,
            "max_completion_length": 6, "eval_steps": 0, "evaluation.max_queries": 2, "save_steps": 1, "device": "cpu",
            **overrides,
        }  # fmt: skip
        return build_config(values)

    return make


def make(config: Config) -> Trainer:
    task = sums()
    return Trainer(config, task=Task(task.name, task.splits, [everything]))


def test_gaps_are_means_over_a_rollouts_tokens() -> None:
    batch = RolloutBatch.of([[1]] * 3, torch.arange(5), [2, 0, 3], torch.zeros(5), torch.zeros(5), [False] * 3)
    difference = torch.tensor([0.1, 0.3, 1.0, 0.0, 0.5])
    torch.testing.assert_close(logprob_gaps(batch, difference), torch.tensor([0.2, 0.0, 0.5]))


def test_an_exact_run_passes_both_gates_and_logs_them(configure: Callable[..., Config]) -> None:
    trainer = make(configure(**{"verify_steps": 2, "rollout.max_logprob_gap": 1e-4, "max_verify_error": 1e-4}))
    trainer.run()
    lines = read_metrics(trainer.folder)[1:]
    assert all(0 <= line["sampler_trainer_logprob_diff/rollout_max"] < 1e-4 for line in lines)
    assert ["verify/gradient_error" in line for line in lines] == [True, False, True, False]
    assert 0 < lines[0]["verify/gradient_error"] < 1e-4 and 0 <= lines[0]["verify/loss_error"] < 1e-4


def test_one_rollout_drawn_by_another_policy_stops_the_run(
    configure: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault in one rollout of many, too small for a mean over the round to show it."""
    trainer = make(configure())
    draw = Trainer.draw
    weights: list[torch.Tensor] = []

    def wrong(self: Trainer, *args: Any) -> Any:
        batch, texts, rewards = draw(self, *args)
        if self.round == 2:
            weights.extend(p.detach().clone() for p in self.policy.parameters())
            first = int(batch.lengths[0])
            batch.logprobs[:first] += 0.05
        return batch, texts, rewards

    monkeypatch.setattr(Trainer, "draw", wrong)
    with pytest.raises(GateError, match=r"round 3: .* 0\.05 nats a token .*max_logprob_gap is 0\.01"):
        trainer.run()
    (*_, last) = list_checkpoints(trainer.folder / "checkpoints")
    assert last.name == "checkpoint-2"
    assert all(torch.equal(a, b) for a, b in zip(weights, trainer.policy.parameters(), strict=True))  # not applied


def test_the_gap_can_be_accepted_or_never_looked_at(
    configure: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = Trainer.draw

    def wrong(self: Trainer, *args: Any) -> Any:
        batch, texts, rewards = draw(self, *args)
        batch.logprobs.add_(0.05)
        return batch, texts, rewards

    monkeypatch.setattr(Trainer, "draw", wrong)
    for gap in (0.1, 0):
        trainer = make(configure(**{"rollout.max_logprob_gap": gap, "max_rounds": 1, "resume": "auto"}))
        trainer.run()
        assert read_metrics(trainer.folder)[1]["sampler_trainer_logprob_diff/rollout_max"] == pytest.approx(0.05, 1e-3)


def test_a_fused_loss_that_computes_something_else_stops_the_run(
    configure: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make(configure(**{"verify_steps": 3, "rollout.max_logprob_gap": 0}))  # which would see it first
    loss = ops.linear_policy_loss

    def wrong(hidden: torch.Tensor, *args: Any, **options: Any) -> ops.PolicyLoss:
        scale = 1.02 if trainer.round == 3 else 1.0
        return loss(hidden * scale, *args, **options)

    monkeypatch.setattr(ops, "linear_policy_loss", wrong)
    with pytest.raises(GateError, match=r"round 4: the fused path's loss .* max_verify_error is 0\.001"):
        trainer.run()
    assert list_checkpoints(trainer.folder / "checkpoints")[-1].name == "checkpoint-3"


def wrong_advantage(loss: Any, advantages: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return advantages.abs(), options


def wrong_objective(**changes: Any) -> Callable[..., Any]:
    return lambda loss, advantages, options: (
        advantages,
        options | {"objective": replace(options["objective"], **changes)},
    )


WRONG_TERMS: dict[str, tuple[dict[str, Any], Any]] = {
    "sign of the advantage": ({}, wrong_advantage),
    "kl": ({"objective.kl": "k3", "objective.kl_coef": 0.05}, wrong_objective(kl_coef=0.1)),
    "kl estimator": ({"objective.kl": "k3", "objective.kl_coef": 0.5}, wrong_objective(kl="k1")),
    "entropy": ({"objective.entropy_coef": 0.01}, wrong_objective(entropy_coef=0.0)),
    "clipping": ({"objective.kind": "ppo", "update.epochs": 2}, wrong_objective(clip_high=9.0)),
    "dual clip": (
        {"objective.kind": "ppo", "update.epochs": 2, "objective.dual_clip": 3.0}, wrong_objective(dual_clip=None),
    ),
    "cispo": (
        {"objective.kind": "cispo", "objective.dual_clip": None, "update.epochs": 2}, wrong_objective(clip_high=9.0),
    ),
    "importance cap": (
        {"objective.kind": "importance", "objective.dual_clip": None}, wrong_objective(importance_cap=50.0),
    ),
    "aggregation": ({"objective.aggregation": "seq-mean-token-sum"}, wrong_objective(aggregation="token-mean")),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_TERMS)
def test_every_term_of_a_wrong_loss_is_found(
    configure: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Each term that the configured objective has is in the check, and none of them stops a run that is right."""
    chosen, change = WRONG_TERMS[name]
    values = {"verify_steps": 1, "max_rounds": 6, "rollout.max_logprob_gap": 0, "max_grad_norm": 0.1, **chosen}
    right = Trainer(configure(**values), task=sums())
    right.run()
    assert all(line["verify/gradient_error"] < 1e-4 for line in read_metrics(right.folder)[1:])
    honest = ops.linear_policy_loss

    def wrong(hidden: Any, weight: Any, targets: Any, advantages: Any, cu_seqlens: Any, **options: Any) -> Any:
        advantages, options = change(honest, advantages, options)
        return honest(hidden, weight, targets, advantages, cu_seqlens, **options)

    monkeypatch.setattr(ops, "linear_policy_loss", wrong)
    folder = str(right.folder.parent / "wrong")
    with pytest.raises(GateError, match="the fused path's loss"):
        Trainer(configure(**{**values, "output_dir": folder}), task=sums()).run()


@pytest.mark.parametrize("wrong", ["temperature", "logprobs", "scale"])
def test_a_wrong_sampler_is_found(
    configure: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    honest = ops.linear_sample

    def sample(hidden: Any, weight: Any, **options: Any) -> ops.Sample:
        if wrong == "temperature":
            options["temperature"] = 0.9 * options["temperature"]
        elif wrong == "scale":
            options["logit_scale"] = 1.1 * options["logit_scale"]
        drawn = honest(hidden, weight, **options)
        return drawn._replace(logprobs=drawn.sampling_logprobs) if wrong == "logprobs" else drawn

    monkeypatch.setattr(ops, "linear_sample", sample)
    # The compiled core's loop does not ask for the operation: the next test is of it.
    monkeypatch.setattr(RolloutEngine, "_probe_native", lambda engine: None)
    filters = {"rollout.top_p": 0.9} if wrong == "logprobs" else {}
    trainer = make(configure(**filters))
    with pytest.raises(GateError, match="the sampler and the trainer are two policies"):
        trainer.run()
    assert trainer.round == 0


def test_a_wrong_sampler_in_the_core_is_found(
    configure: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, drawn = NativeDecoder.draw, []

    def draw(native: Any, hidden: Any, batch: Any, source: Any, steps: int) -> Any:
        drawn.append(steps)
        options = source.options | {"temperature": 0.9 * source.options["temperature"]}
        return honest(native, hidden, batch, source._replace(options=options), steps)

    monkeypatch.setattr(NativeDecoder, "draw", draw)
    with pytest.raises(GateError, match="the sampler and the trainer are two policies"):
        make(configure()).run()
    assert drawn


def test_a_lack_of_memory_ends_the_checks_and_not_the_run(
    configure: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_memory(*args: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("bandit_rft.gates.verify_sequence", no_memory)
    trainer = make(configure(verify_steps=1))
    trainer.run()
    assert trainer.round == 4 and caplog.text.count("no memory to compute one rollout") == 1


def test_checks_come_in_the_first_round_and_then_every_so_many() -> None:
    batch = RolloutBatch.of([], torch.zeros(0, dtype=torch.int64), [], torch.zeros(0), torch.zeros(0), [])
    for steps in (0, 5):
        assert SpotCheck(steps, None, 0, ops.PolicyObjective())(None, batch, 1.0, 1) == {}  # type: ignore[arg-type]


@pytest.mark.parametrize("modules", [True, False], ids=["bit for bit", "but for what the core rounds otherwise"])
def test_gradient_checkpointing_trains_the_same(
    configure: Callable[..., Config], tmp_path: Path, modules: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if modules:  # as layers that are checkpointed are computed
        monkeypatch.setattr("bandit_rft.model.policy.in_core", lambda *arguments: None)
    weights = []
    for checkpointing in (False, True):
        folder = str(tmp_path / str(checkpointing))
        trainer = make(configure(gradient_checkpointing=checkpointing, output_dir=folder, max_rounds=2))
        trainer.run()
        assert trainer.policy.gradient_checkpointing == checkpointing
        weights.append([p.detach().clone() for p in trainer.policy.parameters()])
    same = torch.equal if modules else functools.partial(torch.allclose, rtol=1e-4, atol=1e-5)
    assert all(same(a, b) for a, b in zip(*weights, strict=True))


def test_entries_of_the_head_without_a_token_are_never_drawn(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = save_tiny_llama(tmp_path / "padded", vocab_size=64)  # the tokenizer has fewer
    config = Config(model_name_or_path=str(model), task="arithmetic", device="cpu")
    with caplog.at_level("INFO", logger="bandit_rft"):
        policy = load_policy(str(model), config)
    assert policy.padding_token_ids and policy.padding_token_ids[-1] == 63
    assert f"{len(policy.padding_token_ids)} entries of the head have no token" in caplog.text
    hidden = torch.randn(512, policy.hidden_size)
    ids = torch.arange(512)
    sample = ops.linear_sample(hidden, policy.weight, seed=0, sequence_ids=ids, positions=ids, **policy.head_options)
    assert int(sample.tokens.max()) < policy.padding_token_ids[0]


@pytest.mark.parametrize(("device", "expected"), [("cpu", "float32"), ("cuda", "bfloat16"), ("cuda:1", "bfloat16")])
def test_the_dtype_suits_the_device(device: str, expected: str) -> None:
    from bandit_rft.assemble import resolve_dtype

    assert resolve_dtype(Config(model_name_or_path="m", task="arithmetic", device=device)) == expected
    assert resolve_dtype(Config(model_name_or_path="m", task="t", device=device, dtype="float64")) == "float64"
