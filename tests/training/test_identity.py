"""What makes a run the run that it is: its settings, when it is taken up again."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from tiny_models import save_tiny_llama, sums
from tiny_rewards import longer

from bandit_rft import Config, Task, Trainer
from bandit_rft.config import ConfigError, build_config
from bandit_rft.run_folder import RunFolder

ROWS = [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(24)]
KEYS = {
    "preset": "minimal", "batch_size": 4, "max_prompt_length": 12, "max_completion_length": 6, "learning_rate": 1e-2,
    "eval_steps": 0, "verify_steps": 0, "device": "cpu", "max_rounds": 1,
    "evaluation": {"max_queries": 1, "greedy": False},
}  # fmt: skip


def length(completion: str) -> float:
    return len(completion) / 6


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny_llama(Path("model"))


def trainer(**given: Any) -> Trainer:
    """A trainer in the folder "run", of the model in the folder "model" unless another is given."""
    keys = {**KEYS, "output_dir": "run", "model": "model", "train_dataset": ROWS, "reward_funcs": [length]}
    return Trainer(progress=False, **{**keys, **given})


def configured(**given: Any) -> Config:
    return build_config({**KEYS, "output_dir": "run", "model_name_or_path": "model", "task": "sums", **given})


# --- settings ---------------------------------------------------------------------------------------------------------


def test_an_option_that_is_added_makes_another_run() -> None:
    def found(**given: Any) -> Any:
        made = trainer(max_rounds=2, **given)
        return made.run_folder.find_checkpoint("auto", asdict(made.config), made.rewards)

    trainer(advantage="spo").run()
    assert found(advantage="spo")
    assert found(advantage="spo", advantage_options={"decay_max": 0.96})  # as it was, only said
    with pytest.raises(ConfigError, match=r"advantage_options\.decay_max: 0\.96 -> 0\.9[^6]"):
        found(advantage="spo", advantage_options={"decay_max": 0.9})
    with pytest.raises(ConfigError, match=r"task_options\.prompt_column: None -> 'prompt'"):
        found(advantage="spo", task_options={"prompt_column": "prompt"})


def test_a_key_that_a_checkpoint_does_not_say_had_its_default() -> None:
    folder, tree = RunFolder("run"), asdict(configured())
    checkpoint = Path("run/checkpoints/checkpoint-1")
    checkpoint.mkdir(parents=True)
    state = {
        "round": 1, "position": 4, "generated_tokens": 1, "seconds": 1.0, "kl_coef": 0.0, "sha256": {}, "layout": 2,
        "config": {key: value for key, value in tree.items() if key != "weight_decay"},
    }  # fmt: skip
    (checkpoint / "state.json").write_text(json.dumps(state))
    assert folder.find_checkpoint("auto", {**tree, "weight_decay": 0.01})
    with pytest.raises(ConfigError, match=r"weight_decay: 0\.01 -> 0\.5"):
        folder.find_checkpoint("auto", {**tree, "weight_decay": 0.5})


# --- a configuration with a task of a program -------------------------------------------------------------------------


def test_rewards_of_a_configuration_go_before_those_of_a_task() -> None:
    task = sums()
    made = Trainer(configured(**{"reward.functions": "tiny_rewards:longer"}), task=task)
    assert [reward.name for reward in made.task.rewards] == ["longer"]
    assert [reward["name"] for reward in made.rewards] == ["longer"]
    assert [reward.name for reward in task.rewards] == ["starts_with_vowel"]
    assert Trainer(configured(), task=Task("sums", task.splits, [longer])).task.rewards[0].name == "longer"


def test_files_of_evaluation_are_refused_beside_a_task() -> None:
    with pytest.raises(ConfigError, match=r"evaluation\.files=.* cannot act here.*splits of the Task"):
        Trainer(configured(**{"evaluation.files": "extra=rows.jsonl"}), task=sums())
