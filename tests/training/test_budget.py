"""How long a run is, and the course of its learning rate: passes over the prompts, warm-up, exact continuation."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import sums
from tiny_rewards import starts_with_vowel

from bandit_rft.budget import evaluation_count, evaluation_rollouts, last_position, planned_rounds
from bandit_rft.config import Config, ConfigError, build_config
from bandit_rft.metrics import read_metrics
from bandit_rft.tasks import Task
from bandit_rft.trainer import Trainer

Configure = Callable[..., Config]


@pytest.fixture
def configure(model_folder: Path, tmp_path: Path) -> Configure:
    def make(folder: str = "run", **overrides: Any) -> Config:
        values = {
            "preset": "minimal", "model_name_or_path": str(model_folder), "task": "arithmetic", "batch_size": 6,
            "output_dir": str(tmp_path / folder), "max_rounds": 40, "learning_rate": 1e-3, "max_prompt_length": 12,
            "max_completion_length": 6, "save_steps": 0, "eval_steps": 0, "device": "cpu",
            "evaluation.max_queries": 2, "evaluation.greedy": False, **overrides,
        }  # fmt: skip
        return build_config(values)

    return make


def run(config: Config) -> list[dict[str, Any]]:
    task = sums()
    Trainer(config, task=Task(task.name, task.splits, [starts_with_vowel])).run()
    return [
        {k: v for k, v in line.items() if not k.startswith(("seconds/", "eval/"))}
        for line in read_metrics(Path(config.output_dir))
    ]


# --- passes -----------------------------------------------------------------------------------------------------------


def test_passes_leave_out_the_last_partial_batch() -> None:
    config = build_config({"preset": "demo", "batch_size": 32, "num_train_epochs": 2, "max_rounds": 10_000})
    assert last_position(config, 7473) == 2 * 233 * 32 and planned_rounds(config, 7473) == 466
    assert planned_rounds(config, None) == 10_000
    for epochs, rounds in ((0.1, 3), (0.11, 4), (1.0, 30), (1e-9, 0), (1 / 3, 10)):  # of 30 queries, one a round
        config = build_config({"preset": "demo", "batch_size": 1, "num_train_epochs": epochs})
        assert planned_rounds(config, 30) == rounds, epochs
    assert planned_rounds(build_config({"preset": "demo", "num_train_epochs": 9, "max_rounds": 4}), 64) == 4


@pytest.mark.parametrize(("epochs", "rounds"), [(1, 4), (0.5, 2), (0.55, 3), (2.25, 9)])
def test_a_run_ends_with_its_passes(configure: Configure, epochs: float, rounds: int) -> None:
    """24 prompts in batches of 6."""
    assert [line["round"] for line in run(configure(num_train_epochs=epochs))] == list(range(rounds + 1))


def test_what_comes_first_ends_the_run(configure: Configure, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "bandit_rft"):
        assert run(configure(num_train_epochs=3, max_rounds=5))[-1]["round"] == 5
    assert "max_rounds=5 ends the run before num_train_epochs=3, which take 12 rounds" in caplog.text


def test_with_dynamic_sampling_replaced_queries_belong_to_the_pass(configure: Configure) -> None:
    """A pass is over when its queries were drawn, not when a number of rounds went by."""
    choices = {"num_generations": 2, "advantage": "group_norm", "rollout.dynamic_sampling": 3}
    lines = run(configure(num_train_epochs=2, **choices))
    drawn = [line["rollout/queries"] for line in lines[1:]]
    assert sum(line["rollout/dropped"] for line in lines[1:]) > 0
    assert sum(drawn[:-1]) < 48 <= sum(drawn) and len(drawn) < 8


def test_a_run_with_passes_is_continued(configure: Configure) -> None:
    whole = run(configure("whole", num_train_epochs=2))
    for epochs in (0.5, 1, 2, 2):
        parts = run(configure("parts", num_train_epochs=epochs))
    assert parts == whole and len(whole) == 9


# --- the learning rate ------------------------------------------------------------------------------------------------


COURSES: list[dict[str, Any]] = [
    {"lr_scheduler_type": "cosine", "warmup_rounds": 2, "min_lr_ratio": 0.1},
    {"lr_scheduler_type": "linear", "warmup_ratio": 0.25},
    {"warmup_rounds": 3},
]


@pytest.mark.parametrize("course", COURSES, ids=lambda c: "-".join(map(str, c.values())))
def test_the_rate_acts_and_a_continued_run_has_the_same_bits(configure: Configure, course: dict[str, Any]) -> None:
    whole = run(configure("whole", max_rounds=8, save_steps=1, save_total_limit=0, **course))
    rates = [line["learning_rate"] for line in whole[1:]]
    assert len(set(rates)) > 3 and max(rates) == pytest.approx(1e-3) and rates[0] < rates[1]
    constant = run(configure("constant", max_rounds=8))
    assert constant[1]["loss"] == whole[1]["loss"] and constant[3] != whole[3]
    for rounds in (1, 2, 5, 8):
        more = {} if course.keys() == {"warmup_rounds"} else {"lr_scheduler_rounds": 8}
        parts = run(configure("parts", max_rounds=rounds, **course, **more))
    assert parts == whole
    ends = [Path(configure(name).output_dir) / "checkpoints" / "checkpoint-8" for name in ("whole", "parts")]
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert ends[0].joinpath(name).read_bytes() == ends[1].joinpath(name).read_bytes()


def test_the_course_goes_by_passes_too(configure: Configure) -> None:
    lines = run(configure(num_train_epochs=1, lr_scheduler_type="linear"))
    assert [line["learning_rate"] for line in lines[1:]] == pytest.approx([1e-3, 0.75e-3, 0.5e-3, 0.25e-3])


def test_another_course_is_another_run(configure: Configure) -> None:
    run(configure(max_rounds=2, lr_scheduler_type="linear"))
    with pytest.raises(ConfigError, match=r"planned for 2 rounds, 0 of warm-up; now it would be 4 and 0: .*=2"):
        run(configure(max_rounds=4, lr_scheduler_type="linear"))
    lines = run(configure(max_rounds=4, lr_scheduler_type="linear", lr_scheduler_rounds=2))
    assert [line["learning_rate"] for line in lines[1:]] == pytest.approx([1e-3, 0.5e-3, 0, 0])
    with pytest.raises(ConfigError, match="lr_scheduler_type: 'linear' -> 'cosine'"):
        run(configure(max_rounds=2, lr_scheduler_type="cosine"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"warmup_rounds": 3, "warmup_ratio": 0.1}, "warmup_rounds and warmup_ratio are both given"),
        ({"min_lr_ratio": 0.1}, "min_lr_ratio has no effect with lr_scheduler_type=constant"),
        ({"lr_scheduler_rounds": 9}, "lr_scheduler_rounds has no effect"),
        ({"lr_scheduler_type": "cosine", "max_generated_tokens": 10}, "max_generated_tokens leaves that open"),
        ({"warmup_ratio": 0.1, "max_seconds": 10}, "warmup_ratio=0.1 needs to know how many rounds"),
        ({"lr_scheduler_type": "cosin"}, "did you mean cosine?"),
        ({"warmup_ratio": 1}, "warmup_ratio must be >= 0 and < 1"),
        ({"num_train_epochs": 0}, "num_train_epochs must be > 0"),
    ],
)
def test_what_cannot_be_meant_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_config({"preset": "demo", **given})
    assert message in str(caught.value)


def test_a_warm_up_as_long_as_the_run_is_refused(configure: Configure) -> None:
    with pytest.raises(ConfigError, match="warmup_rounds=4 leaves none of the 4 rounds"):
        run(configure(warmup_rounds=4, num_train_epochs=1, lr_scheduler_type="linear"))
    assert len(run(configure("other", warmup_rounds=4, max_rounds=0, lr_scheduler_type="linear"))) == 1


# --- evaluation beside training ---------------------------------------------------------------------------------------


def test_what_evaluation_costs_with_the_papers_settings() -> None:
    """GSM8K with `paper`: 97,000 rollouts of evaluation, 32,000 of training."""
    config = build_config({"preset": "paper", "task": "gsm8k", "model_name_or_path": "m"})
    assert evaluation_count(config, config.max_rounds) == 11
    assert 11 * evaluation_rollouts(config, [7473, 1319]) == 96_712


@pytest.mark.parametrize(("rounds", "every", "count"), [(0, 5, 1), (4, 0, 2), (4, 2, 3), (5, 2, 4), (1, 9, 2)])
def test_evaluations_are_counted_as_they_happen(configure: Configure, rounds: int, every: int, count: int) -> None:
    config = configure(max_rounds=rounds, eval_steps=every)
    run(config)
    happened = [line for line in read_metrics(Path(config.output_dir)) if "eval/test/pass@1" in line]
    assert evaluation_count(config, rounds) == len(happened) == count
