"""Each design choice through the trainer: it does what its formula says, and refuses what contradicts it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from some_rollouts import some_batch
from tiny_models import character_tokenizer, sums, tiny_llama
from tiny_rewards import everything, starts_with_vowel

from bandit_rft.advantages import ADVANTAGES
from bandit_rft.config import Config, ConfigError, build_config
from bandit_rft.metrics import read_metrics
from bandit_rft.model import Policy
from bandit_rft.ops import PolicyObjective
from bandit_rft.optimizer import PolicyOptimizer
from bandit_rft.rollout_batch import RolloutBatch
from bandit_rft.run_folder import RunFolder
from bandit_rft.tasks import Task
from bandit_rft.trainer import Trainer
from bandit_rft.update import PolicyUpdater, score_rollouts


@pytest.fixture
def configure(model_folder: Path, tmp_path: Path) -> Callable[..., Config]:
    def make(**overrides: Any) -> Config:
        values = {
            "preset": "minimal", "model_name_or_path": str(model_folder), "task": "arithmetic", "batch_size": 6,
            "output_dir": str(tmp_path / "run"), "max_rounds": 3, "learning_rate": 3e-3, "max_prompt_length": 12,
            "max_completion_length": 8, "save_steps": 0, "eval_steps": 0, "evaluation.max_queries": 2, "device": "cpu",
        }  # fmt: skip
        return build_config({**values, **overrides})

    return make


def run(config: Config, reward: Any = starts_with_vowel) -> Trainer:
    task = sums()
    trainer = Trainer(config, task=Task(task.name, task.splits, [reward]))
    trainer.run()
    return trainer


def rounds(trainer: Trainer) -> list[dict[str, Any]]:
    return read_metrics(trainer.folder)[1:]


def rollouts_of(trainer: Trainer, number: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(trainer.folder / "rollouts" / f"round-{number:06d}.parquet").to_pylist()
    return rows


def weights_of(trainer: Trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.policy.model.parameters()])


# --- every choice trains ----------------------------------------------------------------------------------------------

CHOICES: dict[str, dict[str, Any]] = {
    **{name: {"advantage": name, "num_generations": 4} for name in sorted(ADVANTAGES)},
    **{f"{name}, one rollout": {"advantage": name} for name in sorted(ADVANTAGES) if not ADVANTAGES[name].needs_groups},
    "several updates": {"update.epochs": 2, "update.minibatches": 3},
    "PODS": {"advantage": "group_norm", "num_generations": 5, "rollout.keep": 2},
    "dynamic sampling": {"advantage": "group_norm", "num_generations": 2, "rollout.dynamic_sampling": 2},
    "queries by their rewards": {"queries.order": "learnable", "queries.floor": 0.01, "queries.half_life": 2},
    "queries by their rewards, dynamic sampling": {
        "queries.order": "learnable", "advantage": "group_norm", "num_generations": 2, "rollout.dynamic_sampling": 2,
    },
    "KL in the loss, adaptive": {"objective.kl": "k3", "objective.kl_coef": 0.1, "kl.target": 0.01, "kl.horizon": 50},
    "KL in the reward": {"objective.kl": "k1", "objective.kl_coef": 0.1, "kl.where": "reward"},
    "entropy bonus": {"objective.entropy_coef": 0.01},
    "length penalty": {"reward.length_penalty": 0.5, "reward.length_penalty_from": 4},
    "truncated ones left out": {"rollout.mask_truncated": True},
    "hopeless ones ended": {"rollout.stop_hopeless": 2, "advantage": "batch_norm"},
    **{
        f"replay {sampling} {correction}": {
            "replay.capacity": 12, "replay.sampling": sampling, "replay.correction": correction,
            "replay.max_staleness": 2, "objective.kind": kind, "objective.dual_clip": None,
        }
        for sampling, correction, kind in (
            ("uniform", "token", "reinforce"), ("recent", "sequence", "gspo"), ("positive", "none", "ppo"),
            ("prioritized", "token", "cispo"), ("prioritized", "none", "importance"),
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CHOICES)
def test_every_choice_trains(name: str, configure: Callable[..., Config]) -> None:
    trainer = run(configure(**CHOICES[name]))
    lines = rounds(trainer)
    assert [line["round"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert np.isfinite(line["loss"]) and np.isfinite(line["grad_norm"])
        assert line["tokens/generated"] > 0
    before = torch.cat([p.detach().flatten() for p in tiny_llama().parameters()])
    assert not torch.equal(weights_of(trainer), before)


# --- several updates --------------------------------------------------------------------------------------------------


def updated(objective: dict[str, Any], *, stale: float = 0.0, **options: Any) -> tuple[torch.Tensor, Any]:
    policy = Policy(tiny_llama(), character_tokenizer())
    optimizer = PolicyOptimizer(policy.named_parameters(), learning_rate=0.02)
    updater = PolicyUpdater(policy, optimizer, PolicyObjective(**objective), **options)
    update = updater(some_batch(policy, stale=stale), 1)
    return torch.cat([p.detach().flatten() for p in policy.model.parameters()]), update


@pytest.mark.parametrize("kind", ["ppo", "cispo", "gspo"])
def test_clipping_acts_with_several_updates_and_cannot_with_one(kind: str) -> None:
    tight, loose = (
        {"kind": kind, "clip_low": 1e-6, "clip_high": 1e-6},
        {"kind": kind, "clip_low": 0.9, "clip_high": 9.0},
    )
    one, update = updated(tight, stale=0.5)
    assert torch.equal(one, updated(loose, stale=0.5)[0])  # bit for bit, whatever the sampler's log-probabilities say
    assert not update.off_policy
    several, update = updated(tight, epochs=3)
    assert not torch.equal(several, updated(loose, epochs=3)[0])
    assert update.off_policy and update.steps == 3
    assert update.statistics["clip_fraction_low"] + update.statistics["clip_fraction_high"] > 0.3


def test_minibatches_are_one_pass_over_every_rollout(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []
    step = PolicyUpdater._step

    def spy(self: Any, batch: Any, rows: Any, *rest: Any) -> None:
        seen.append(rows.tolist())
        step(self, batch, rows, *rest)

    monkeypatch.setattr(PolicyUpdater, "_step", spy)
    _, update = updated({"kind": "ppo"}, epochs=2, minibatches=4)
    assert update.steps == 8 and [len(rows) for rows in seen] == [3, 2, 2, 2] * 2
    assert (
        sorted(i for rows in seen[:4] for i in rows) == sorted(i for rows in seen[4:] for i in rows) == list(range(9))
    )
    assert seen[:4] != seen[4:]
    lengths = some_batch(Policy(tiny_llama(), character_tokenizer())).lengths.tolist()
    assert update.tokens_trained == 2 * (sum(lengths) - lengths[2] - lengths[6])
    assert update.tokens_skipped == 2 * (lengths[2] + lengths[6])


def test_several_updates_are_several_single_ones() -> None:
    """Two epochs equal two steps by hand, with the log-probabilities of before the first as behavior."""
    policy = Policy(tiny_llama(), character_tokenizer())
    optimizer = PolicyOptimizer(policy.named_parameters(), learning_rate=0.02)
    updater = PolicyUpdater(policy, optimizer, PolicyObjective(kind="ppo"))
    batch = some_batch(policy)
    updater(batch, 1, off_policy=True)
    updater(batch, 2, off_policy=True)
    by_hand = torch.cat([p.detach().flatten() for p in policy.model.parameters()])
    torch.testing.assert_close(updated({"kind": "ppo"}, epochs=2)[0], by_hand, atol=0, rtol=0)


# --- replay -----------------------------------------------------------------------------------------------------------


def test_replay_trains_on_old_rollouts_with_the_log_probabilities_they_were_sampled_with(
    configure: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the trainer: what the update gets is what was drawn rounds ago, weighed by today's policy."""
    batches: list[tuple[RolloutBatch, list[torch.Tensor]]] = []
    call = PolicyUpdater.__call__

    def spy(self: PolicyUpdater, batch: RolloutBatch, number: int, **options: Any) -> Any:
        today = score_rollouts(self.policy, batch, temperature=1.0, tokens_per_microbatch=10_000)
        batches.append((batch, batch.split(today)))
        return call(self, batch, number, **options)

    monkeypatch.setattr(PolicyUpdater, "__call__", spy)
    config = configure(
        max_rounds=4, learning_rate=0.02,
        **{"replay.capacity": 100, "replay.ratio": 2.0, "replay.importance_cap": 1.25, "advantage": "batch_norm"},
    )  # fmt: skip
    trainer = run(config)
    drawn: dict[tuple[int, ...], list[dict[str, Any]]] = {}
    truncated = 0
    for number, (batch, today) in enumerate(batches, start=1):
        old = (batch.round < number).nonzero().flatten().tolist()
        assert len(old) == min(12, 6 * (number - 1)) and rounds(trainer)[number - 1]["replay/rollouts"] == len(old)
        tokens, prompts, logprobs = batch.token_lists(), batch.prompt_lists(), batch.split(batch.logprobs)
        for i in old:
            (match,) = [
                row
                for row in drawn[tuple(tokens[i])]
                if row["advantage"] == batch.advantage[i]
                and trainer.policy.tokenizer(row["prompt"])["input_ids"] == prompts[i]  # type: ignore[misc]
            ]
            if batch.advantage[i]:
                ratio = (today[i] - torch.tensor(match["logprobs"])).exp()
                assert batch.importance is not None
                torch.testing.assert_close(
                    batch.split(batch.importance)[i], ratio.clamp(max=1.25), atol=1e-4, rtol=1e-4
                )
                torch.testing.assert_close(logprobs[i], today[i], atol=1e-5, rtol=1e-5)
                truncated += int((ratio > 1.25).sum())
        for row in rollouts_of(trainer, number):
            drawn.setdefault(tuple(row["token_ids"]), []).append(row)
    assert truncated > 0
    last = rounds(trainer)[-1]
    assert 0 < last["replay/effective_sample_size"] <= 1 and 0 < last["replay/truncated_fraction"] < 1
    assert sum(v for k, v in last.items() if k.startswith("replay/staleness/") and k[-1] not in "nx") == 12
    assert last["tokens/trained"] > last["tokens/generated"] and last["tokens/scored"] > 0


def test_replayed_gradient_is_the_importance_weighted_formula() -> None:
    """Against plain autograd in float64: sum of w A logp over the tokens, w held constant."""
    policy = Policy(tiny_llama(), character_tokenizer())
    optimizer = PolicyOptimizer(policy.named_parameters(), learning_rate=0.0, max_grad_norm=0.0)
    caught: list[torch.Tensor] = []
    step = optimizer.step

    def catch() -> torch.Tensor:
        caught.append(torch.cat([m.grad.flatten().clone() for m in optimizer.masters if m.grad is not None]))
        return step()

    optimizer.step = catch  # type: ignore[method-assign]
    batch = some_batch(policy)
    weights = torch.rand(len(batch.tokens), generator=torch.Generator().manual_seed(1)) * 2
    PolicyUpdater(policy, optimizer, PolicyObjective())(replace(batch, importance=weights), 1)
    model, total = tiny_llama().double(), torch.zeros((), dtype=torch.float64)
    for i, (prompt, targets) in enumerate(zip(batch.prompt_lists(), batch.split(batch.tokens), strict=True)):
        table = model(input_ids=torch.cat([torch.tensor(prompt), targets])[None]).logits[0, len(prompt) - 1 : -1]
        logp = table.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
        total = total - (batch.split(weights)[i] * float(batch.advantage[i]) * logp).sum() / len(batch.tokens)
    total.backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).float()
    scale = expected.abs().max()
    torch.testing.assert_close(caught[0] / scale, expected / scale, atol=2e-6, rtol=0)


# --- which rollouts are trained on ------------------------------------------------------------------------------------


def test_first_rollout_is_the_same_whatever_n_and_extra_rollouts_train_on_it_alone(
    configure: Callable[..., Config], tmp_path: Path
) -> None:
    one = run(configure(max_rounds=1, output_dir=str(tmp_path / "one")))
    many = run(configure(max_rounds=1, num_generations=4, advantage="extra_rollouts"))
    alone, groups = rollouts_of(one, 1), rollouts_of(many, 1)
    assert [r["token_ids"] for r in alone] == [r["token_ids"] for r in groups if r["rollout"] == 0]
    (line,) = rounds(many)
    assert all(r["advantage"] == 0 for r in groups if r["rollout"])
    assert line["tokens/trained"] == sum(len(r["token_ids"]) for r in groups if r["advantage"])
    for row in groups:
        if row["rollout"] == 0:
            rewards = np.array([r["reward"] for r in groups if r["query"] == row["query"]])
            expected = (rewards[0] - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)
            assert row["advantage"] == pytest.approx(expected, abs=1e-5)


def test_dynamic_sampling_replaces_constant_groups_and_is_bounded(configure: Callable[..., Config]) -> None:
    choices = {"advantage": "group_norm", "num_generations": 2, "rollout.dynamic_sampling": 2, "batch_size": 4}
    trainer = run(configure(**choices, max_rounds=4))
    for number, line in enumerate(rounds(trainer), start=1):
        rows = rollouts_of(trainer, number)
        rewards: dict[int, list[float]] = {}
        for row in rows:
            rewards.setdefault(row["query"], []).append(row["reward"])
        constant = {query for query, r in rewards.items() if len(set(r)) == 1}
        assert line["rollout/queries"] == len(rewards) and line["rollout/dropped"] == len(constant)
        assert len(rewards) - len(constant) == 4 or len(rewards) > 4
        assert len(rewards) - len(constant) <= 4
    assert max(line["rollout/queries"] for line in rounds(trainer)) > 4
    trainer = run(configure(**choices, max_rounds=1, output_dir=str(trainer.folder / "constant")), everything)
    (line,) = rounds(trainer)
    assert line["rollout/queries"] == line["rollout/dropped"] == 12 and line["tokens/trained"] == 0


def test_dynamic_sampling_on_a_small_set_never_draws_a_query_twice_a_round(configure: Callable[..., Config]) -> None:
    choices = {"advantage": "group_norm", "num_generations": 2, "rollout.dynamic_sampling": 99, "batch_size": 20}
    trainer = run(configure(**choices, max_rounds=1), everything)
    queries = [row["query"] for row in rollouts_of(trainer, 1)]
    assert len(queries) == 40 and len(set(queries)) == 20


def test_truncated_completions_count_in_no_sum(configure: Callable[..., Config]) -> None:
    trainer = run(configure(max_rounds=1, **{"rollout.mask_truncated": True}), everything)
    rows, (line,) = rollouts_of(trainer, 1), rounds(trainer)
    assert {row["advantage"] for row in rows if row["truncated"]} <= {0.0}
    assert line["tokens/trained"] == sum(len(row["token_ids"]) for row in rows if not row["truncated"])


def test_length_penalty_is_subtracted_before_comparing(configure: Callable[..., Config]) -> None:
    choices = {"reward.length_penalty": 0.5, "reward.length_penalty_from": 3}
    trainer = run(configure(max_rounds=1, **choices))
    rows, (line,) = rollouts_of(trainer, 1), rounds(trainer)
    expected = [r["reward"] - 0.5 * max(len(r["token_ids"]) - 3, 0) / 5 for r in rows]
    np.testing.assert_allclose([row["advantage"] for row in rows], expected, atol=1e-6)
    assert line["reward/shaped"] == pytest.approx(np.mean(expected)) != line["reward"]


# --- KL ---------------------------------------------------------------------------------------------------------------


def test_kl_in_the_reward(configure: Callable[..., Config]) -> None:
    choices = {"objective.kl": "k1", "objective.kl_coef": 0.3, "kl.where": "reward", "learning_rate": 0.02}
    trainer = run(configure(max_rounds=2, **choices))
    rows, reference = rollouts_of(trainer, 2), Policy(tiny_llama(), character_tokenizer())
    tokenizer = reference.tokenizer
    assert tokenizer is not None
    for row in rows:
        ids = torch.tensor(row["token_ids"])
        nothing = torch.zeros(len(ids))
        batch = RolloutBatch.of([tokenizer(row["prompt"])["input_ids"]], ids, [len(ids)], nothing, nothing, [False])
        scored = score_rollouts(reference, batch, temperature=1.0, tokens_per_microbatch=1000)
        kl = float((torch.tensor(row["logprobs"]) - scored).sum())
        assert row["advantage"] == pytest.approx(row["reward"] - 0.3 * kl, abs=1e-3)
    first, second = rounds(trainer)
    assert first["kl"] == pytest.approx(0, abs=1e-6) and second["kl"] > 1e-4
    assert second["tokens/scored"] == second["tokens/generated"]
    assert trainer.updater.objective.kl_coef == 0  # not in the loss as well: zero rewards could be skipped


def test_adaptive_kl_moves_towards_its_target(configure: Callable[..., Config]) -> None:
    choices = {"objective.kl": "k3", "objective.kl_coef": 0.1, "kl.horizon": 100, "learning_rate": 0.02}
    low = run(configure(**choices, max_rounds=5, **{"kl.target": 1e-6}))
    expected = 0.1
    for line in rounds(low):
        expected *= 1 + np.clip(line["kl"] / 1e-6 - 1, -0.2, 0.2) * 6 / 100
    assert low.kl.coef == pytest.approx(expected) and low.updater.objective.kl_coef == low.kl.coef > 0.1
    high = run(configure(**choices, output_dir=str(low.folder / "high"), **{"kl.target": 100.0}))
    assert high.kl.coef == pytest.approx(0.1 * (1 - 0.2 * 0.06) ** 3)


# --- budgets ----------------------------------------------------------------------------------------------------------


def test_budgets_end_a_run_after_the_round_that_uses_them_up(configure: Callable[..., Config]) -> None:
    full = run(configure(max_rounds=6))
    tokens = [line["tokens/generated"] for line in rounds(full)]
    budget = sum(tokens[:3]) - 1
    trainer = run(configure(max_rounds=6, max_generated_tokens=budget, output_dir=str(full.folder / "tokens")))
    lines = read_metrics(trainer.folder)
    assert [line["round"] for line in lines] == [0, 1, 2, 3] and "eval/test/pass@1" in lines[-1]
    trainer = run(configure(max_rounds=6, max_seconds=1e-6, output_dir=str(full.folder / "seconds")))
    assert [line["round"] for line in read_metrics(trainer.folder)] == [0, 1]


# --- the audit --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"advantage": "rloo"}, "num_generations must be >= 2"),
        ({"advantage": "spo", "advantage_options.half_lfe": 1}, "half_lfe is no option of advantage=spo"),
        ({"advantage": "history_norm", "advantage_options.window": 4}, "the window is replay.window"),
        ({"advantage": "history_norm", "num_generations": 9}, "replay.window=8 forgets rollouts of its own round"),
        ({"rollout.keep": 2}, "less than num_generations=1"),
        ({"rollout.keep": 2, "num_generations": 4, "advantage": "extra_rollouts"}, "rollout.keep has no meaning"),
        ({"rollout.dynamic_sampling": 1}, "with num_generations=1 that is every query"),
        ({"rollout.dynamic_sampling": 1, "num_generations": 2, "advantage": "spo"}, "would drop it"),
        ({"replay.capacity": 9, "rollout.top_p": 0.9}, "needs the log-probabilities of the distribution"),
        ({"replay.capacity": 9, "objective.kind": "gspo"}, "gspo has one ratio a sequence"),
        ({"replay.capacity": 9, "replay.ratio": 0}, "replay.ratio must be > 0"),
        ({"queries.order": "learnable", "queries.floor": 0}, "queries.floor must be > 0"),
        (
            {"rollout.stop_hopeless": 1, "reward.length_penalty": 0.5},
            "rollout.stop_hopeless does not go with reward.length_penalty, which needs the tokens",
        ),
        ({"rollout.stop_hopeless": 1, "objective.kl": "k3", "objective.kl_coef": 0.1}, "go with objective.kl_coef"),
        ({"rollout.stop_hopeless": 1, "objective.entropy_coef": 0.1}, "does not go with objective.entropy_coef"),
        ({"rollout.stop_hopeless": 1, "rollout.mask_truncated": True}, "does not go with rollout.mask_truncated"),
        (
            {"rollout.stop_hopeless": 1, "rollout.engine": "vllm", "rollout.urls": ["http://a:1"]},
            "rollout.stop_hopeless does not go with rollout.engine=vllm: a server draws whole completions",
        ),
        ({"update.minibatches": 7}, "more than the 6 rollouts"),
        ({"kl.where": "reward"}, "needs objective.kl_coef > 0"),
        ({"kl.target": 0.1}, "start it above 0"),
        ({"reward.length_penalty_from": 3}, "no effect without reward.length_penalty"),
        ({"reward.length_penalty_from": 8, "reward.length_penalty": 1}, "less than max_completion_length"),
        ({"lora.rank": 4, "lora.dropout": 0.1}, "two different policies"),
        ({"replay.sampling": "uniformly"}, "did you mean uniform"),
    ],
)  # fmt: skip
def test_contradictions_are_refused(configure: Callable[..., Config], choices: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configure(**choices)


def test_a_past_that_cannot_matter_is_explained(
    configure: Callable[..., Config], caplog: pytest.LogCaptureFixture
) -> None:
    run(configure(advantage="history_norm"))
    assert "none of 24 comes twice in 3 rounds of 6" in caplog.text
    caplog.clear()
    task = sums()
    twice = Task("twice", {**task.splits, "train": task.splits["train"] * 2}, task.rewards)
    trainer = Trainer(configure(advantage="history_norm", output_dir="unused"), task=twice)
    trainer.run_folder = RunFolder(Path(configure().output_dir).parent / "twice")
    trainer.run()
    assert "24 training prompts are repeated" in caplog.text
