"""--dry_run: whatever would make a run fail is found before a model is loaded, and the price of a run is said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from tiny_models import save_tiny_llama

from bandit_rft import cli, preflight
from bandit_rft.audit import design_audit
from bandit_rft.config import Config, build_config
from bandit_rft.trainer import Trainer
from bandit_rft.wall_time import probe_round

Make = Callable[..., Config]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A configuration that would run: model, data and rewards of one's own."""
    save_tiny_llama(tmp_path / "model")
    for name, count in (("train", 12), ("test", 4)):
        rows = [json.dumps({"prompt": f"{i}+1=", "answer": str(i + 1)}) for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    (tmp_path / "solved").mkdir()
    (tmp_path / "solved" / "train.jsonl").write_text('{"question": "1+1?", "answer": "#### 2"}\n' * 4)
    (tmp_path / "rewards.py").write_text(
        "def plain(prompts, completions, answer):\n    return [0.0] * len(completions)\n"
        "def needy(prompts, completions, difficulty):\n    return [0.0] * len(completions)\n"
    )
    (tmp_path / "broken.py").write_text("import nowhere_at_all\n")

    def of(**more: Any) -> Config:
        values = {
            "preset": "minimal", "model_name_or_path": str(tmp_path / "model"), "task": "dataset", "device": "cpu",
            "data_path": str(tmp_path), "reward.functions": f"{tmp_path}/rewards.py:plain", "batch_size": 4,
            "output_dir": str(tmp_path / "run"), "max_rounds": 2, "max_prompt_length": 12, "max_completion_length": 6,
            **more,
        }  # fmt: skip
        return build_config(values)

    return of


def test_what_would_run_passes_and_leaves_nothing_behind(make: Make, tmp_path: Path) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())
    found = preflight.preflight(make())
    assert found.failed == [] and all(well for _, well, _ in found.lines), found.lines
    assert found.sizes == {"train": 12, "test": 4}
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "__pycache__") == before


@pytest.mark.parametrize(
    ("changes", "what", "message"),
    [
        ({"model_name_or_path": "./absent"}, "model", "there is no folder or file './absent'"),
        ({"model_name_or_path": "{tmp}"}, "model", "neither config.json nor adapter_config.json"),
        ({"max_prompt_length": 120, "max_completion_length": 9}, "positions", "more than the model's 128 positions"),
        ({"data_path": "{tmp}/absent/data"}, "data", "there is no folder or file"),
        ({"data_path": "{tmp}/test.jsonl"}, "data", "'train' is none of the splits of task dataset: test"),
        ({"evaluation.splits": "tset"}, "data", "evaluation.splits: 'tset' is none of"),
        ({"evaluation.files": "more=absent.jsonl"}, "data", "there is no file 'absent.jsonl'"),
        ({"batch_size": 13}, "data", "batch_size=13 is more than the 12 training prompts"),
        ({"max_prompt_length": 3}, "prompts", "leaves out 12 of 12 prompts of train, more than 50%"),
        ({"reward.functions": "{tmp}/rewards.py:needy"}, "rewards", "takes ['difficulty'], but the data have only"),
        ({"reward.functions": "{tmp}/rewards.py:plian"}, "rewards", "did you mean 'plain'?"),
        ({"reward.functions": "{tmp}/broken.py:f"}, "rewards", "nowhere_at_all"),
        ({"reward.functions": "{tmp}/absent.py:f"}, "data", "names a file that does not exist"),
        ({"reward.functions": [], "task": "gsm8k", "data_path": "{tmp}/solved", "reward.weights": "1,2",
          "max_prompt_length": 100}, "rewards", "weights: expected 1"),
        ({"device": "banana"}, "device", "device='banana' cannot be used"),
        ({"device": "cuda:77"}, "device", "device='cuda:77' cannot be used"),
        ({"output_dir": "{tmp}/test.jsonl/run"}, "run folder", "is no folder that may be written to"),
        ({"resume": "{tmp}/nowhere"}, "run folder", "resume must be auto, never or the folder of a checkpoint"),
        ({"resume": "{tmp}"}, "run folder", "resume={tmp}: {tmp} has no readable state.json"),
    ],
)  # fmt: skip
def test_what_would_fail_is_found(
    make: Make, tmp_path: Path, changes: dict[str, Any], what: str, message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def at(value: Any) -> Any:
        return value.replace("{tmp}", str(tmp_path)) if isinstance(value, str) else value

    config = make(**{key: at(value) for key, value in changes.items()})
    found = preflight.preflight(config)
    assert what in found.failed and any(at(message) in text for name, well, text in found.lines if well is False), (
        found.lines
    )
    # and it is true: training fails, too
    with pytest.raises((ValueError, OSError, RuntimeError)):
        Trainer(config).run()
    # the command says so, and its status
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({k: at(v) for k, v in _keys(config).items()}))
    assert cli.main(["train", "--config", str(tmp_path / "mine.yaml"), "--dry_run"]) == 1
    captured = capsys.readouterr()
    assert f"this would fail: {what}" in captured.err or what in captured.err
    assert "FAILS: " in captured.out and yaml.safe_load(captured.out)["batch_size"] == config.batch_size


def _keys(config: Config) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(config)


def test_a_run_that_cannot_be_continued_is_found(make: Make) -> None:
    Trainer(make()).run()
    assert preflight.preflight(make(max_rounds=3)).failed == []
    for changes in ({"learning_rate": 0.5}, {"resume": "never"}):
        assert preflight.preflight(make(**changes)).failed == ["run folder"]


def test_a_full_disk_is_found(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage(NamedTuple):
        free: int

    config = make(save_steps=1, save_total_limit=0, max_rounds=50)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(10**7))
    found = preflight.preflight(config)
    assert found.failed == ["disk"] and "51 checkpoint(s) of" in found.lines[-1][2]
    assert preflight.preflight(replace(config, save_total_limit=1)).failed == []


def test_the_estimate_of_a_checkpoint_is_its_size(make: Make) -> None:
    config = make()
    Trainer(config).run()
    checkpoint = Path(config.output_dir) / "checkpoints" / "checkpoint-2"
    real = sum((checkpoint / name).stat().st_size for name in ("model.safetensors", "optimizer.safetensors"))
    estimate = preflight.disk_estimate(config, 2, [12, 4])
    assert estimate is not None and 0.9 * real < estimate[0] <= real


def test_what_is_not_here_is_not_checked_and_not_downloaded(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bandit_rft.tasks.files.read_hub", lambda *given, **more: pytest.fail("asked the hub"))
    config = make(task="gsm8k", data_path=None, model_name_or_path="some/model", preset="paper")
    found = preflight.preflight(config)
    assert found.failed == [] and found.sizes == {"train": 7473, "test": 1319}
    assert {what for what, well, _ in found.lines if well is None} >= {"model", "data", "prompts", "disk"}
    rewards = {text for what, well, text in found.lines if what == "rewards" and well}
    assert rewards == {"plain, with columns that cannot be compared: the data are not here"}
    for functions, message in (("sample:nofile.py:x", "does not exist"), (f"{tmp_path}/broken.py:plain", "imported")):
        missing = preflight.preflight(replace(config, reward=replace(config.reward, functions=[functions])))
        assert missing.failed == ["rewards"] and any(message in text for *_, text in missing.lines)


def test_evaluation_is_priced_beside_training() -> None:
    config = build_config({"preset": "paper", "task": "gsm8k", "model_name_or_path": "m/n"})
    audit = list(design_audit(config, {"train": 7473, "test": 1319}))
    assert (
        "evaluation",
        "11 times 8,792 questions of train, test x 1 = 96,712 rollouts, 3.0 times the 32,000 of training",
    ) in audit
    assert any("evaluation draws more than training" in value for what, value in audit if what == "note")
    few = replace(config, evaluation=replace(config.evaluation, splits=["test"], max_queries=100))
    audit = list(design_audit(few, {"train": 7473, "test": 1319}))
    assert any(value.startswith("11 times 100 questions of test x 1 = 1,100 rollouts") for _, value in audit)
    assert not any("draws more" in value for _, value in audit)
    epochs = dict(design_audit(replace(config, num_train_epochs=1.0), {"train": 7473, "test": 1319}))
    assert epochs["whole run"].startswith("233 rounds, 7,456 rollouts")
    assert "the questions are not counted here" in dict(design_audit(config))["evaluation"]


def test_real_data_with_too_short_prompts_is_refused(data_dir: Path, tmp_path: Path) -> None:
    given = {
        "preset": "paper", "task": "gsm8k", "data_path": str(data_dir / "gsm8k"), "output_dir": str(tmp_path / "run"),
        "model_name_or_path": str(data_dir / "model-stories260K" / "hf"), "max_completion_length": 24,
    }  # fmt: skip
    found = preflight.preflight(build_config({**given, "max_prompt_length": 64}))
    assert found.failed == ["prompts"]
    assert any("leaves out" in text and "of 7,473 prompts of train" in text for _, _, text in found.lines)
    assert preflight.preflight(build_config({**given, "max_prompt_length": 400})).failed == []


def test_prompt_lengths_count_the_chat_template(make: Make, tmp_path: Path) -> None:
    (tmp_path / "model" / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}{% if add_generation_prompt %} =>{% endif %}"
    )
    said = {what: text for what, _, text in preflight.preflight(make(max_prompt_length=40)).lines}
    assert said["prompts"] == "test: up to 13 tokens, with the chat template; 0 of 4 left out"
    found = preflight.preflight(make())  # "user: 0+1= =>" is 13 tokens
    assert found.failed == ["prompts"]
    assert (
        "max_prompt_length=12 leaves out 12 of 12 prompts of train"
        in dict(map(itemgetter(0, 2), found.lines))["prompts"]
    )
    assert preflight.preflight(make(chat_template="never")).failed == []
    found = preflight.preflight(make(max_prompt_length=40, chat_template_kwargs={"enable_thinking": False}))
    assert "does not read enable_thinking" in dict(map(itemgetter(0, 2), found.lines))["prompts"]


def test_the_probe_predicts_a_wall_time(make: Make, tmp_path: Path) -> None:
    config = make(max_rounds=100, lr_scheduler_type="cosine", warmup_rounds=20, num_train_epochs=30, eval_steps=30)
    said = dict(probe_round(config))
    assert "16 completions in" in said["evaluation"] and "there are 16 each time" in said["evaluation"]
    assert "90 rounds" in said["wall time"] and "4 evaluations" in said["wall time"]
    assert not (tmp_path / "run").exists()
    assert "7 rounds" in dict(probe_round(make(max_rounds=7)))["wall time"]
