"""The loop: gradients that depend neither on the split nor on what is skipped, exact resume, real models end to end."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from some_rollouts import some_rollouts
from tiny_models import character_tokenizer, sums, tiny_llama
from tiny_rewards import everything, mentions_answer, none_for_some, nothing, starts_with_vowel
from transformers import AutoModelForCausalLM

from bandit_rft.advantages import ADVANTAGES, register
from bandit_rft.checkpoint import CheckpointError, latest_checkpoint, list_checkpoints, read_state
from bandit_rft.config import Config, ConfigError, build_config
from bandit_rft.data import PromptSet, completion_texts, prompt_tokens
from bandit_rft.evaluate import best_of_k
from bandit_rft.listener import Listener
from bandit_rft.metrics import MetricsLog, read_metrics
from bandit_rft.model import Policy
from bandit_rft.ops import PolicyObjective
from bandit_rft.optimizer import PolicyOptimizer
from bandit_rft.queries import query_order
from bandit_rft.rollout_batch import RolloutBatch
from bandit_rft.tasks import Example, Task
from bandit_rft.trainer import Trainer
from bandit_rft.update import PolicyUpdater, Update, micro_batches, training_inputs

DIFFERENT_EACH_TIME = ("seconds/",)


@pytest.fixture
def configure(model_folder: Path, tmp_path: Path) -> Callable[..., Config]:
    def make(**overrides: Any) -> Config:
        values = {
            "preset": "minimal", "model_name_or_path": str(model_folder), "task": "arithmetic", "batch_size": 6,
            "output_dir": str(tmp_path / "run"), "max_rounds": 4, "learning_rate": 1e-3, "max_prompt_length": 12,
            "max_completion_length": 10, "save_steps": 2, "eval_steps": 2, "device": "cpu", **overrides,
        }  # fmt: skip
        return build_config(values)

    return make


def run(config: Config, task: Task | None = None) -> Trainer:
    trainer = Trainer(config, task=task or sums())
    trainer.run()
    return trainer


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if not k.startswith(DIFFERENT_EACH_TIME)} for line in read_metrics(folder)]


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.policy.model.named_parameters()}


# --- the update -------------------------------------------------------------------------------------------------------


def gradient(
    config: Config, rollouts: RolloutBatch, advantages: Any, scored: Any = None
) -> tuple[dict[str, torch.Tensor], Update]:
    """The gradient the trainer hands to AdamW, before clipping."""
    policy = Policy(tiny_llama(), character_tokenizer())
    optimizer = PolicyOptimizer(policy.named_parameters(), learning_rate=0.0)
    updater = PolicyUpdater(
        policy, optimizer, PolicyObjective(**asdict(config.objective)),
        reference=Policy(tiny_llama(seed=5)) if config.objective.kl_coef else None,
        tokens_per_microbatch=config.tokens_per_microbatch,
    )  # fmt: skip
    caught: dict[str, torch.Tensor] = {}
    step = optimizer.step

    def catch() -> torch.Tensor:
        for name, master in zip(optimizer.names, optimizer.masters, strict=True):
            caught[name] = master.grad.clone()  # type: ignore[union-attr]
        return step()

    optimizer.step = catch  # type: ignore[method-assign]
    trained = True if scored is None else scored
    return caught, updater(rollouts.with_columns(advantage=advantages, trained=trained), 1)


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    scale = max(float(x.abs().max()) for x in b.values())
    assert scale > 0
    for name in a:
        torch.testing.assert_close(a[name] / scale, b[name] / scale, atol=2e-6, rtol=0, msg=name)


OBJECTIVES = [
    {"kind": "ppo", "dual_clip": 3.0},
    {"kind": "reinforce", "aggregation": "seq-mean-token-sum"},
    {"kind": "importance", "aggregation": "seq-mean-token-mean"},
    {"kind": "importance_mask", "importance_floor": 0.6, "importance_cap": 1.5},
    {"kind": "cispo", "aggregation": "seq-mean-token-sum-norm", "norm_length": 20},
    {"kind": "gspo", "aggregation": "seq-mean-token-mean"},
    {"kind": "ppo", "kl": "k3", "kl_coef": 0.3},
    {"kind": "reinforce", "entropy_coef": 0.2},
]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: "-".join(map(str, o.values())))
def test_gradient_is_the_formula_whatever_the_split(
    configure: Callable[..., Config], objective: dict[str, Any]
) -> None:
    """Against an independent float64 computation, with one micro-batch and with many."""
    keys = {f"objective.{k}": v for k, v in objective.items()}
    base = {"objective.kind": "reinforce", "objective.dual_clip": None, **keys}
    rollouts, advantages = some_rollouts(), np.array([1.0, 0.0, -0.5, 2.0, 0.0, 1.5, -1.0])
    whole, update = gradient(configure(**base), rollouts, advantages)
    for limit in (1, 12, 25):
        split, other = gradient(configure(**base, tokens_per_microbatch=limit), rollouts, advantages)
        assert_same(split, whole)
        assert other.loss == pytest.approx(update.loss, rel=1e-5)

    model, reference = tiny_llama().double(), tiny_llama(seed=5).double()
    total = torch.zeros((), dtype=torch.float64)
    tokens, sequences = len(rollouts.tokens), len(rollouts)
    answers = zip(
        rollouts.prompt_lists(), rollouts.split(rollouts.tokens), rollouts.split(rollouts.logprobs), strict=True
    )
    for i, (prompt, targets, behavior) in enumerate(answers):
        ids = torch.cat([torch.tensor(prompt), targets])[None]
        table = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        logp = table.gather(-1, targets[:, None])[:, 0]
        ratio = (logp - logp.detach()).exp()  # on-policy: 1, with a gradient
        if objective["kind"] == "importance":
            ratio = (logp.detach() - behavior.double()).exp().clamp(max=2.0)
        if objective["kind"] == "importance_mask":
            ratio = (logp.detach() - behavior.double()).exp()
            ratio = torch.where((ratio < 0.6) | (ratio > 1.5), torch.zeros_like(ratio), ratio)
        if objective["kind"] in ("reinforce", "importance", "importance_mask", "cispo"):
            token = -advantages[i] * ratio.detach() * logp
        else:
            token = (
                -advantages[i]
                * (ratio.log().mean().exp() if objective["kind"] == "gspo" else ratio)
                * torch.ones_like(logp)
            )
        if objective.get("kl_coef"):
            with torch.no_grad():
                other_table = reference(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            d = other_table.gather(-1, targets[:, None])[:, 0] - logp
            token = token + 0.3 * (d.exp() - d - 1)
        if objective.get("entropy_coef"):
            token = token + 0.2 * (table.exp() * table).sum(-1)
        aggregation = objective.get("aggregation", "token-mean")
        total = total + {
            "token-mean": token.sum() / tokens, "seq-mean-token-sum": token.sum() / sequences,
            "seq-mean-token-mean": token.mean() / sequences, "seq-mean-token-sum-norm": token.sum() / sequences / 20,
        }[aggregation]  # fmt: skip
    total.backward()
    assert_same(whole, {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None})
    assert update.loss == pytest.approx(float(total.detach()), rel=1e-4, abs=1e-6)


def test_skipping_changes_what_is_computed_and_nothing_else(
    configure: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    rollouts, advantages = some_rollouts(), np.array([1.0, 0.0, 0.0, 2.0, 0.0, 0.0, -1.0])
    config = configure()
    skipped, update = gradient(config, rollouts, advantages)
    assert update.tokens_trained == sum(rollouts.lengths.numpy()[advantages != 0])
    assert update.tokens_trained + update.tokens_skipped == len(rollouts.tokens)
    nearly = np.where(advantages == 0, 1e-30, advantages)  # does not count as zero, and is one in float32 sums
    every, full = gradient(config, rollouts, nearly)
    assert full.tokens_skipped == 0
    assert_same(skipped, every)
    assert update.loss == pytest.approx(full.loss, rel=1e-6)


def test_unscored_rollouts_are_as_if_never_drawn(configure: Callable[..., Config]) -> None:
    rollouts, advantages = some_rollouts(), np.array([1.0, 0.0, 5.0, 2.0, 0.0, 1.0, -1.0])
    scored = [True, True, False, True, True, True, True]
    keep = [i for i, s in enumerate(scored) if s]
    fewer = rollouts.select(keep)
    assert_same(
        gradient(configure(), rollouts, advantages, scored)[0], gradient(configure(), fewer, advantages[keep])[0]
    )


def test_every_rollout_zero_is_still_a_step(configure: Callable[..., Config]) -> None:
    """Moments decay and weight decay acts, as they would with a computed gradient of zero."""
    trainer = run(configure(max_rounds=1, learning_rate=0.1, eval_steps=0), replace_reward(sums(), nothing))
    before = dict(tiny_llama().named_parameters())
    after = weights_of(trainer)
    for name, value in before.items():
        torch.testing.assert_close(after[name], value.detach() * (1 - 0.1 * 0.01), atol=1e-7, rtol=1e-6)
    line = read_metrics(trainer.folder)[1]
    assert line["tokens/trained"] == 0 and line["tokens/skipped"] == line["tokens/generated"] and line["loss"] == 0


def replace_reward(task: Task, reward: Any) -> Task:
    return Task(task.name, task.splits, [reward])


def test_stop_token_is_in_the_loss() -> None:
    rollouts = RolloutBatch.of([[5, 6]], torch.tensor([7, 8, 2]), [3], torch.zeros(3), torch.zeros(3), [False])
    inputs = training_inputs(rollouts, torch.device("cpu"))
    assert rollouts.tokens.tolist() == [7, 8, 2]
    assert inputs.input_ids.tolist() == [5, 6, 7, 8] and inputs.predicting.tolist() == [1, 2, 3]
    assert rollouts.cu_seqlens.tolist() == [0, 3]


def test_micro_batches_cover_all_rows_within_the_limit() -> None:
    rollouts = some_rollouts(count=20)
    sizes = (rollouts.prompt_lengths + rollouts.lengths).tolist()
    for limit in (1, 10, 30, 1000):
        batches = [batch.query.tolist() for batch in micro_batches(rollouts, limit)]
        assert [i for batch in batches for i in batch] == list(range(20))
        assert all(len(batch) == 1 or sum(sizes[i] for i in batch) <= limit for batch in batches)
    assert len(micro_batches(rollouts, 1000)) == 1


def test_sampler_and_trainer_agree_in_every_round(configure: Callable[..., Config]) -> None:
    trainer = run(configure(**{"temperature": 0.7}), replace_reward(sums(), everything))
    differences = [line["sampler_trainer_logprob_diff/max"] for line in read_metrics(trainer.folder)[1:]]
    assert len(differences) == 4 and all(0 <= d < 1e-4 for d in differences)


def test_bfloat16_weights_move_by_less_than_their_spacing() -> None:
    parameter = torch.nn.Parameter(torch.full((4, 4), 1.0, dtype=torch.bfloat16))
    optimizer = PolicyOptimizer([("w", parameter)], learning_rate=1e-4, weight_decay=0.0)
    for _ in range(100):
        optimizer.grad_buffer(parameter).fill_(1.0)
        optimizer.step()
    assert float(parameter.detach()[0, 0]) == pytest.approx(0.99, abs=4e-3)
    assert float(optimizer.masters[0].detach()[0, 0]) == pytest.approx(0.99, abs=1e-4)


def test_bfloat16_gradients_do_not_depend_on_the_micro_batches() -> None:
    """Each micro-batch's gradient is rounded to bfloat16 once; their sum is float32's."""
    policy = Policy(tiny_llama().to(torch.bfloat16), character_tokenizer())
    batch = some_rollouts(count=64).with_columns(advantage=1.0)
    sums: dict[int, torch.Tensor] = {}
    for limit in (1, 10_000):
        optimizer = PolicyOptimizer(policy.named_parameters(), learning_rate=0.0, max_grad_norm=0.0)
        caught: list[torch.Tensor] = []

        def catch(masters: Any = optimizer.masters, caught: Any = caught) -> None:
            caught.extend(master.grad.flatten().clone() for master in masters)

        optimizer._adamw.step = catch  # type: ignore[method-assign]
        PolicyUpdater(policy, optimizer, PolicyObjective(), tokens_per_microbatch=limit)(batch, 1)
        sums[limit] = torch.cat(caught)
    error = float((sums[1] - sums[10_000]).norm() / sums[10_000].norm())
    assert error < 0.005, error  # summed in bfloat16 over 64 micro-batches: 0.009


def test_non_finite_gradient_is_refused_before_it_is_applied() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = PolicyOptimizer([("w", parameter)], learning_rate=1.0)
    optimizer.grad_buffer(parameter).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="norm is nan"):
        optimizer.step()
    assert parameter.detach().tolist() == [1.0, 1.0, 1.0]


# --- the run ----------------------------------------------------------------------------------------------------------


def test_run_folder_has_what_the_contract_says(configure: Callable[..., Config]) -> None:
    trainer = run(configure(num_generations=2, **{"evaluation.num_samples": 4, "evaluation.greedy": True}))
    folder = trainer.folder
    lines = read_metrics(folder)
    assert [line["round"] for line in lines] == [0, 1, 2, 3, 4]
    assert [line["round"] for line in lines if "eval/test/pass@1" in line] == [0, 2, 4]
    for key in ("pass@1", "pass@2", "pass@4", "greedy", "mean_length", "entropy"):
        assert f"eval/train/{key}" in lines[0] and f"eval/test/{key}" in lines[4]
    for key in (
        "reward", "reward_std", "loss", "entropy", "grad_norm", "learning_rate", "completions/mean_length",
        "completions/truncated_fraction", "rewards/starts_with_vowel", "rewards/failures", "tokens/generated",
        "tokens/trained", "tokens/skipped", "tokens/scored", "seconds/rollout", "seconds/reward", "seconds/update",
        "seconds/round", "frac_reward_zero_std",
    ):  # fmt: skip
        assert key in lines[1], key
    assert lines[1]["tokens/trained"] + lines[1]["tokens/skipped"] == lines[1]["tokens/generated"]
    rows = pq.read_table(folder / "rollouts" / "round-000003.parquet").to_pylist()
    assert len(rows) == 12 and [row["rollout"] for row in rows] == [0, 1] * 6
    for row in rows:
        assert row["prompt"].startswith(f"{row['query']}+") and row["answer"].isdigit()
        assert row["reward"] == starts_with_vowel([""], [row["completion"]])[0] == row["advantage"]
        assert len(row["token_ids"]) == len(row["logprobs"]) == len(row["entropy"]) > 0
        assert row["truncated"] == (row["token_ids"][-1] != 2)
    assert np.mean([row["reward"] for row in rows]) == pytest.approx(lines[3]["reward"])
    evaluated = pq.read_table(folder / "evaluations" / "round-000004-test.parquet").to_pylist()
    first = [row["reward"] for row in evaluated if row["sample"] == 0]
    assert len(first) == 7 and np.mean(first) == pytest.approx(lines[4]["eval/test/pass@1"])
    assert build_config(file=folder / "config.yaml") == trainer.config
    assert [path.name for path in list_checkpoints(folder / "checkpoints")] == ["checkpoint-2", "checkpoint-4"]
    assert not list(folder.rglob("*.pkl")) and not list(folder.rglob("*.bin")) and not list(folder.rglob("*.pt"))


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["minimal", "paper"])
def test_resume_is_bit_for_bit(configure: Callable[..., Config], tmp_path: Path, preset: str) -> None:
    whole = run(configure(preset=preset, output_dir=str(tmp_path / "whole"), max_rounds=6))
    first = configure(preset=preset, output_dir=str(tmp_path / "parts"), max_rounds=2)
    run(first)
    run(replace(first, max_rounds=3))
    # as if killed in round 5, between two checkpoints, in the middle of a line
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as file:
        file.write('{"round": 4, "reward": 9}\n{"round": 5, "rew')
    parts = run(replace(first, max_rounds=6))
    whole_lines, part_lines = lines_of(whole.folder), lines_of(parts.folder)
    assert [line["round"] for line in part_lines] == list(range(7))
    assert [{k: v for k, v in line.items() if "eval/" not in k} for line in part_lines] == [
        {k: v for k, v in line.items() if "eval/" not in k} for line in whole_lines
    ]
    assert part_lines[6] == whole_lines[6]
    a, b = weights_of(whole), weights_of(parts)
    assert all(torch.equal(a[name], b[name]) for name in a)
    for name in ("model.safetensors", "optimizer.safetensors"):
        files = [t.folder / "checkpoints" / "checkpoint-6" / name for t in (whole, parts)]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_resume_falls_back_past_a_flipped_bit(configure: Callable[..., Config], tmp_path: Path) -> None:
    whole = run(configure(output_dir=str(tmp_path / "whole")))
    run(configure(output_dir=str(tmp_path / "broken")))
    weights = tmp_path / "broken" / "checkpoints" / "checkpoint-4" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-9] ^= 1
    weights.write_bytes(data)
    with pytest.raises(CheckpointError, match="checksum"):
        read_state(weights.parent)
    found = latest_checkpoint(weights.parent.parent)
    assert found is not None and found[1]["round"] == 2
    again = run(configure(output_dir=str(tmp_path / "broken")))
    assert lines_of(again.folder) == lines_of(whole.folder)
    a, b = weights_of(whole), weights_of(again)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_resume_refuses_another_run_and_a_used_folder(configure: Callable[..., Config]) -> None:
    config = configure(max_rounds=2)
    run(config)
    with pytest.raises(ConfigError, match=r"learning_rate: 0.001 -> 0.5"):
        run(replace(config, learning_rate=0.5))
    with pytest.raises(ConfigError, match="holds a run already"):
        run(replace(config, resume="never"))
    named = run(replace(config, max_rounds=3, resume=f"{config.output_dir}/checkpoints/checkpoint-2"))
    assert named.round == 3
    with pytest.raises(CheckpointError, match=r"no readable state\.json"):
        run(replace(config, resume=config.output_dir))


def test_second_trainer_on_a_folder_is_refused(configure: Callable[..., Config]) -> None:
    trainer = Trainer(configure(), task=sums())
    with trainer.run_folder.lock(), pytest.raises(ConfigError, match="in use by another trainer"):
        run(configure())


def test_stop_request_finishes_the_round_and_saves(configure: Callable[..., Config]) -> None:
    config = configure(max_rounds=50, save_steps=0, eval_steps=0)
    trainer = Trainer(config, task=sums())

    class StopAtThree(Listener):
        def phase(self, name: str) -> None:
            if name == "update" and trainer.round == 2:
                trainer.stop_requested = True

    trainer.listener = StopAtThree()
    lines = trainer.run()
    assert [line["round"] for line in lines] == [0, 1, 2, 3]
    assert [path.name for path in list_checkpoints(trainer.folder / "checkpoints")] == ["checkpoint-3"]


def test_checkpoint_is_a_hugging_face_folder(configure: Callable[..., Config]) -> None:
    trainer = run(configure(save_total_limit=1))
    (folder,) = list_checkpoints(trainer.folder / "checkpoints")
    model = AutoModelForCausalLM.from_pretrained(folder)
    trained = weights_of(trainer)
    assert all(torch.equal(p, trained[name]) for name, p in model.named_parameters())
    assert model.config._attn_implementation == "sdpa"
    assert json.loads((folder / "state.json").read_text())["round"] == 4


def test_training_raises_the_reward(configure: Callable[..., Config]) -> None:
    trainer = run(configure(max_rounds=30, learning_rate=1e-2, eval_steps=0, batch_size=24, max_completion_length=3))
    lines = read_metrics(trainer.folder)
    assert lines[0]["eval/test/pass@1"] < 0.4 and lines[-1]["eval/test/pass@1"] > 0.8
    assert np.mean([line["reward"] for line in lines[-5:]]) > 0.8


def test_failing_reward_stops_the_run_or_is_counted(configure: Callable[..., Config]) -> None:
    task = replace_reward(sums(), none_for_some)
    trainer = run(configure(max_rounds=2, eval_steps=0), task)
    line = read_metrics(trainer.folder)[1]
    assert line["reward"] == 1.0 and 0 < line["tokens/skipped"] < line["tokens/generated"]


def test_too_long_is_refused_before_training(configure: Callable[..., Config]) -> None:
    with pytest.raises(ConfigError, match="128 positions"):
        run(configure(max_prompt_length=100, max_completion_length=29))
    with pytest.raises(ValueError, match="batch_size=25 is more than the 24"):
        run(configure(batch_size=25))
    with pytest.raises(ConfigError, match=r"evaluation.splits: 'tset'"):
        run(configure(**{"evaluation.splits": ["tset"]}))


# --- parts ------------------------------------------------------------------------------------------------------------


def test_own_advantage_is_a_choice_of_the_configuration(configure: Callable[..., Config]) -> None:
    with pytest.raises(ConfigError, match="advantage must be one of"):
        configure(advantage="minus_half")
    register("minus_half")(lambda rewards, groups: rewards - 0.5)
    try:
        trainer = run(configure(advantage="minus_half", max_rounds=1, eval_steps=0))
    finally:
        del ADVANTAGES["minus_half"]
    rows = pq.read_table(trainer.folder / "rollouts" / "round-000001.parquet").to_pylist()
    assert all(row["advantage"] == row["reward"] - 0.5 for row in rows)


def test_epochs_are_shuffled_and_drop_the_partial_batch() -> None:
    epochs = [[query_order(25, 8, 1, 24 * e + 8 * b, 8) for b in range(3)] for e in range(3)]
    for epoch in epochs:
        seen = [i for batch in epoch for i in batch]
        assert len(set(seen)) == 24 and set(seen) < set(range(25))
    assert epochs[0] != epochs[1] != epochs[2]
    assert query_order(25, 8, 1, 20, 8) == epochs[0][2][4:] + epochs[1][0][:4]
    assert query_order(25, 8, 2, 24, 8) != epochs[1][0]


def test_pass_at_k_is_the_unbiased_estimator() -> None:
    from math import comb

    for n, c, k in ((8, 3, 1), (8, 3, 4), (8, 0, 2), (8, 8, 5), (16, 1, 16), (2000, 3, 1000)):
        expected = 1 - comb(n - c, k) / comb(n, k)
        assert best_of_k([1.0] * c + [0.0] * (n - c), k) == pytest.approx(expected, rel=1e-9)
    assert best_of_k([0.2, 0.8, 0.5], 2) == pytest.approx((0.8 + 0.8 + 0.5) / 3)
    with pytest.raises(ValueError, match="k must lie in"):
        best_of_k([1.0], 2)


def test_plain_prompts_become_user_messages_for_a_chat_model(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = character_tokenizer()
    plain = prompt_tokens("1+1", tokenizer, "auto")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}={% endfor %}{% if add_generation_prompt %}a{% endif %}"
    )
    assert prompt_tokens("1+1", tokenizer, "auto") == prompt_tokens(
        [{"role": "user", "content": "1+1"}], tokenizer, "auto"
    )
    assert tokenizer.decode(prompt_tokens("1+1", tokenizer, "auto")) == "1+1=a"
    assert prompt_tokens("1+1", tokenizer, "never") == plain
    with pytest.raises(ValueError, match="no chat template"):
        prompt_tokens([{"role": "user", "content": "1"}], character_tokenizer(), "auto")


def test_bare_prompts_to_a_chat_model_are_warned_of_loudly(
    configure: Callable[..., Config], caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = character_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    trainer = Trainer(
        configure(max_rounds=0, chat_template="never"), model=Policy(tiny_llama(), tokenizer), task=sums()
    )
    with caplog.at_level("WARNING"):
        trainer.run()
    assert "chat model gets bare prompts" in caplog.text


def test_long_prompts_are_left_out_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    examples = [Example("1" * n, {"answer": str(n)}) for n in (3, 9, 5, 12, 4)]
    with caplog.at_level("WARNING"):
        prompts = PromptSet("train", examples, character_tokenizer(), max_prompt_length=5)
    assert (prompts.indices, prompts.filtered, len(prompts)) == ([0, 2, 4], 2, 3)
    assert "2 of 5 prompts" in caplog.text


def test_completion_text_leaves_out_the_stop_token_only() -> None:
    tokenizer = character_tokenizer()
    ids = tokenizer("12")["input_ids"]
    assert completion_texts([[*ids, 2], ids, [2], []], tokenizer, [2]) == ["12", "12", "", ""]


def test_metrics_log_drops_later_and_torn_lines(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"round": 0}\n{"round": 1}\n{"round": 2}\n{"rou')
    log = MetricsLog(tmp_path, from_round=1)
    log.write({"round": 2, "loss": float("nan"), "kl": None})
    log.close()
    assert read_metrics(tmp_path) == [{"round": 0}, {"round": 1}, {"round": 2, "loss": None, "kl": None}]


# --- a real model, a real tokenizer, real data ------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "data", "extra"), [("gsm8k", "gsm8k", {}), ("summarize", "summarization-scitldr", {})]
)
def test_real_model_on_real_data(data_dir: Path, tmp_path: Path, task: str, data: str, extra: dict[str, Any]) -> None:
    folder = data_dir / data
    if task == "summarize":  # most abstracts have more tokens than this model has positions, which is refused
        folder = tmp_path / "short"
        folder.mkdir()
        for split in ("train", "test"):
            lines = (data_dir / data / f"{split}.jsonl").read_text().splitlines(keepends=True)
            short = [line for line in lines if len("".join(json.loads(line)["source"])) < 600]
            (folder / f"{split}.jsonl").write_text("".join(short))
    config = build_config(
        {
            "preset": "paper", "model_name_or_path": str(data_dir / "model-stories260K" / "hf"), "task": task,
            "device": "cpu", "data_path": str(folder), "output_dir": str(tmp_path / "run"),
            "max_rounds": 2, "batch_size": 8, "max_prompt_length": 400, "max_completion_length": 24,
            "evaluation.max_queries": 16, "learning_rate": 1e-3,
            "evaluation.splits": ["train", "test"], **extra,
        }
    )  # fmt: skip
    trainer = Trainer(config)
    lines = trainer.run()
    assert [line["round"] for line in lines] == [0, 1, 2]
    for line in lines[1:]:
        assert line["sampler_trainer_logprob_diff/max"] < 1e-4
        assert (
            line["tokens/trained"] == line["tokens/generated"] == line["tokens/scored"]
        )  # the KL term makes all count
    assert lines[1]["kl"] == pytest.approx(0.0, abs=1e-9)  # the policy is the reference until the first update
    if task == "summarize":
        assert lines[0]["eval/train/pass@1"] > 0 and lines[1]["reward"] > 0
        assert lines[2]["kl"] > 0
    rows = pq.read_table(trainer.folder / "rollouts" / "round-000001.parquet").to_pylist()
    assert all(row["prompt"] and row["answer"] for row in rows)
    model = AutoModelForCausalLM.from_pretrained(trainer.folder / "checkpoints" / "checkpoint-2")
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), trainer.policy.model.parameters(), strict=True))


@pytest.mark.slow
def test_real_model_learns_to_mention_a_word(data_dir: Path, tmp_path: Path) -> None:
    who = ["girl", "boy", "dog", "cat", "bird", "bear", "man", "fox"]
    names = ["Lily", "Tom", "Ben", "Sue", "Max", "Mia", "Tim", "Anna"]
    stories = [
        [
            Example(f"Once upon a time, there was a little {w} named {n}.", {"answer": "happy"})
            for i, w in enumerate(who) for j, n in enumerate(names) if (i + j) % 2 == half
        ]
        for half in (0, 1)
    ]  # fmt: skip
    config = build_config(
        {
            "preset": "minimal", "model_name_or_path": str(data_dir / "model-stories260K" / "hf"), "task": "stories",
            "output_dir": str(tmp_path / "run"), "max_rounds": 15, "learning_rate": 1e-3, "max_prompt_length": 64,
            "max_completion_length": 32, "eval_steps": 0, "device": "cpu",
        }
    )  # fmt: skip
    task = Task("stories", {"train": stories[0], "test": stories[1]}, [mentions_answer])
    lines = Trainer(config, task=task).run()
    before, after = lines[0]["eval/test/pass@1"], lines[-1]["eval/test/pass@1"]
    assert before < 0.25 and after > before + 0.5
    assert max(line["sampler_trainer_logprob_diff/max"] for line in lines[1:] if line["tokens/trained"]) < 1e-4
