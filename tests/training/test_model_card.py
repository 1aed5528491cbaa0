"""The card of a checkpoint: true, readable by the hub's tools, and text whatever names are in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from tiny_models import save_tiny_llama, sums
from tiny_rewards import starts_with_vowel

from bandit_rft.checkpoint import read_state
from bandit_rft.config import build_config
from bandit_rft.intervals import wilson
from bandit_rft.metrics import read_metrics
from bandit_rft.model_card import model_card
from bandit_rft.rewards import RewardFunction
from bandit_rft.tasks import Task
from bandit_rft.trainer import Trainer


def train(folder: Path, model: Path, **more: Any) -> Path:
    config = build_config({
        "preset": "minimal", "model_name_or_path": str(model), "task": "arithmetic", "batch_size": 6, "device": "cpu",
        "output_dir": str(folder), "max_rounds": 4, "max_prompt_length": 12, "max_completion_length": 6,
        "save_steps": 3, "eval_steps": 2, "learning_rate": 1e-3, **more,
    })  # fmt: skip
    task = sums()
    Trainer(config, task=Task(task.name, task.splits, [starts_with_vowel])).run()
    return folder


def test_a_card_says_what_was_trained_on_what_with_which_result(model_folder: Path, tmp_path: Path) -> None:
    run = train(tmp_path / "run", model_folder)
    lines = read_metrics(run)
    for number, measured in ((3, 2), (4, 4)):  # round 3 was saved and not evaluated
        checkpoint = run / "checkpoints" / f"checkpoint-{number}"
        text = (checkpoint / "README.md").read_text()
        card = ModelCard(text)
        assert card.data.library_name == "transformers" and card.data.base_model is None
        assert f"after {number} rounds on sums" in text and f"`{model_folder.name}`" in text
        assert "24 of `train`, 7 of `test`" in text and "`starts_with_vowel`" in text
        assert str(tmp_path) not in text and str(model_folder.parent) not in text
        for split, count in (("train", 24), ("test", 7)):
            before, after = (lines[i][f"eval/{split}/pass@1"] for i in (0, measured))
            cells = [f"{x:.3f} [{wilson(x, count).low:.3f}, {wilson(x, count).high:.3f}]" for x in (before, after)]
            assert f"| `{split}` | sampled | {' | '.join(cells)} |" in text
        assert f"| round 0 | round {measured} |" in text
        assert f"{sum(line.get('tokens/generated', 0) for line in lines[: number + 1]):,} tokens" in text
        (checkpoint / "README.md").write_text("mine")
        assert read_state(checkpoint)["round"] == number


def test_an_adapter_says_so(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    run = train(tmp_path / "run", save_tiny_llama(tmp_path / "base"), max_rounds=1, **{"lora.rank": 2})
    text = (run / "checkpoints" / "checkpoint-1" / "README.md").read_text()
    assert read_state(run / "checkpoints" / "checkpoint-1")["round"] == 1
    assert ModelCard(text).data.library_name == "peft" and "a LoRA adapter of `base`" in text


def test_names_are_text_whatever_is_in_them(tmp_path: Path) -> None:
    hostile = "a`b|c\n# d <script>x</script> [e](http://f) \x1b[31m\u202e**g**\n---"
    config = build_config({
        "preset": "demo", "model_name_or_path": hostile, "data_path": f"/secret/{hostile}".replace("/script", "script"),
    })  # fmt: skip
    task = sums()
    rewards = [RewardFunction("m:f", name=hostile)]
    text = model_card(
        config, Task(hostile, {"train": task.splits["train"], hostile: task.splits["test"]}, rewards),
        [{"round": 0, f"eval/{hostile}/pass@1": 0.5}, {"round": 1}], tmp_path, {"torch": hostile},
    )  # fmt: skip
    body = text.split("---\n", 2)[2]
    assert body.count("\n# ") == 1 and "\x1b" not in text and "\u202e" not in text and "/secret" not in text
    plain = [part for line in body.splitlines() for part in line.split("`")[::2]]  # what is not code
    assert not [part for part in plain if "<script" in part.replace("\\<", "") or "](" in part.replace("\\]", "")]
    assert all(line.count("|") - line.count("\\|") in (0, 3, 5) for line in body.splitlines())
    assert ModelCard(text).data.base_model is None


def test_mean_rewards_are_not_called_pass_at_1(tmp_path: Path) -> None:
    from bandit_rft.metrics import write_parquet

    columns = {"sample": ("int32", [0, 0]), "reward": ("float64", [1.5, 0.5])}
    write_parquet(tmp_path / "round-000000-test.parquet", columns)
    config = build_config({"preset": "demo"})
    text = model_card(config, sums(), [{"round": 0, "eval/test/pass@1": 1.0}], tmp_path, {})
    assert "Mean reward; in brackets" in text and "Pass@1" not in text
    assert "Nothing was measured." in model_card(config, sums(), [], tmp_path, {})
